import numpy as np
import pytest

from components.evaluation.statistics import Interval, bootstrap_mean, distinct_2, pairwise_wins

OPTIONS = {"num_resamples": 500, "confidence": 0.95, "seed": 0}


def test_tie_counts_as_half_a_win() -> None:
    assert pairwise_wins([1.0, 2.0, 3.0], [0.0, 2.0, 4.0]).tolist() == [1.0, 0.5, 0.0]


def test_equal_scores_are_all_ties() -> None:
    assert pairwise_wins([0.1, -5.0], [0.1, -5.0]).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_values_give_zero_width_interval(value: float) -> None:
    """All wins give [1, 1], all losses [0, 0], all ties [0.5, 0.5]."""
    assert bootstrap_mean(np.full(40, value), **OPTIONS) == Interval(value=value, low=value, high=value)


def test_interval_of_two_prompts() -> None:
    """Resamples of (0, 1) have means 0, 0.5, 1 with probabilities 1/4, 1/2, 1/4: the middle 95 % is [0, 1], the middle 40 % is 0.5."""
    both = np.array([0.0, 1.0])
    assert bootstrap_mean(both, **OPTIONS) == Interval(value=0.5, low=0.0, high=1.0)
    assert bootstrap_mean(both, **(OPTIONS | {"confidence": 0.4})) == Interval(value=0.5, low=0.5, high=0.5)


def test_interval_width_matches_normal_approximation() -> None:
    """64 % of 400: 0.64 +- 1.96 * sqrt(0.64 * 0.36 / 400) = 0.64 +- 0.047."""
    interval = bootstrap_mean(np.array([1.0] * 256 + [0.0] * 144), num_resamples=4000, confidence=0.95, seed=1)
    assert interval.value == 0.64
    assert interval.low == pytest.approx(0.593, abs=0.006)
    assert interval.high == pytest.approx(0.687, abs=0.006)


def test_interval_contains_mean_and_widens_with_confidence() -> None:
    values = np.array([0.0, 0.5, 1.0, 1.0, 0.0, 1.0, 0.5])
    narrow, wide = (bootstrap_mean(values, **(OPTIONS | {"confidence": c})) for c in (0.5, 0.99))
    assert wide.low < narrow.low < values.mean() < narrow.high < wide.high


def test_bootstrap_is_reproducible_by_seed() -> None:
    values = np.random.default_rng(0).normal(size=50)
    a, b, c = (bootstrap_mean(values, **(OPTIONS | {"seed": seed})) for seed in (1, 1, 2))
    assert a == b != c


def test_interval_of_one_prompt() -> None:
    assert bootstrap_mean(np.array([1.0]), **OPTIONS) == Interval(value=1.0, low=1.0, high=1.0)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a b c"], 1.0),
        (["a b a b"], 2 / 3),  # ab, ba, ab
        (["a b", "a b"], 1 / 2),
        (["a b", "b a"], 1.0),
        (["a a a a"], 1 / 3),
        (["one", "two"], 0.0),  # no bigrams, because none spans two texts
        (["", "a b"], 1.0),
        ([], 0.0),
    ],
)
def test_distinct_2(texts: list[str], expected: float) -> None:
    assert distinct_2(texts) == pytest.approx(expected)
