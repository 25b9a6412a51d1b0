"""What a training engine and a group of processes must do.

Law of this room: losses into steps. It knows no word of PPO; what is distributed stays behind these protocols.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    grad_norm: float  # before clipping
    learning_rate: float  # of this step


class TrainEngine(Protocol):
    """Owns one trained module with its optimiser. The losses it is given are already divided by their denominator."""

    module: nn.Module

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of one microbatch; last marks the final one of an optimiser step."""
        ...

    def step(self) -> StepInfo: ...

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight whole, by name. All processes call it in the same order."""
        ...

    def snapshot(self) -> dict[str, Tensor]:
        """This process's share of what training goes on from, as copies in main memory: weights, moments, steps done.

        All processes call it; {} where others hold everything. The schedule follows from the steps done.
        """
        ...

    def load(self, directory: Path) -> None:
        """Go on from the snapshots of all processes, in safetensors files `engine-RANK.safetensors`; their number may differ."""
        ...


class Group(Protocol):
    """The processes that train together. All of them call each method in the same order."""

    rank: int
    world_size: int

    def sum(self, x: Tensor) -> Tensor:
        """x [*] added up over all processes."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """The largest x [*] of all processes, element by element."""
        ...

    def max_int(self, n: int) -> int:
        """The largest n of all processes."""
        ...

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, in the order of their ranks."""
        ...

    def barrier(self) -> None: ...

    def watchdog(self, step: str) -> None:
        """From here on the process works on step (for people to read); a step that takes too long ends the process."""
        ...
