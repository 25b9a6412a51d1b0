"""Optimizer steps that ranks share. Each rank is run in turn, and the sums of all are compared with a single process."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from components.rlhf.engine.group import SingleProcess
from components.rlhf.engine.protocol import StepInfo
from components.rlhf.runtime.training import Batches, token_counts, train_on_batches
from tests.support.training import Recorder, context_of

LENGTHS = [7, 2, 5, 3, 8, 1, 6]
BATCHES = Batches(records="records", lengths=LENGTHS, steps=[[0, 1, 2, 3, 4], [5], [6, 0]], max_tokens=8)


class GradientSum:
    """A training engine that adds up the losses it is given, and counts the passes of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = [0.0]
        self.passes: list[int] = [0]

    def backward(self, loss: Tensor, last: bool) -> None:
        self.losses[-1] += loss.item()
        self.passes[-1] += 1

    def step(self) -> StepInfo:
        self.losses.append(0.0)
        self.passes.append(0)
        return StepInfo(grad_norm=1.0, learning_rate=1.0)


class OneOf(SingleProcess):
    """One rank of several; every rank has as many microbatches as the batch has records."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def max_int(self, n: int) -> int:
        return max(n, 5)


def shares_of(rows: Sequence[int], batch: Sequence[int]) -> dict[str, Tensor]:
    """A loss that is the mean length of a batch, and the number of records as a metric."""
    lengths = [LENGTHS[i] for i in rows]
    shares = {"loss": torch.tensor(sum(lengths) / len(batch)), "records": torch.tensor(float(len(rows)))}
    return shares | token_counts(lengths, [range(len(rows))], pack_limit=0)


def train(rank: int, world_size: int) -> tuple[GradientSum, dict[int, dict[str, float]]]:
    context = replace(context_of("sft"), group=OneOf(rank, world_size))
    engine = GradientSum()
    train_on_batches(context, "model", engine, BATCHES, shares_of)  # type: ignore[arg-type]
    assert isinstance(context.tracker, Recorder)
    return engine, context.tracker.rows


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_together_take_every_record_once(world_size: int) -> None:
    ranks = [train(rank, world_size) for rank in range(world_size)]
    for step, batch in enumerate(BATCHES.steps, start=1):
        mean = sum(LENGTHS[i] for i in batch) / len(batch)
        assert sum(engine.losses[step - 1] for engine, _ in ranks) == pytest.approx(mean)
        assert sum(rows[step]["train/loss"] for _, rows in ranks) == pytest.approx(mean)
        assert sum(rows[step]["train/records"] for _, rows in ranks) == len(batch)


def test_every_rank_runs_the_same_number_of_passes() -> None:
    assert {tuple(train(rank, 8)[0].passes) for rank in range(8)} == {(5, 5, 5, 0)}


def test_computed_per_real_token_counts_padding() -> None:
    context = context_of("sft")
    train_on_batches(context, "model", GradientSum(), replace(BATCHES, max_tokens=9999), shares_of)  # type: ignore[arg-type]
    assert isinstance(context.tracker, Recorder)
    for step, batch in enumerate(BATCHES.steps, start=1):
        lengths = [LENGTHS[i] for i in batch]  # all of them share a pass
        padded = len(lengths) * max(lengths) / sum(lengths)
        assert context.tracker.rows[step]["train/computed_per_real_token"] == pytest.approx(padded)


def test_counts_of_tokens_join_losses_on_another_device() -> None:
    """The counts are on the CPU; a model on a GPU has its losses there."""
    context = context_of("sft")
    context = replace(context, group=OnDevice())

    def shares(rows: Sequence[int], batch: Sequence[int]) -> dict[str, Tensor]:
        return shares_of(rows, batch) | {"loss": torch.zeros((), device="meta")}

    engine = GradientSum()
    engine.backward = lambda loss, last: None  # type: ignore[method-assign]
    train_on_batches(context, "model", engine, BATCHES, shares)  # type: ignore[arg-type]
    assert OnDevice.devices == {"meta"}


class OnDevice(SingleProcess):
    devices: ClassVar[set[str]] = set()

    def sum(self, x: Tensor) -> Tensor:
        self.devices.add(x.device.type)
        return torch.ones(x.shape)
