"""Plans of forward passes: the least padding within the token budget, and equal shares for all ranks."""

import itertools
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.rlhf.data.microbatches import (
    PASS_TOKENS,
    computed_tokens,
    deal_rows,
    equal_passes,
    fill_microbatches,
    local_microbatches,
    plan_passes,
    split_passes,
)

LENGTHS = st.lists(st.integers(1, 400), max_size=40)


def chat_lengths(number: int, seed: int) -> list[int]:
    """Lengths of conversations: most are short, a few are very long (mean about 540, at most 2048)."""
    draw = random.Random(seed)
    return [min(2048, max(16, int(draw.lognormvariate(6.0, 0.8)))) for _ in range(number)]


def cost(lengths: list[int], passes: list[list[int]]) -> int:
    return sum(len(rows) * max(lengths[row] for row in rows) + PASS_TOKENS for rows in passes)


def cheapest_partition(lengths: list[int], budget: int) -> int:
    """The least cost over all partitions of the rows into passes, contiguous in length or not."""
    if not lengths:
        return 0
    first, rest = 0, range(1, len(lengths))
    best = None
    for size in range(len(lengths)):
        for others in itertools.combinations(rest, size):
            rows = (first, *others)
            padded = len(rows) * max(lengths[row] for row in rows)
            if len(rows) > 1 and padded > budget:
                continue
            remaining = [lengths[row] for row in rest if row not in others]
            total = padded + PASS_TOKENS + cheapest_partition(remaining, budget)
            best = total if best is None else min(best, total)
    assert best is not None
    return best


def test_rows_of_similar_length_share_a_pass() -> None:
    assert plan_passes([10, 500, 12, 505, 11], 4096) == [[0, 4, 2], [1, 3]]
    assert plan_passes([10, 10 + PASS_TOKENS], 4096) == [[0], [1]]
    assert plan_passes([10, 9 + PASS_TOKENS], 4096) == [[0, 1]]
    assert plan_passes([5, 5, 5], 10) == [[0, 1], [2]]  # within the budget
    assert plan_passes([11, 1], 10) == [[1], [0]]  # longer than the budget: a pass alone
    assert plan_passes([], 10) == []


@settings(max_examples=200)
@given(LENGTHS, st.integers(1, 2000))
def test_plan_covers_each_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    passes = plan_passes(lengths, budget)
    assert sorted(row for rows in passes for row in rows) == list(range(len(lengths)))
    for rows in passes:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= budget
        assert max(lengths[row] for row in rows) - min(lengths[row] for row in rows) < PASS_TOKENS


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([1, 20, 60, 90, 100, 150, 180, 250, 400]), max_size=6),
    st.sampled_from([1, 300, 500, 9999]),
)
def test_plan_is_the_cheapest_of_all_partitions(lengths: list[int], budget: int) -> None:
    assert cost(lengths, plan_passes(lengths, budget)) == cheapest_partition(lengths, budget)


@pytest.mark.parametrize("rows", [8, 16, 32, 64, 128, 512])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_conversations_are_computed_with_at_most_5_percent_of_padding(rows: int, world_size: int) -> None:
    real = computed = 0
    for seed in range(20):
        lengths = chat_lengths(rows * world_size, seed)
        counts = [len(plan_passes([lengths[i] for i in own], 4096)) for own in deal_rows(lengths, world_size)]
        most = max(counts)
        for rank in range(world_size):
            parts = local_microbatches(
                lengths, 4096, rank=rank, world_size=world_size, max_over_ranks=lambda _, most=most: most
            )
            computed += computed_tokens(lengths, [indices for indices, _ in parts], pack_limit=0)
        real += sum(lengths)
    assert computed / real <= 1.05


