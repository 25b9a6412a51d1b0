"""Which rank holds which whole tensor of a checkpoint."""

from collections.abc import Mapping


def split_evenly(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """The rank of each item, so that no rank has more than an equal share and one item: the largest first, to whom has the least."""
    totals, owners = [0] * num_ranks, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = totals.index(min(totals))
        totals[owners[name]] += sizes[name]
    return owners
