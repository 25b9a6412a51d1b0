"""Work on independent items, shared by the ranks of a group."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TypeVar

from components.rlhf.engine.protocol import Group

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_ranks(group: Group, items: Sequence[Item], work: Callable[[list[Item]], Sequence[Result]]) -> list[Result]:
    """The results of work(items), one per item and in their order, of which each rank computes a share. Every rank gets all of them.

    A result must depend on its item alone. Every rank calls this with the same items, and work once if there are any: a rank that
    would have none repeats the first one, because work may be collective.
    """
    if not items:
        return []
    own = list(range(group.rank, len(items), group.world_size))
    results = work([items[index] for index in own or [0]])
    # Not strict: the result of a repeated item belongs to another rank.
    found = group.gather([(index, result) for index, result in zip(own, results, strict=False)])
    return [result for _, result in sorted(found, key=itemgetter(0))]
