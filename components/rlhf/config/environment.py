"""Settings of the environment that answers the turns of a response: a tool, a game, a user."""

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from components.rlhf.config.base import BaseConfig, Positive, PositiveInt
from components.rlhf.config.model import SamplingConfig, StopString
from components.rlhf.config.rollout import EngineConfig
from components.rlhf.config.scoring import Function

MAX_STOPS = 8  # of one request
MAX_ENVIRONMENT_BYTES = 12 * 1024  # as JSON: settings are arguments of programs, beside those of rewards or judges


class EnvironmentBase(BaseConfig):
    max_turns: PositiveInt = 4
    """Maximum number of turns of the model in one response; one that the environment has not ended by then counts as truncated."""
    max_observation_tokens: PositiveInt = 64
    """What the environment says in one turn is cut to this many tokens."""


class CalculatorEnvironment(EnvironmentBase):
    """A calculator: <calc>12 * 7</calc> at the end of a turn is answered by its value, and any other turn ends the response."""

    kind: Literal["calculator"]
    """calculator: <calc>12 * 7</calc> at the end of a turn is answered by " = 84" and a line break."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a turn of the model."""
        return ("</calc>",)


class FunctionEnvironment(EnvironmentBase, Function):
    """A Python class of the user with reset(prompt, columns) and step(text) -> (observation, reward, done), in processes of its own."""

    TEXTS = frozenset({"source", "stop"})

    kind: Literal["function"]
    """function: a Python class with reset(prompt, columns) and step(text) -> (observation, reward, done)."""
    function: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
    """MODULE:CLASS, such as mine:Game; every response gets an object of its own."""
    timeout_seconds: Positive = 10.0
    """Seconds that one call of reset or step may take; then the response has failed, and is not learned from."""
    stop: Annotated[tuple[StopString, ...], Field(max_length=MAX_STOPS)] = ()
    """Strings that end a turn of the model, beside those of sampling.stop; the environment reads them as part of the turn."""
    num_processes: Annotated[PositiveInt, Field(le=64)] = 2
    """Number of processes in which the environments of one process of the stage live."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a turn of the model."""
        return self.stop


KINDS: dict[str, type[EnvironmentBase]] = {"calculator": CalculatorEnvironment, "function": FunctionEnvironment}
KIND_TAG = (
    "environment of kind "  # pydantic puts it between environment and its keys; no key of a params file looks like it
)
SECTIONS = {f"{KIND_TAG}{kind}": section for kind, section in KINDS.items()}


def _kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return f"{KIND_TAG}{kind}"


Environment = Annotated[
    Annotated[CalculatorEnvironment, Tag(f"{KIND_TAG}calculator")]
    | Annotated[FunctionEnvironment, Tag(f"{KIND_TAG}function")],
    Discriminator(
        _kind,
        custom_error_type="environment_kind",
        custom_error_message=f"kind is not one of {', '.join(KINDS)}; correct it",
    ),
]


def with_observations(sampling: SamplingConfig, environment: Environment | None) -> SamplingConfig:
    """The sampling settings with max_new_tokens of the longest response, tokens of the environment included, and all stop strings."""
    if environment is None:
        return sampling
    longest = sampling.max_new_tokens + (environment.max_turns - 1) * environment.max_observation_tokens
    stops = tuple(dict.fromkeys((*sampling.stop, *environment.stops)))
    return sampling.model_copy(update={"max_new_tokens": longest, "stop": stops})


def check_environment(
    environment: Environment | None, rollout: EngineConfig, sampling: SamplingConfig, *, keys: tuple[str, str]
) -> None:
    """Raise ValueError for what responses of several turns cannot be sampled with. keys are those of rollout and sampling."""
    if environment is None:
        return
    rollout_key, sampling_key = keys
    if sampling.min_new_tokens:
        raise ValueError(
            f"{sampling_key}.min_new_tokens is {sampling.min_new_tokens}, which would hold for each turn alone with an environment; "
            "set it to 0"
        )
    if rollout.engine == "vllm" and rollout.vllm.tensor_parallel_size > 1:
        raise ValueError(
            f"{rollout_key}.vllm.tensor_parallel_size is {rollout.vllm.tensor_parallel_size}, but with an environment ranks have "
            "different numbers of turns, and those that share an engine must call it equally often; set it to 1"
        )
    size = len(json.dumps(environment.canonical_json()))
    if size > MAX_ENVIRONMENT_BYTES:
        raise ValueError(
            f"the environment takes {size:,} bytes as JSON, and {MAX_ENVIRONMENT_BYTES:,} are possible; put its module into the folder of "
            "code.path"
        )
    stops = len(sampling.stop) + len(environment.stops)
    if stops > MAX_STOPS:
        raise ValueError(
            f"{sampling_key}.stop and the environment have {stops} stop strings together, and {MAX_STOPS} are possible; remove some"
        )
