"""Settings of the rewards of PPO: one or several, each with its weight in their sum."""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from components.rlhf.config.base import BaseConfig, Count, Positive, PositiveInt
from components.rlhf.config.scoring import (
    Column,
    Command,
    Concurrency,
    Endpoint,
    ExactMatch,
    Function,
    JsonSchema,
    Name,
    Numeric,
    Regex,
    Retries,
    Variable,
    http_url,
)

# As JSON: Linux allows 128 KiB for an argument, and KFP passes settings twice.
MAX_REWARDS_BYTES = 48 * 1024


class RewardBase(BaseConfig):
    name: Name | None = None
    """Name in metrics (reward/NAME/mean) and messages; null is its kind."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor of its score in the sum of all rewards; negative for a penalty, 0 to log it alone."""

    @property
    def title(self) -> str:
        kind: str = getattr(self, "kind")  # noqa: B009 - every subclass has one
        return self.name or kind


class RewardModelReward(RewardBase):
    """The reward model of the run, trained or imported (section reward_model)."""

    kind: Literal["reward_model"] = "reward_model"
    """reward_model: the reward model of the run; there may be one."""


class FunctionReward(Function, RewardBase):
    """A Python function score(prompts, responses) or score(prompts, responses, columns): one number for each response."""


class ExactMatchReward(ExactMatch, RewardBase):
    """1 if the response is the text of a column of the data, else 0."""


class RegexReward(Regex, RewardBase):
    """1 if a regular expression is found in the response or extracts the text of a column, else 0."""


class NumericReward(Numeric, RewardBase):
    """1 if the last number or formula of the response has the value of a column, else 0."""


class JsonSchemaReward(JsonSchema, RewardBase):
    """1 if the response is JSON that satisfies a schema, else 0."""


class CommandReward(Command, RewardBase):
    """The exit code or the printed number of a command of the user."""


class EndpointReward(Endpoint, RewardBase):
    """The grade, 0 to 10, that a language model gives by a rubric, divided by 10."""


class HttpReward(RewardBase):
    """A reward server: POST {query, prompts, responses, labels, columns, ids} -> {rewards: [...]}, as OpenRLHF's remote reward models."""

    kind: Literal["http"]
    """http: a reward server of your own."""
    url: str
    """URL that batches are posted to, such as http://rewards.models:5000/get_reward."""
    column: Column | None = None
    """Column of the data that is sent as labels; null sends empty labels. All columns are sent as columns in any case."""
    token_variable: Variable | None = None
    """Environment variable with the bearer token, on a cluster a key of the Secret cluster.secrets.judge; null is none."""
    batch_size: PositiveInt = 64
    """Number of responses in one request."""
    max_concurrency: Concurrency = 4
    """Maximum number of requests at a time, in each process of the stage."""
    timeout_seconds: Positive = 120.0
    """Seconds after which a request without an answer has failed."""
    max_retries: Retries = 6
    """Number of retries of a failed request, with waits that double from 1 second to 60."""

    @field_validator("url")
    @classmethod
    def _require_http(cls, url: str) -> str:
        return http_url(url, example="http://HOST:5000/get_reward")


class LengthReward(RewardBase):
    """0 for lengths from min_tokens to max_tokens - buffer; outside it falls linearly to -1 over buffer tokens (DAPO, Yu et al. 2025)."""

    kind: Literal["length"]
    """length: a penalty for responses that are too long or too short."""
    max_tokens: PositiveInt | None = None
    """Length with the penalty -1, in tokens; null is ppo.rollout.sampling.max_new_tokens."""
    min_tokens: Count = 0
    """Shortest length without a penalty, in tokens."""
    buffer: PositiveInt
    """Number of tokens over which the penalty rises from 0 to 1."""


class RepetitionReward(RewardBase):
    """Minus the fraction of the response's n-grams of tokens that have occurred in it before, from 0 to -1."""

    kind: Literal["repetition"]
    """repetition: a penalty for n-grams of tokens that repeat."""
    ngram: PositiveInt = 4
    """Length of the n-grams, in tokens."""


class EnvironmentReward(RewardBase):
    """The sum of the rewards that the environment (ppo.environment) gives in the turns of a response."""

    kind: Literal["environment"]
    """environment: the sum of the rewards of the environment's steps."""


