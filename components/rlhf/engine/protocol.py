"""The protocols of a training engine and of a group of ranks; everything distributed is behind them."""

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


class Saved(Protocol):
    """What a checkpoint has of one part of the training."""

    def snapshot(self, *, moments: bool = True) -> dict[str, Tensor]:
        """This rank's share of the training state (weights, moments, steps done), as copies in main memory.

        Every rank calls it; it is empty if other ranks hold everything. The learning rate follows from the steps done and the peak,
        which is not part of it. Without moments it has what an export needs.
        """
        ...

    def load(self, directory: Path) -> None:
        """Load the snapshots of all ranks from `engine-RANK.safetensors`; the number of ranks may differ.

        Moments that they do not have start at zero, as at the first step.
        """
        ...


class TrainEngine(Saved, Protocol):
    """Owns one trained module and its optimizer. Losses are already divided by their denominator."""

    module: nn.Module
    peak: float  # learning rate that the schedule reaches after its warm-up; may be changed between steps

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of one microbatch; last marks the final one of an optimizer step."""
        ...

    def step(self) -> StepInfo: ...

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight, whole, by name. Every rank calls it, in the same order."""
        ...


class Group(Protocol):
    """The ranks that train together. All of them call each method in the same order."""

    rank: int
    world_size: int

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum of x [*] over all ranks."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum of x [*] over all ranks."""
        ...

    def max_int(self, n: int) -> int:
        """Maximum of n over all ranks."""
        ...

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all ranks, in the order of the ranks."""
        ...

    def barrier(self) -> None: ...

    def watchdog(self, step: str | None) -> None:
        """Start the time limit of a step, whose name is shown if it expires; then the process is ended. None: no limit."""
        ...
