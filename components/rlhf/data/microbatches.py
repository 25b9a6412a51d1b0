"""Which rows go through a model together.

A model that can pack rows into one sequence (models/packing.py) takes as many as the token budget allows. Any other, such as one with
recurrent layers, takes rows of nearly equal length, so that almost nothing is computed for padding.
"""

import math
from collections.abc import Callable, Sequence

# What one more pass costs, in tokens: weights are read again and gradients added once more. Rows that differ by more never share
# a pass, which keeps padding below 5% at the lengths of conversations.
PASS_TOKENS = 96

Plan = Callable[[Sequence[int], int], list[list[int]]]  # of lengths within max_tokens


def plan_passes(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group the indices of lengths into forward passes with the least padding + PASS_TOKENS x number of passes.

    Each pass, padded to its longest row, has at most max_tokens tokens; a row longer than that forms a pass alone. Every index
    occurs once; passes and the rows in them are in the order of their lengths.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    ordered = [lengths[index] for index in order]
    costs, starts = [0], [0]  # of the cheapest plan for the first n rows: its cost, and where its last pass starts
    for end in range(1, len(ordered) + 1):
        longest, best, best_start = ordered[end - 1], math.inf, end - 1
        for start in range(end - 1, -1, -1):
            size = (end - start) * longest
            # A row that is PASS_TOKENS shorter is no more expensive in a pass of its own.
            if start < end - 1 and (size > max_tokens or longest - ordered[start] >= PASS_TOKENS):
                break
            if costs[start] + size + PASS_TOKENS < best:
                best, best_start = costs[start] + size + PASS_TOKENS, start
        costs.append(int(best))
        starts.append(best_start)
    passes, end = [], len(ordered)
    while end:
        passes.append(order[starts[end] : end])
        end = starts[end]
    return passes[::-1]


def fill_microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indices in the order of lengths, at most max_tokens tokens without padding in each group.

    A row longer than that forms a group alone.
    """
    groups: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if not groups or tokens + lengths[index] > max_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += lengths[index]
    return groups


def split_passes(passes: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """At least count passes of the same rows, as far as there are rows: the pass with the most rows is halved until there are."""
    split = [list(rows) for rows in passes]
    while len(split) < count and any(len(rows) > 1 for rows in split):
        number = max(range(len(split)), key=lambda index: len(split[index]))
        rows = split[number]
        split[number : number + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return split


def equal_passes(
    lengths: Sequence[int], max_tokens: int, max_over_ranks: Callable[[int], int], plan: Plan = plan_passes
) -> list[tuple[list[int], float]]:
    """Passes (indices, weight) of this rank's rows, as many as on the rank with the most: max_over_ranks(n) is that number.

    A rank with fewer rows than passes repeats its shortest row at weight 0.
    """
    passes = plan(lengths, max_tokens)
    count = max_over_ranks(len(passes))
    split = split_passes(passes, count)
    return [(rows, 1.0) for rows in split] + [([split[0][0]], 0.0) for _ in range(count - len(split))]


def deal_rows(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Indices of the rows of each rank: equally many (the last ones may be missing), with nearly equally many tokens.

    Rows are in the order of their lengths, so that rows at the same place of two ranks have nearly the same length.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    # From the longest rows on, each time the longest of world_size rows to the rank with the fewest tokens.
    for end in range(len(order), 0, -world_size):
        rows = order[max(end - world_size, 0) : end]
        for row, rank in zip(reversed(rows), sorted(range(world_size), key=tokens.__getitem__), strict=False):
            ranks[rank].append(row)
            tokens[rank] += lengths[row]
    return [rows[::-1] for rows in ranks]


def local_microbatches(
    lengths: Sequence[int],
    max_tokens: int,
    *,
    rank: int,
    world_size: int,
    max_over_ranks: Callable[[int], int],
    plan: Plan = plan_passes,
) -> list[tuple[list[int], float]]:
    """This rank's microbatches (indices, weight) of one step with rows of these lengths; every rank gets the same number of them.

    A rank without rows of its own runs the shortest row of the step at weight 0.
    """
    own = deal_rows(lengths, world_size)[rank]
    weight = 1.0 if own else 0.0
    rows = own or [min(range(len(lengths)), key=lengths.__getitem__)]
    passes = equal_passes([lengths[row] for row in rows], max_tokens, max_over_ranks, plan)
    return [([rows[index] for index in indices], weight * share) for indices, share in passes]


def computed_tokens(lengths: Sequence[int], passes: Sequence[Sequence[int]], *, pack_limit: int) -> int:
    """Tokens that go through the layers in these passes: with padding, unless all rows of a pass are short enough to be packed."""
    total = 0
    for rows in passes:
        sizes = [lengths[row] for row in rows]
        total += sum(sizes) if max(sizes) <= pack_limit else len(sizes) * max(sizes)
    return total
