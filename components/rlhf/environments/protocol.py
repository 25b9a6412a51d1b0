"""The interface of environments, and of what keeps one for each response."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from components.rlhf.data.records import Prompt


@dataclass(frozen=True, kw_only=True)
class Step:
    """What an environment makes of one turn of the model."""

    observation: str = ""  # text that continues the response, exactly as it is
    reward: float = 0.0  # of this turn; finite
    done: bool = False  # the response is over; its observation is not added
    failure: str = ""  # why there is none of this, as part of a sentence


class Environment(Protocol):
    """The environment of one response."""

    def reset(self, prompt: str, columns: Mapping[str, str]) -> None:
        """Begin with a prompt and its columns (data.prompts.keep). Called once, before the first step."""
        ...

    def step(self, text: str) -> tuple[str, float, bool]:
        """The observation, the reward and whether the response is over, after a turn of the model.

        text is all that the model has written in this turn, with the stop string that ended it, if one did.
        """
        ...


class Host(Protocol):
    """Keeps the environments of the responses that are being played, by number."""

    def reset(self, prompts: Mapping[int, Prompt]) -> dict[int, str]:
        """Begin an environment for each number; the failures of those that do not begin."""
        ...

    def step(self, texts: Mapping[int, str]) -> dict[int, Step]:
        """What each environment makes of a turn."""
        ...

    def end(self, numbers: Sequence[int]) -> None:
        """Forget these environments."""
        ...

    def close(self) -> None: ...


TIMED_OUT = "timed out"  # how the failure of an environment that takes too long begins
