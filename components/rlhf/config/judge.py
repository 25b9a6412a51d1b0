"""Settings of the judges, which compare responses on data that no trained model has seen."""

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from components.rlhf.config.base import BaseConfig, Positive, PositiveInt
from components.rlhf.config.code import Digest
from components.rlhf.config.model import ModelConfig, Seed
from components.rlhf.config.scoring import (
    Command,
    Endpoint,
    ExactMatch,
    Function,
    JsonSchema,
    Name,
    Numeric,
    Regex,
)

MAX_JUDGES_BYTES = (
    48 * 1024
)  # of all judges as JSON: Linux allows 128 KiB for an argument, and KFP passes settings twice


class JudgeBase(BaseConfig):
    name: Name | None = None
    """Name in reports and metrics, such as gpt or people; null is its kind."""

    @property
    def title(self) -> str:
        kind: str = getattr(self, "kind")  # noqa: B009 - every subclass has one
        return self.name or kind


class LinearJudge(JudgeBase):
    """A linear model on words and characters: ridge regression on ratings or, without ratings, logistic regression on pairs."""

    kind: Literal["linear"] = "linear"
    """linear: a linear model, fitted to the judge's share of data.preferences."""
    features: Literal["auto", "words", "characters", "both"] = "auto"
    """What the texts are described by; auto takes what predicts a fifth of its training data best."""
    max_ngram: PositiveInt = 2
    """Longest word n-gram that is used as a feature."""
    max_character_ngram: PositiveInt = 4
    """Longest character n-gram that is used as a feature."""
    regularisation: Positive = 1.0
    """Strength of the L2 penalty on the coefficients."""


class RewardModelJudge(JudgeBase):
    """A second reward model: trained like the first one, on the judge's share of data.preferences, or imported."""

    kind: Literal["reward_model"]
    """reward_model: a second reward model; there may be one."""
    use: str | None = None
    """Folder, s3://BUCKET/PREFIX or Hugging Face id of a reward model; null trains one with the settings of reward_model."""


class EndpointJudge(Endpoint, JudgeBase):
    """A language model behind an OpenAI-compatible API, which compares two responses in both orders."""

    num_pairs: PositiveInt = 200
    """Number of held-out human pairs that its agreement with people is measured on; each takes two requests."""


class FunctionJudge(Function, JudgeBase):
    """A Python function score(prompts, responses) that returns one number for each response, higher is better."""


class ExactMatchJudge(ExactMatch, JudgeBase):
    """Prefers the response that is the text of a column."""


class RegexJudge(Regex, JudgeBase):
    """Prefers the response in which a regular expression is found, or of which it extracts the text of a column."""


class NumericJudge(Numeric, JudgeBase):
    """Prefers the response that ends with the value of a column."""


class JsonSchemaJudge(JsonSchema, JudgeBase):
    """Prefers the response that is JSON and satisfies a schema."""


class CommandJudge(Command, JudgeBase):
    """Prefers the response with the higher score of a command."""


KINDS: dict[str, type[BaseConfig]] = {
    "linear": LinearJudge,
    "reward_model": RewardModelJudge,
    "endpoint": EndpointJudge,
    "function": FunctionJudge,
    "exact_match": ExactMatchJudge,
    "regex": RegexJudge,
    "numeric": NumericJudge,
    "json_schema": JsonSchemaJudge,
    "command": CommandJudge,
}
KIND_TAG = "judge of kind "  # pydantic puts it between judge and its keys; no key of a params file looks like it
SECTIONS = {f"{KIND_TAG}{kind}": section for kind, section in KINDS.items()}


def _kind(value: Any) -> str:
    kind = value.get("kind", "linear") if isinstance(value, dict) else getattr(value, "kind", None)
    return f"{KIND_TAG}{kind}"


def _one_or_several(value: Any) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


Judge = Annotated[
    Annotated[LinearJudge, Tag(f"{KIND_TAG}linear")]
    | Annotated[RewardModelJudge, Tag(f"{KIND_TAG}reward_model")]
    | Annotated[EndpointJudge, Tag(f"{KIND_TAG}endpoint")]
    | Annotated[FunctionJudge, Tag(f"{KIND_TAG}function")]
    | Annotated[ExactMatchJudge, Tag(f"{KIND_TAG}exact_match")]
    | Annotated[RegexJudge, Tag(f"{KIND_TAG}regex")]
    | Annotated[NumericJudge, Tag(f"{KIND_TAG}numeric")]
    | Annotated[JsonSchemaJudge, Tag(f"{KIND_TAG}json_schema")]
    | Annotated[CommandJudge, Tag(f"{KIND_TAG}command")],
    Discriminator(
        _kind, custom_error_type="judge_kind", custom_error_message=f"kind is not one of {', '.join(KINDS)}; correct it"
    ),
]
Judges = Annotated[
    Annotated[Judge, Tag("one")] | Annotated[tuple[Judge, ...], Field(max_length=8), Tag("several")],
    Discriminator(_one_or_several),
]


def as_list(judges: Any) -> tuple[Judge, ...]:
    """The judges of a setting that is one or several. The first one decides at the gate."""
    return judges if isinstance(judges, tuple) else (judges,)


class JudgeStageConfig(BaseConfig):
    model: ModelConfig
    judge: Judges
    code_digest: Digest = ""
    seed: Seed

    @model_validator(mode="after")
    def _check_judges(self) -> "JudgeStageConfig":
        check_judges(self.judge)
        return self


def check_judges(judges: Any) -> None:
    """Raise ValueError for no judge, two judges of one name, two reward models, and texts that are too long together."""
    panel = as_list(judges)
    names = [judge.title for judge in panel]
    if not panel:
        raise ValueError("judge is an empty list; name a judge, or remove it for a linear one")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two judges are named {name}; give them different names (judge.NUMBER.name)")
    if sum(isinstance(judge, RewardModelJudge) for judge in panel) > 1:
        raise ValueError("judge has two reward models, and there can be one; remove one of them")
    size = sum(len(json.dumps(judge.canonical_json())) for judge in panel)
    if size > MAX_JUDGES_BYTES:
        raise ValueError(
            f"the judges take {size:,} bytes as JSON, and {MAX_JUDGES_BYTES:,} are possible; shorten the rubric, or install the module "
            "of the function where the stages run"
        )
