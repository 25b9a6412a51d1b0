"""Settings of the judges, which compare responses on data that no trained model has seen."""

import json
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from components.rlhf.config.base import BaseConfig, Count, NonNegative, Positive, PositiveInt
from components.rlhf.config.model import ModelConfig, Seed

Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=100)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
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


class EndpointJudge(JudgeBase):
    """A language model behind an OpenAI-compatible API, which compares two responses in both orders."""

    TEXTS = frozenset({"rubric", "extra_body"})

    kind: Literal["endpoint"]
    """endpoint: a language model behind an OpenAI-compatible API."""
    url: str
    """Base URL of the API: https://api.openai.com/v1, http://vllm.models:8000/v1."""
    model: Annotated[str, Field(pattern=r"^\w")]
    """Name of the model."""
    rubric_file: str | None = None
    """Text file that says what makes a response better; relative to the params file. Submitting replaces it by rubric."""
    rubric: str = ""
    """The rubric itself; empty is a general one (components/rlhf/rewards/rubric.txt)."""
    api_key_variable: Variable | None = "OPENAI_API_KEY"
    """Environment variable with the API key, on a cluster a key of the Secret cluster.secrets.judge; null is none, the default for http://."""
    num_pairs: PositiveInt = 200
    """Number of held-out human pairs that its agreement with people is measured on; each takes two requests."""
    max_tokens: PositiveInt = 512
    """Maximum length of an answer in tokens, reasoning included."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of each request: {reasoning_effort: low}, vLLM's {structured_outputs: {choice: [A, B]}}; null removes one."""
    max_concurrency: Annotated[PositiveInt, Field(le=256)] = 8
    """Maximum number of requests at a time."""
    requests_per_minute: PositiveInt | None = None
    """Rate limit; null is none. A server that answers 429 is obeyed in any case."""
    timeout_seconds: Positive = 120.0
    """Seconds after which a request without an answer has failed."""
    max_retries: Annotated[Count, Field(le=20)] = 6
    """Number of retries of a failed request, with waits that double from 1 second to 60."""
    input_price: NonNegative = 0.0
    """Price of a million input tokens, for the metric cost."""
    output_price: NonNegative = 0.0
    """Price of a million output tokens, in the same currency."""

    @model_validator(mode="before")
    @classmethod
    def _send_no_key_by_default_to_plain_http(cls, content: Any) -> Any:
        if isinstance(content, dict) and str(content.get("url", "")).startswith("http://"):
            return {"api_key_variable": None} | content
        return content

    @field_validator("url")
    @classmethod
    def _require_http(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("write it as https://HOST/v1")
        return url.rstrip("/").removesuffix("/chat/completions")

    @field_validator("extra_body")
    @classmethod
    def _reject_own_fields(cls, body: dict[str, Any]) -> dict[str, Any]:
        for key in ("model", "messages", "stream", "n"):
            if key in body:
                raise ValueError(f"{key} is set by the judge; remove it")
        return body

    @model_validator(mode="after")
    def _require_one_rubric(self) -> "EndpointJudge":
        if self.rubric and self.rubric_file:
            raise ValueError("rubric and rubric_file are both set; remove one of them")
        return self


class FunctionJudge(JudgeBase):
    """A Python function score(prompts, responses) that returns one number for each response, higher is better."""

    TEXTS = frozenset({"source"})

    kind: Literal["function"]
    """function: a Python function."""
    function: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
    """MODULE:FUNCTION, such as mine:score: of mine.py next to the params file, else of an installed package."""
    source: str = ""
    """Source of the module; empty is the file next to the params file, which submitting copies here, or an installed package."""
    timeout_seconds: Positive = 600.0
    """Seconds that one call, with all responses, may take."""


KINDS: dict[str, type[BaseConfig]] = {
    "linear": LinearJudge,
    "reward_model": RewardModelJudge,
    "endpoint": EndpointJudge,
    "function": FunctionJudge,
}
KIND_TAG = "judge of kind "  # pydantic puts it between judge and its keys; no key of a params file looks like it


def _kind(value: Any) -> str:
    kind = value.get("kind", "linear") if isinstance(value, dict) else getattr(value, "kind", None)
    return f"{KIND_TAG}{kind}"


def _one_or_several(value: Any) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


Judge = Annotated[
    Annotated[LinearJudge, Tag(f"{KIND_TAG}linear")]
    | Annotated[RewardModelJudge, Tag(f"{KIND_TAG}reward_model")]
    | Annotated[EndpointJudge, Tag(f"{KIND_TAG}endpoint")]
    | Annotated[FunctionJudge, Tag(f"{KIND_TAG}function")],
    Discriminator(
        _kind, custom_error_type="judge_kind", custom_error_message=f"kind is not one of {', '.join(KINDS)}; correct it"
    ),
]
Judges = Annotated[
    Annotated[Judge, Tag("one")] | Annotated[tuple[Judge, ...], Field(max_length=8), Tag("several")],
    Discriminator(_one_or_several),
]


def as_list(judges: Any) -> tuple[LinearJudge | RewardModelJudge | EndpointJudge | FunctionJudge, ...]:
    """The judges of a setting that is one or several. The first one decides at the gate."""
    return judges if isinstance(judges, tuple) else (judges,)


class JudgeStageConfig(BaseConfig):
    model: ModelConfig
    judge: Judges
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
