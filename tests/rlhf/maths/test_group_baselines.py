import math
import statistics
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.rlhf.maths.advantages import GroupBaseline, equal_groups, shape_group_scores
from tests.support.random_batches import doubles, equal, randn

METHODS = get_args(GroupBaseline)
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)

# Groups of the same size, with ties, equal scores and scores of different magnitudes.
SCORES = st.sampled_from([0.0, 1.0, 0.1, 0.7, -2.5, 1e-3, 100.0])
GROUPS = st.integers(2, 5).flatmap(lambda n: st.lists(st.lists(SCORES, min_size=n, max_size=n), min_size=1, max_size=4))


def slow(group: list[float], method: str, eps: float, lengths: list[int]) -> list[float]:
    """One group, one sample at a time."""
    if len(set(group)) == 1:
        return [0.0] * len(group)
    shaped = []
    for i, score in enumerate(group):
        others = group[:i] + group[i + 1 :]
        mean = sum(group) / len(group)
        shaped.append(
            {
                "rloo": score - sum(others) / len(others),
                "group_norm": (score - mean) / (statistics.stdev(group) + eps),
                "dr_grpo": score - mean,
                "reinforce++-baseline": score - mean,
                "opo": score - sum(n * x for n, x in zip(lengths, group, strict=True)) / max(sum(lengths), 1),
            }[method]
        )
    return shaped


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.sampled_from(METHODS), st.sampled_from([1e-9, 1e-6, 1e-4]), st.integers(0, 99))
def test_equals_the_slow_version(groups: list[list[float]], method: GroupBaseline, eps: float, seed: int) -> None:
    lengths = torch.randint(0, 9, (len(groups), len(groups[0])), generator=torch.Generator().manual_seed(seed))
    got = shape_group_scores(doubles(*groups), method, eps=eps, lengths=lengths)
    expected = [slow(group, method, eps, row) for group, row in zip(groups, lengths.tolist(), strict=True)]
    assert equal(got, expected)


def test_hand_computed_baselines() -> None:
    # mean 3; the others' means 11/3, 10/3, 3, 2; sample variance (4 + 1 + 0 + 9) / 3
    scores = doubles([1, 2, 3, 6])
    assert equal(shape_group_scores(scores, "rloo"), [[1 - 11 / 3, 2 - 10 / 3, 0, 4]])
    assert equal(shape_group_scores(scores, "dr_grpo"), [[-2, -1, 0, 3]])
    assert equal(shape_group_scores(scores, "reinforce++-baseline"), [[-2, -1, 0, 3]])
    std = math.sqrt(14 / 3)
    assert equal(shape_group_scores(scores, "group_norm", eps=0.5), [[x / (std + 0.5) for x in (-2, -1, 0, 3)]])
    # lengths 4, 3, 2, 1: baseline (4 + 6 + 6 + 6) / 10
    lengths = torch.tensor([[4, 3, 2, 1]])
    assert equal(shape_group_scores(scores, "opo", lengths=lengths), [[-1.2, -0.2, 0.8, 3.8]])


@EVERY_METHOD
@pytest.mark.parametrize("score", [0.1, 1 / 3, 0.7, 1e8 + 0.3, -5.6])
@pytest.mark.parametrize("num_samples", [2, 3, 5, 7, 48])
def test_group_of_equal_scores_is_exactly_0_in_fp32(method: GroupBaseline, score: float, num_samples: int) -> None:
    """The mean of equal fp32 numbers may differ from them by a rounding, which group_norm would divide by itself."""
    scores = torch.full((1, num_samples), score)
    shaped = shape_group_scores(scores, method, lengths=torch.arange(1, num_samples + 1)[None])
    assert (shaped == 0).all() and shaped.dtype == torch.float32


def test_rounding_of_equal_scores_would_be_blown_up() -> None:
    """The case above is real: the definition alone, in fp32, gives an advantage of order 1 for some equal scores."""
    worst = 0.0
    for score in torch.linspace(0.1, 0.9, 81).tolist():
        scores = torch.full((7,), score)
        worst = max(worst, float(((scores - scores.mean()) / (scores.std() + 1e-9)).abs().max()))
    assert worst > 0.1


@EVERY_METHOD
def test_other_groups_do_not_matter(method: GroupBaseline) -> None:
    scores, lengths = randn(4, 3), torch.arange(1, 13).view(4, 3)
    whole = shape_group_scores(scores, method, lengths=lengths)
    for p in range(4):
        row = slice(p, p + 1)
        assert equal(shape_group_scores(scores[row], method, lengths=lengths[row]), whole[row])


@pytest.mark.parametrize("method", [m for m in METHODS if m != "opo"])
def test_shaped_scores_of_a_group_sum_to_0_and_ignore_a_shift(method: GroupBaseline) -> None:
    scores = randn(3, 4)
    shaped = shape_group_scores(scores, method)
    assert equal(shaped.sum(dim=1), torch.zeros(3))
    assert equal(shape_group_scores(scores + 7, method), shaped)


@EVERY_METHOD
def test_group_of_one_is_refused(method: GroupBaseline) -> None:
    with pytest.raises(ValueError, match="at least 2 per prompt, not 1"):
        shape_group_scores(randn(4, 1), method)


def test_opo_needs_lengths_and_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths"):
        shape_group_scores(randn(2, 2), "opo")
    with pytest.raises(ValueError, match="grpo"):
        shape_group_scores(randn(2, 2), "grpo")  # type: ignore[arg-type]


def test_equal_groups() -> None:
    nan = math.nan
    scores = doubles([1, 1, 1], [1, 1, 2], [0, -0.0, 0], [nan, nan, nan], [1, 1, 1 + 1e-12], [math.inf] * 3)
    assert equal_groups(scores).tolist() == [True, False, True, False, False, True]
