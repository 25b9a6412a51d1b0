from collections.abc import Sequence
from typing import Any

import pytest

from components.rlhf.engine.group import SINGLE_PROCESS, SingleProcess
from components.rlhf.engine.shares import over_ranks


class Rank(SingleProcess):
    """One rank of several that run one after the other: gather() keeps its items, and gives what is known of all ranks."""

    def __init__(self, rank: int, world_size: int, known: dict[int, list[Any]]) -> None:
        self.rank, self.world_size, self.known = rank, world_size, known

    def gather(self, items: Sequence[Any]) -> list[Any]:
        self.known[self.rank] = list(items)
        return [item for rank in sorted(self.known) for item in self.known[rank]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
def test_every_rank_gets_all_results_in_order_and_each_item_is_computed_once(world_size: int, count: int) -> None:
    known: dict[int, list[Any]] = {}
    items = [f"item {n}" for n in range(count)]
    computed: list[list[str]] = []

    def work(own: list[str]) -> list[str]:
        computed.append(own)
        return [item.upper() for item in own]

    for _ in range(2):  # the first time, gather() does not know the ranks that come later
        computed.clear()
        results = [over_ranks(Rank(rank, world_size, known), items, work) for rank in range(world_size)]
    assert results == [[item.upper() for item in items]] * world_size
    assert all(computed)  # every rank works, because work may be collective
    assert sorted(item for own in computed[:count] for item in own) == sorted(items)
    assert computed[count:] == [["item 0"]] * max(world_size - count, 0)
    sizes = [len(own) for own in computed]
    assert max(sizes) - min(sizes) <= 1


def test_nothing_is_computed_for_no_items() -> None:
    assert over_ranks(SINGLE_PROCESS, [], lambda own: pytest.fail("called")) == []
