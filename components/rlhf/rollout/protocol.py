"""What a rollout engine must do.

Law of this room: prompts into completions. It knows nothing of rewards and advantages.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from components.rlhf.config.model import SamplingSettings
from components.rlhf.data.records import Completion, Prompt


class RolloutEngine(Protocol):
    name: str  # what generates, with its version

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSettings, seeds: Sequence[int]) -> list[Completion]:
        """One completion a prompt. A completion depends on its prompt, its seed and the weights, not on its neighbours."""
        ...

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> int:
        """Take over the trainer's weights; return the new version."""
        ...

    def close(self) -> None: ...