@settings(max_examples=100)
@given(LENGTHS.filter(len), st.integers(1, 60))
def test_splitting_keeps_all_rows_and_reaches_the_count_if_there_are_rows(lengths: list[int], count: int) -> None:
    passes = plan_passes(lengths, 4096)
    split = split_passes(passes, count)
    assert sorted(row for rows in split for row in rows) == list(range(len(lengths)))
    assert len(split) == max(len(passes), min(count, len(lengths)))
    assert computed_tokens(lengths, split, pack_limit=0) <= computed_tokens(lengths, passes, pack_limit=0)


def test_rank_with_fewer_rows_than_passes_repeats_its_shortest_row_without_weight() -> None:
    assert equal_passes([7, 3], 4096, lambda _: 4) == [([1], 1.0), ([0], 1.0), ([1], 0.0), ([1], 0.0)]


@settings(max_examples=200)
@given(LENGTHS, st.integers(1, 5))
def test_dealt_rows_are_equally_many_and_balanced(lengths: list[int], world_size: int) -> None:
    ranks = deal_rows(lengths, world_size)
    assert sorted(row for rows in ranks for row in rows) == list(range(len(lengths)))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    assert all(rows == sorted(rows, key=lambda row: (lengths[row], row)) for rows in ranks)
    # Ranks never drift apart by more than the longest row.
    tokens = [sum(lengths[row] for row in rows) for rows in ranks]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_get_nearly_equal_work_from_conversations(world_size: int) -> None:
    gaps = []
    for seed in range(20):
        lengths = chat_lengths(16 * world_size, seed)
        tokens = [sum(lengths[row] for row in rows) for rows in deal_rows(lengths, world_size)]
        gaps.append(max(tokens) / statistics.mean(tokens))
    assert statistics.mean(gaps) < 1.03  # in the order of the rows it would be 1.2 to 1.5


@pytest.mark.parametrize("world_size", [2, 4])
def test_rows_at_the_same_place_of_two_ranks_have_similar_lengths(world_size: int) -> None:
    lengths = chat_lengths(64 * world_size, 0)
    ranks = deal_rows(lengths, world_size)
    ordered = sorted(lengths)
    for place, rows in enumerate(zip(*ranks, strict=True)):
        assert {lengths[row] for row in rows} <= set(ordered[place * world_size : (place + 1) * world_size])


@settings(max_examples=200)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=20), st.integers(1, 5), st.integers(1, 900))
def test_ranks_get_equally_many_microbatches_of_a_step(lengths: list[int], world_size: int, max_tokens: int) -> None:
    counts: list[int] = []
    for rank in range(world_size):  # what each rank asks for, as a collective operation would learn it
        local_microbatches(
            lengths, max_tokens, rank=rank, world_size=world_size, max_over_ranks=lambda n: counts.append(n) or n
        )
    by_rank = [
        local_microbatches(lengths, max_tokens, rank=rank, world_size=world_size, max_over_ranks=lambda _: max(counts))
        for rank in range(world_size)
    ]
    assert {len(microbatches) for microbatches in by_rank} == {max(counts)}
    with_weights = [(row, weight) for microbatches in by_rank for rows, weight in microbatches for row in rows]
    assert sorted(row for row, weight in with_weights if weight == 1) == list(range(len(lengths)))
    # A pass over no rows has no gradients.
    assert all(rows for microbatches in by_rank for rows, _ in microbatches)


@settings(max_examples=200)
@given(LENGTHS, st.integers(1, 900))
def test_packed_passes_are_filled_up_to_the_budget(lengths: list[int], budget: int) -> None:
    passes = fill_microbatches(lengths, budget)
    assert sorted(row for rows in passes for row in rows) == list(range(len(lengths)))
    tokens = [sum(lengths[row] for row in rows) for rows in passes]
    assert all(len(rows) == 1 or total <= budget for rows, total in zip(passes, tokens, strict=True))
    # No pass could take the first row of the next one.
    assert all(total + lengths[following[0]] > budget for total, following in zip(tokens, passes[1:], strict=False))
    assert computed_tokens(lengths, passes, pack_limit=max(lengths, default=0)) == sum(lengths)