KINDS: dict[str, type[RewardBase]] = {
    "reward_model": RewardModelReward,
    "function": FunctionReward,
    "http": HttpReward,
    "exact_match": ExactMatchReward,
    "regex": RegexReward,
    "numeric": NumericReward,
    "json_schema": JsonSchemaReward,
    "command": CommandReward,
    "length": LengthReward,
    "repetition": RepetitionReward,
    "endpoint": EndpointReward,
    "environment": EnvironmentReward,
}
KIND_TAG = (
    "reward of kind "  # pydantic puts it between rewards.NUMBER and its keys; no key of a params file looks like it
)
SECTIONS = {f"{KIND_TAG}{kind}": section for kind, section in KINDS.items()}


def _kind(value: Any) -> str:
    kind = value.get("kind", "reward_model") if isinstance(value, dict) else getattr(value, "kind", None)
    return f"{KIND_TAG}{kind}"


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


Reward = Annotated[
    Annotated[RewardModelReward, Tag(f"{KIND_TAG}reward_model")]
    | Annotated[FunctionReward, Tag(f"{KIND_TAG}function")]
    | Annotated[HttpReward, Tag(f"{KIND_TAG}http")]
    | Annotated[ExactMatchReward, Tag(f"{KIND_TAG}exact_match")]
    | Annotated[RegexReward, Tag(f"{KIND_TAG}regex")]
    | Annotated[NumericReward, Tag(f"{KIND_TAG}numeric")]
    | Annotated[JsonSchemaReward, Tag(f"{KIND_TAG}json_schema")]
    | Annotated[CommandReward, Tag(f"{KIND_TAG}command")]
    | Annotated[LengthReward, Tag(f"{KIND_TAG}length")]
    | Annotated[RepetitionReward, Tag(f"{KIND_TAG}repetition")]
    | Annotated[EndpointReward, Tag(f"{KIND_TAG}endpoint")]
    | Annotated[EnvironmentReward, Tag(f"{KIND_TAG}environment")],
    Discriminator(
        _kind,
        custom_error_type="reward_kind",
        custom_error_message=f"kind is not one of {', '.join(KINDS)}; correct it",
    ),
]
Rewards = Annotated[tuple[Reward, ...], BeforeValidator(_as_list), Field(max_length=16)]


def uses_reward_model(rewards: tuple[Reward, ...]) -> bool:
    """Whether a run with these rewards needs a reward model to score responses."""
    return any(isinstance(reward, RewardModelReward) for reward in rewards)


def check_rewards(rewards: tuple[Reward, ...], max_new_tokens: int, *, has_environment: bool) -> None:
    """Raise ValueError for rewards that contradict each other, the longest response or the environment; keys are those below ppo."""
    names = [reward.title for reward in rewards]
    if not rewards:
        raise ValueError("rewards is an empty list; name a reward, or remove it for the trained reward model")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two rewards are named {name}; give them different names (rewards.NUMBER.name)")
    if sum(isinstance(reward, RewardModelReward) for reward in rewards) > 1:
        raise ValueError("rewards has two reward models, and there can be one; remove one of them")
    if all(reward.weight == 0 for reward in rewards):
        raise ValueError("every reward has the weight 0, so nothing is learned; raise a weight")
    for number, reward in enumerate(rewards):
        if isinstance(reward, EnvironmentReward) and not has_environment:
            raise ValueError(
                f"rewards.{number} is the reward of the environment, and there is none; set environment, or remove the reward"
            )
        if isinstance(reward, LengthReward):
            _check_length(f"rewards.{number}", reward, max_new_tokens)
    size = sum(len(json.dumps(reward.canonical_json())) for reward in rewards)
    if size > MAX_REWARDS_BYTES:
        raise ValueError(
            f"the rewards take {size:,} bytes as JSON, and {MAX_REWARDS_BYTES:,} are possible; shorten rubrics and schemas, or install "
            "the modules of functions where the stages run"
        )


def _check_length(key: str, reward: LengthReward, max_new_tokens: int) -> None:
    longest = reward.max_tokens or max_new_tokens
    free = longest - reward.buffer
    if free < reward.min_tokens:
        raise ValueError(
            f"{key} leaves no length without a penalty: max_tokens {longest} - buffer {reward.buffer} is below min_tokens "
            f"{reward.min_tokens}; lower buffer or min_tokens"
        )
    if free >= max_new_tokens and not reward.min_tokens:
        raise ValueError(
            f"{key} never penalizes: responses have at most {max_new_tokens} tokens (rollout.sampling.max_new_tokens), and the penalty "
            f"starts above {free}; lower max_tokens"
        )
