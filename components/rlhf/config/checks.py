"""Settings of the checks beside the judge, each with bounds that the policy must keep to be promoted."""

import datetime
import json
from math import ceil
from statistics import NormalDist
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from components.rlhf.config.base import BaseConfig, Confidence, Count, Fraction, NonNegative, PositiveInt
from components.rlhf.config.code import Digest
from components.rlhf.config.model import ModelConfig, SamplingConfig, Seed
from components.rlhf.config.policy import Method
from components.rlhf.config.scoring import Endpoint, Name, require_regular_expression

# Of all checks as JSON: Linux allows 128 KiB for an argument, KFP passes settings twice, and notify gets them with all others.
MAX_CHECKS_BYTES = 32 * 1024
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$", max_length=200)]


class CheckBase(BaseConfig):
    name: Name | None = None
    """Name in reports, metrics and the reason of the gate; null is its kind."""

    @property
    def title(self) -> str:
        kind: str = getattr(self, "kind")  # noqa: B009 - every subclass has one
        return self.name or kind


class PerplexityCheck(CheckBase):
    """Mean negative log-likelihood of the answers of held-out demonstrations, in nats per token; perplexity is its exponential."""

    kind: Literal["perplexity"]
    """perplexity: negative log-likelihood of held-out demonstrations."""
    num_texts: PositiveInt = 256
    """Maximum number of held-out demonstrations."""
    max_increase: NonNegative
    """Most that it may rise above the SFT model's, in nats per token; the upper end of the interval counts."""

    @property
    def bounds(self) -> dict[str, float]:
        return {"max_increase": self.max_increase}


class Grader(Endpoint):
    """A language model that grades each response from 0 to 10 by a rubric."""

    kind: Literal["endpoint"] = "endpoint"
    """endpoint: a language model behind an OpenAI-compatible API, the only kind."""


class PromptsCheck(CheckBase):
    """Fraction of prompts, such as a safety set, whose response is a hit: a pattern is found in it, or a language model grades it well."""

    TEXTS: ClassVar[frozenset[str]] = frozenset({"prompts"})

    kind: Literal["prompts"]
    """prompts: both models answer prompts of your own, and the fraction of hits is bounded."""
    prompts_file: str | None = None
    """File with the prompts, relative to the params file: JSONL with the field prompt, or one prompt per line."""
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """The prompts themselves. Loading a params file reads them from prompts_file."""
    pattern: Annotated[str, Field(min_length=1)] | None = None
    """A response is a hit if this regular expression of Python's re is found in it; (?i) ignores case."""
    endpoint: Grader | None = None
    """A response is a hit if this model gives it at least threshold; the rubric says what gets 10."""
    threshold: Annotated[float, Field(gt=0, le=10)] = 5.0
    """Least grade of a hit, from 0 to 10."""
    sampling: Literal["greedy", "evaluation"] = "greedy"
    """greedy takes the most probable token, evaluation samples as the evaluation does; both stop as it does."""
    min_rate: Fraction | None = None
    """Least fraction of hits of the policy; the lower end of its interval counts."""
    max_rate: Fraction | None = None
    """Largest fraction of hits of the policy; the upper end of its interval counts."""
    max_increase: Fraction | None = None
    """Most that the fraction may rise above the SFT model's; the upper end of the interval counts."""
    max_decrease: Fraction | None = None
    """Most that the fraction may fall below the SFT model's; the lower end of the interval counts."""

    @model_validator(mode="after")
    def _require_one_of_each(self) -> "PromptsCheck":
        if bool(self.prompts_file) == bool(self.prompts):
            raise ValueError("set one of prompts_file and prompts")
        if (self.pattern is None) == (self.endpoint is None):
            raise ValueError("set one of pattern and endpoint, which says what a hit is")
        if self.pattern is not None:
            require_regular_expression(self.pattern)
        if self.endpoint and not (self.endpoint.rubric or self.endpoint.rubric_file):
            raise ValueError("endpoint has no rubric; say what gets 10 and what gets 0 in rubric or rubric_file")
        if self.endpoint is None and self.threshold != PromptsCheck.model_fields["threshold"].default:
            raise ValueError("threshold is the least grade of a hit, and nothing is graded without endpoint; remove it")
        if not self.bounds:
            raise ValueError("it has no bound; set one of min_rate, max_rate, max_increase and max_decrease")
        if len(set(self.prompts)) < len(self.prompts):
            raise ValueError("a prompt is there twice, which would make the interval too narrow; remove one of them")
        return self

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are set, by their names."""
        values = {name: getattr(self, name) for name in ("min_rate", "max_rate", "max_increase", "max_decrease")}
        return {name: value for name, value in values.items() if value is not None}


class LmEvalCheck(CheckBase):
    """Tasks of lm-evaluation-harness (extra evals), offline: tasks of your own, or those whose data are in the cache of the machine."""

    kind: Literal["lm_eval"]
    """lm_eval: tasks of lm-evaluation-harness."""
    tasks: Annotated[tuple[TaskName, ...], Field(min_length=1, max_length=32)]
    """Names of tasks; of a group every task counts."""
    include_path: Annotated[str, Field(pattern=r"^[^/\\]")] | None = None
    """Folder in code.path with tasks of your own, . for all of it; the paths of their data are relative to code.path."""
    metric: Annotated[str, Field(pattern=r"^[\w-]+(,[\w-]+)?$")] = "acc"
    """Metric of the tasks, a mean over their samples: NAME, or NAME,FILTER where a task has several filters."""
    num_fewshot: Count | None = None
    """Number of examples in the prompt; null is that of the task."""
    limit: PositiveInt | None = None
    """Use only the first samples of each task; null uses all."""
    batch_size: PositiveInt = 8
    """Number of samples that are computed at once."""
    max_drop: NonNegative
    """Most that the metric may be worse than the SFT model's; the worst end of the interval counts."""

    @property
    def bounds(self) -> dict[str, float]:
        return {"max_drop": self.max_drop}


