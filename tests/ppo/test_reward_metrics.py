"""Metrics of each reward, by hand and over ranks."""

import statistics
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from components.ppo.reward_metrics import reward_metrics
from components.rlhf.engine.group import SingleProcess

PARTS = {"maths": [0.0, 1.0, 1.0, 0.0], "length": [-0.5, 0.0, 0.0, -1.0]}
WEIGHTS = {"maths": 4.0, "length": -1.0}


def test_by_hand() -> None:
    parts = {name: torch.tensor(scores) for name, scores in PARTS.items()}
    counts = {"maths/failed": 1.0}
    assert reward_metrics(parts, WEIGHTS, reward_clip=3.0, counts=counts) == {
        "reward/maths/mean": 0.5,
        "reward/maths/std": 0.5,
        "reward/maths/clipped_fraction": 0.5,  # 4 x 1 is beyond 3
        "reward/length/mean": -0.375,
        "reward/length/std": pytest.approx(statistics.pstdev(PARTS["length"])),
        "reward/length/clipped_fraction": 0.0,
        "reward/maths/failed": 1.0,
    }


def test_nothing_is_clipped_without_a_limit() -> None:
    names = set(reward_metrics({"a": torch.tensor([1.0])}, {"a": 1.0}, reward_clip=None))
    assert names == {"reward/a/mean", "reward/a/std"}


class ThreadGroup(SingleProcess):
    """Ranks that are threads."""

    world_size = 2

    def __init__(self) -> None:
        self.barrier_, self.parts = threading.Barrier(2), [torch.zeros(0)] * 2
        self.local = threading.local()

    def sum(self, x: Tensor) -> Tensor:
        self.parts[self.local.rank] = x
        self.barrier_.wait()
        total = self.parts[0] + self.parts[1]
        self.barrier_.wait()
        return total


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_ranks_with_unequal_shares_get_the_numbers_of_the_whole(cut: int) -> None:
    group = ThreadGroup()

    def work(rank: int) -> dict[str, float]:
        group.local.rank = rank
        rows = slice(cut) if rank == 0 else slice(cut, None)
        parts = {name: torch.tensor(scores[rows]) for name, scores in PARTS.items()}
        counts = {"maths/failed": float(rank), "length/failed": 2.0}
        return reward_metrics(parts, WEIGHTS, reward_clip=3.0, counts=counts, group=group)

    with ThreadPoolExecutor(2) as executor:
        first, second = executor.map(work, (0, 1))
    whole = reward_metrics({name: torch.tensor(scores) for name, scores in PARTS.items()}, WEIGHTS, reward_clip=3.0)
    assert first == second == pytest.approx(whole | {"reward/maths/failed": 1.0, "reward/length/failed": 4.0})