KINDS: dict[str, type[CheckBase]] = {"perplexity": PerplexityCheck, "prompts": PromptsCheck, "lm_eval": LmEvalCheck}
KIND_TAG = (
    "check of kind "  # pydantic puts it between gate.checks.NUMBER and its keys; no key of a params file looks like it
)
SECTIONS = {f"{KIND_TAG}{kind}": section for kind, section in KINDS.items()}


def _kind(value: Any) -> str:
    return f"{KIND_TAG}{value.get('kind') if isinstance(value, dict) else getattr(value, 'kind', None)}"


Check = Annotated[
    Annotated[PerplexityCheck, Tag(f"{KIND_TAG}perplexity")]
    | Annotated[PromptsCheck, Tag(f"{KIND_TAG}prompts")]
    | Annotated[LmEvalCheck, Tag(f"{KIND_TAG}lm_eval")],
    Discriminator(
        _kind, custom_error_type="check_kind", custom_error_message=f"kind is not one of {', '.join(KINDS)}; correct it"
    ),
]
Checks = Annotated[tuple[Check, ...], Field(max_length=16)]


class ChecksStageConfig(BaseConfig):
    stage_name: Literal["checks", "ppo_checks"] = "checks"  # of two tasks in one run, the last one
    method: Method = "ppo"  # that has trained the policy
    model: ModelConfig
    checks: Checks
    sampling: SamplingConfig
    template_date: datetime.date = datetime.date(2025, 1, 1)
    num_bootstrap: PositiveInt = 2000
    confidence: Confidence = 0.95
    code_digest: Digest = ""
    seed: Seed

    @model_validator(mode="after")
    def _check_checks(self) -> "ChecksStageConfig":
        check_checks(self.checks, self.confidence, key="checks")
        return self


def check_checks(checks: tuple[Check, ...], confidence: float, *, key: str) -> None:
    """Raise ValueError for checks of one name, too much text, and bounds that no policy can keep."""
    names = [check.title for check in checks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two checks are named {name}; give them different names ({key}.NUMBER.name)")
    for number, check in enumerate(checks):
        if isinstance(check, PromptsCheck) and check.prompts:
            _require_reachable(f"{key}.{number}", check, confidence)
    size = sum(len(json.dumps(check.canonical_json())) for check in checks)
    if size > MAX_CHECKS_BYTES:
        raise ValueError(
            f"{key} take {size:,} bytes as JSON, and {MAX_CHECKS_BYTES:,} are possible; shorten the prompts and rubrics, or use a sample "
            "of the prompts"
        )


def check_inputs_of_checks(checks: tuple[Check, ...], *, has_demonstrations: bool, has_code: bool) -> None:
    """Raise ValueError for checks of a run that lacks what they read."""
    for number, check in enumerate(checks):
        key = f"gate.checks.{number}"
        if isinstance(check, PerplexityCheck) and not has_demonstrations:
            raise ValueError(
                f"{key} measures the perplexity of held-out demonstrations, and there are none; set data.demonstrations"
            )
        if isinstance(check, LmEvalCheck) and check.include_path and not has_code:
            raise ValueError(
                f"{key}.include_path is a folder in code.path, which is not set; set code.path to a folder that contains it"
            )


def _require_reachable(key: str, check: PromptsCheck, confidence: float) -> None:
    """Raise ValueError for a bound that rejects every policy, because its interval is too wide for it with so few prompts.

    With n hits of n prompts, Wilson's interval ends at n / (n + z^2), and with equal answers that of a difference at z / (n + 2).
    """
    z, num = NormalDist().inv_cdf(0.5 + confidence / 2), len(check.prompts)
    best = num / (num + z**2)
    wanted = {
        "min_rate": check.min_rate,
        "max_rate": None if check.max_rate is None else 1 - check.max_rate,
    }
    for name, rate in wanted.items():
        if rate is not None and rate > best:
            needed = f"; give at least {-int(-(z**2) * rate // (1 - rate))} prompts" if rate < 1 else ""
            raise ValueError(
                f"{key}.{name} is {getattr(check, name):g}, which no policy can keep: with {num} prompts the interval of a model "
                f"without a single exception ends at {best if name == 'min_rate' else 1 - best:.3f}{needed or '; relax it'}"
            )
    for name in ("max_increase", "max_decrease"):
        limit = getattr(check, name)
        if limit is not None and limit < z / (num + 2):
            needed = f"; give at least {ceil(z / limit - 2)} prompts" if limit > 0 else "; relax it"
            raise ValueError(
                f"{key}.{name} is {limit:g}, which no policy can keep: with {num} prompts the interval of two models with the same answers "
                f"ends at {z / (num + 2):.3f}{needed}"
            )
