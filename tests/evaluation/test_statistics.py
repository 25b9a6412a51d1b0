import itertools
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize

from components.evaluation.statistics import (
    Bootstrap,
    Interval,
    bootstrap_mean,
    cohen_kappa,
    distinct_2,
    length_controlled,
    pairwise_wins,
)

Floats = NDArray[np.float64]
NAN = math.nan


def bootstrap(**options: Any) -> Bootstrap:
    return Bootstrap(**({"num_resamples": 500, "confidence": 0.95, "seed": 0} | options))


def mean_of(values: Floats | list[float], groups: list[int] | None = None, **options: Any) -> Interval:
    """The mean with its interval; each value has a group of its own unless groups are given."""
    values = np.array(values, dtype=np.float64)
    found = bootstrap_mean(values, list(range(len(values))) if groups is None else groups, bootstrap(**options))
    assert found is not None
    return found


def ends(interval: Interval | None) -> list[float]:
    assert interval is not None
    return [interval.value, interval.low, interval.high]


def test_tie_counts_as_half_a_win() -> None:
    assert pairwise_wins([1.0, 2.0, 3.0], [0.0, 2.0, 4.0]).tolist() == [1.0, 0.5, 0.0]


def test_equal_scores_are_all_ties() -> None:
    assert pairwise_wins([0.1, -5.0], [0.1, -5.0]).tolist() == [0.5, 0.5]


def test_interval_as_metrics() -> None:
    assert Interval(value=2.0, low=1.0, high=3.0).named("kl") == {"kl": 2.0, "kl_low": 1.0, "kl_high": 3.0}


# The bootstrap.


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_values_give_zero_width_interval(value: float) -> None:
    """All wins give [1, 1], all losses [0, 0], all ties [0.5, 0.5]."""
    assert mean_of(np.full(40, value)) == Interval(value=value, low=value, high=value)


def test_interval_of_two_prompts() -> None:
    """Resamples of (0, 1) have means 0, 0.5, 1 with probabilities 1/4, 1/2, 1/4: the middle 95 % is [0, 1], the middle 40 % is 0.5."""
    assert mean_of([0.0, 1.0]) == Interval(value=0.5, low=0.0, high=1.0)
    assert mean_of([0.0, 1.0], confidence=0.4) == Interval(value=0.5, low=0.5, high=0.5)


def test_interval_width_matches_normal_approximation() -> None:
    """64 % of 400: 0.64 +- 1.96 * sqrt(0.64 * 0.36 / 400) = 0.64 +- 0.047."""
    interval = mean_of([1.0] * 256 + [0.0] * 144, num_resamples=4000, seed=1)
    assert interval.value == 0.64
    assert interval.low == pytest.approx(0.593, abs=0.006)
    assert interval.high == pytest.approx(0.687, abs=0.006)


def test_interval_contains_mean_and_widens_with_confidence() -> None:
    values = [0.0, 0.5, 1.0, 1.0, 0.0, 1.0, 0.5]
    narrow, wide = (mean_of(values, confidence=c) for c in (0.5, 0.99))
    assert wide.low < narrow.low < np.mean(values) < narrow.high < wide.high


def test_bootstrap_is_reproducible_by_seed() -> None:
    values = np.random.default_rng(0).normal(size=50)
    a, b, c = (mean_of(values, seed=seed) for seed in (1, 1, 2))
    assert a == b != c


def test_interval_of_one_prompt() -> None:
    assert mean_of([1.0]) == Interval(value=1.0, low=1.0, high=1.0)


@pytest.mark.parametrize("num_resamples", [1, 99, 100, 101, 2050])
def test_resamples_draw_as_many_groups_as_there_are(num_resamples: int) -> None:
    counts = np.concatenate(list(bootstrap(num_resamples=num_resamples).counts(7)))
    assert counts.shape == (num_resamples, 7)
    assert (counts.sum(axis=1) == 7).all()


def test_resamples_draw_every_group_equally_often() -> None:
    """The count of a group is binomial with 5 draws of probability 1/5: mean 1, variance 0.8; covariance -1/5."""
    counts = np.concatenate(list(bootstrap(num_resamples=20_000).counts(5)))
    assert len(np.unique(counts, axis=0)) == 126  # all ways to draw 5 of 5 with replacement
    assert counts.mean(axis=0) == pytest.approx(np.ones(5), abs=0.03)
    covariance = np.full((5, 5), -0.2) + np.eye(5)
    assert np.cov(counts.T) == pytest.approx(covariance, abs=0.04)


def clustered_rows(seed: int = 0) -> tuple[Floats, list[int]]:
    """1 to 6 rows for each of 25 prompts; rows of one prompt are alike, and some are nan."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(rng.permutation(1000)[:25], rng.integers(1, 7, size=25))  # numbers with gaps, in any order
    values = rng.normal(size=1000)[groups] + 0.3 * rng.normal(size=len(groups))
    values[rng.random(len(values)) < 0.15] = NAN
    values[groups == groups[0]] = NAN  # a prompt without any value
    return values, groups.tolist()


def slow_resampled_means(values: Floats, groups: list[int], num_resamples: int, seed: int) -> list[float]:
    """Means over the rows of prompts that are drawn one by one."""
    rows = {
        g: [v for v, h in zip(values.tolist(), groups, strict=True) if h == g and not math.isnan(v)] for g in groups
    }
    rows = {g: found for g, found in rows.items() if found}
    rng, means = np.random.default_rng(seed), []
    for _ in range(num_resamples):
        drawn = [
            value for number in rng.integers(0, len(rows), size=len(rows)) for value in list(rows.values())[number]
        ]
        means.append(sum(drawn) / len(drawn))
    return means


def test_clustered_interval_equals_a_loop_over_resampled_prompts() -> None:
    values, groups = clustered_rows()
    found = mean_of(values, groups, num_resamples=100_000)
    assert found.value == pytest.approx(np.nanmean(values), abs=1e-12)
    low, high = np.quantile(slow_resampled_means(values, groups, 100_000, seed=5), [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.015)
    narrow = mean_of(values[~np.isnan(values)], num_resamples=2000)
    assert found.high - found.low > 1.3 * (narrow.high - narrow.low)  # than if the rows were independent


def test_clustered_interval_equals_a_loop_over_the_same_draws() -> None:
    """Exactly, for each count of each prompt."""
    values, groups = clustered_rows(seed=1)
    kept = [(v, g) for v, g in zip(values.tolist(), groups, strict=True) if not math.isnan(v)]
    prompts = sorted({g for _, g in kept})
    means = []
    for counts in bootstrap().counts(len(prompts)):
        for row in counts.astype(int).tolist():
            times = dict(zip(prompts, row, strict=True))
            drawn = [v for v, g in kept for _ in range(times[g])]
            means.append(sum(drawn) / len(drawn))
    low, high = np.quantile(means, [0.025, 0.975])
    assert ends(mean_of(values, groups)) == pytest.approx([np.nanmean(values), low, high], abs=1e-12)


def test_rows_without_an_answer_are_left_out() -> None:
    values, groups = clustered_rows(seed=2)
    kept = ~np.isnan(values)
    assert mean_of(values, groups) == mean_of(values[kept], np.array(groups)[kept].tolist())


def test_identical_rows_of_a_prompt_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(3).integers(0, 2, size=40).astype(np.float64)
    once, four_times = mean_of(values), mean_of(values.repeat(4), np.arange(40).repeat(4).tolist())
    assert ends(four_times) == pytest.approx(ends(once), abs=1e-12)


@pytest.mark.parametrize("values", [[], [NAN], [NAN, NAN]])
def test_no_interval_without_answers(values: list[float]) -> None:
    groups = list(range(len(values)))
    assert bootstrap_mean(np.array(values), groups, bootstrap()) is None
    assert length_controlled(np.array(values), np.zeros(len(values)), groups, bootstrap()) is None


# The length-controlled win rate.


def slow_length_controlled(wins: Floats, gaps: Floats, weights: Floats, scale: float) -> float:
    """sigmoid(a) of logit P(win) = a + b tanh(gap / scale), fitted with a general optimizer.

    The penalties are 0.001 a^2 / 2 + b^2 / 2.
    """
    features = np.tanh(gaps / scale)

    def objective(parameters: Floats) -> float:
        a, b = parameters
        logits = a + b * features
        losses = np.logaddexp(0, logits) - wins * logits  # minus the log-likelihood, with ties as halves
        return float((weights * losses).sum() + 0.001 * a**2 / 2 + b**2 / 2)

    fit = minimize(objective, np.zeros(2), method="BFGS", options={"gtol": 1e-7})
    return float(1 / (1 + np.exp(-fit.x[0])))


@pytest.mark.parametrize("case", ["plain", "nan", "ties", "clusters", "all of them"])
@pytest.mark.parametrize("seed", [0, 1])
def test_length_controlled_rate_equals_that_of_a_general_optimizer(case: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = 60
    gaps = np.round(rng.normal(8, 20, size))
    wins = (rng.random(size) < 1 / (1 + np.exp(-0.4 - gaps / 15))).astype(np.float64)
    groups = np.arange(size) + 10
    if case in ("ties", "all of them"):
        wins[rng.random(size) < 0.3] = 0.5
    if case in ("nan", "all of them"):
        wins[rng.random(size) < 0.2] = NAN
    if case in ("clusters", "all of them"):
        groups = np.repeat(np.arange(20), 3)
    found = length_controlled(wins, gaps, groups.tolist(), bootstrap(num_resamples=12, seed=seed))

    kept = ~np.isnan(wins)
    prompts = np.unique(groups[kept]).tolist()
    scale = gaps[kept].std()
    value = slow_length_controlled(wins[kept], gaps[kept], np.ones(kept.sum()), scale)
    resampled = []
    for counts in np.concatenate(list(bootstrap(num_resamples=12, seed=seed).counts(len(prompts)))):
        times = dict(zip(prompts, counts.tolist(), strict=True))
        weights = np.array([times[g] for g in groups[kept].tolist()])
        resampled.append(slow_length_controlled(wins[kept], gaps[kept], weights, scale))
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert ends(found) == pytest.approx([value, low, high], abs=2e-5)


def test_responses_that_win_only_by_being_longer_do_not_win_at_equal_length() -> None:
    rng = np.random.default_rng(0)
    gaps = rng.normal(20, 20, 3000)  # mostly longer than those of the baseline
    wins = (rng.random(3000) < 1 / (1 + np.exp(-4 * np.tanh(gaps / gaps.std())))).astype(np.float64)
    found = length_controlled(wins, gaps, list(range(3000)), bootstrap(num_resamples=200))
    assert wins.mean() > 0.75
    assert found is not None
    assert found.value == pytest.approx(0.5, abs=0.04)
    assert found.low < 0.5 < found.high


def test_shorter_responses_that_win_less_for_their_length_win_at_equal_length() -> None:
    """The other direction: better responses that the judge marks down because they are short."""
    rng = np.random.default_rng(1)
    gaps = rng.normal(-20, 20, 3000)
    wins = (rng.random(3000) < 1 / (1 + np.exp(-1 - 3 * np.tanh(gaps / gaps.std())))).astype(np.float64)
    found = length_controlled(wins, gaps, list(range(3000)), bootstrap(num_resamples=10))
    assert wins.mean() < 0.45
    assert found is not None
    assert found.value == pytest.approx(1 / (1 + math.exp(-1)), abs=0.05)


@pytest.mark.parametrize(
    "gaps", [np.full(40, 7.0), np.full(40, -3.0), np.linspace(5, 200, 40), np.array([*[9.0] * 39, -1.0])]
)
def test_no_rate_if_one_of_the_two_is_nearly_always_longer(gaps: np.ndarray) -> None:
    """What would be at equal length is then a guess."""
    assert length_controlled(np.full(40, 1.0), gaps, list(range(40)), bootstrap()) is None
    assert (
        length_controlled(np.full(40, 1.0), np.array([*gaps[:36], -1.0, -2.0, 8.0, 9.0]), list(range(40)), bootstrap())
        is not None
    )


def test_equal_lengths_give_the_plain_rate() -> None:
    """Up to the weak penalty: without different lengths nothing can be controlled for."""
    wins = np.array([1.0] * 22 + [0.5] * 4 + [0.0] * 14)
    found = length_controlled(wins, np.zeros(40), list(range(40)), bootstrap())
    assert found is not None
    assert found.value == pytest.approx(0.6, abs=1e-4)
    plain = mean_of(wins)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=1e-4)


@pytest.mark.parametrize("size", [1, 5, 30, 1000])
def test_all_wins_or_all_losses_are_finite(size: int) -> None:
    gaps = np.random.default_rng(size).normal(3, 9, size)
    for win in (1.0, 0.0):
        found = length_controlled(np.full(size, win), gaps, list(range(size)), bootstrap(num_resamples=50))
        if size == 1:
            assert found is None  # nothing is known about the other length
            continue
        assert np.isfinite(ends(found)).all()
        assert all(abs(end - win) < 0.1 for end in ends(found)), ends(found)


def test_longer_responses_that_always_win_and_shorter_ones_that_always_lose_are_finite() -> None:
    gaps = np.array([10.0, -10.0] * 30)
    found = length_controlled((gaps > 0).astype(np.float64), gaps, list(range(60)), bootstrap())
    assert found is not None
    assert found.value == pytest.approx(0.5, abs=1e-9)
    assert 0.2 < found.low < 0.5 < found.high < 0.8


@pytest.mark.parametrize("seed", range(8))
def test_length_controlled_interval_contains_its_value(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gaps, wins = rng.normal(5, 10, 120), rng.choice([0.0, 0.5, 1.0], size=120)
    found = length_controlled(wins, gaps, np.repeat(np.arange(40), 3).tolist(), bootstrap(seed=seed))
    assert found is not None
    assert 0 < found.low < found.value < found.high < 1


# distinct-2.


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a b c"], 1.0),
        (["a b a b"], 2 / 3),  # ab, ba, ab
        (["a b A  B"], 2 / 3),  # upper case and spaces do not matter
        (["a b", "a b"], 1 / 2),
        (["a b", "b a"], 1.0),
        (["a a a a"], 1 / 3),
        (["one", "two"], 0.0),  # no bigrams, because none spans two texts
        (["", "a b"], 1.0),
        (["我们我们"], 2 / 3),  # 我们, 们我, 我们
        (["我们 好", "好我们"], 3 / 4),  # 我们, 们好, 好我, 我们
        ([], 0.0),
    ],
)
def test_distinct_2_of_equal_texts(texts: list[str], expected: float) -> None:
    assert distinct_2(texts, texts) == pytest.approx((expected, expected))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (["a b c"], ["a b c a b c"], (1.0, 1.0)),  # the second is cut to a b c
        (["a b c d e f"], ["x x"], (1.0, 1.0)),  # a b and x x
        (["a b c d"], ["x x x x x x"], (1.0, 1 / 3)),
        (["a b c", "a b c"], ["d e", "f g h i"], (2 / 3, 1.0)),  # a b, a b, b c; d e, f g, g h
        (["a b c", ""], ["", "a b c"], (0.0, 0.0)),
        (["我们我们"], ["我们"], (1.0, 1.0)),
    ],
)
def test_distinct_2_at_equal_length(first: list[str], second: list[str], expected: tuple[float, float]) -> None:
    assert distinct_2(first, second) == pytest.approx(expected)
    assert distinct_2(second, first) == pytest.approx(expected[::-1])


def test_longer_text_does_not_look_repetitive_for_its_length_alone() -> None:
    """Words that are drawn at random in the same way, 10 for each text of one side and 200 for each of the other."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(20)]
    short, long = ([" ".join(rng.choice(words, size=n)) for _ in range(30)] for n in (10, 200))
    pairs = [pair for text in long for pair in itertools.pairwise(text.split())]
    assert len(set(pairs)) / len(pairs) < 0.1  # all its words
    a, b = distinct_2(short, long)
    assert a == pytest.approx(b, abs=0.06)
    assert min(a, b) > 0.5


def test_distinct_2_needs_as_many_texts_of_both() -> None:
    with pytest.raises(ValueError, match="zip"):
        distinct_2(["a"], [])


# Cohen's kappa.


def wins_of_table(table: list[list[int]], values: list[float]) -> tuple[Floats, Floats]:
    """Wins of two judges with these counts: row by the first judge, column by the second."""
    cells = [(a, b) for i, a in enumerate(values) for j, b in enumerate(values) for _ in range(table[i][j])]
    return np.array([a for a, _ in cells]), np.array([b for _, b in cells])


def test_kappa_of_two_by_two_table() -> None:
    """Observed (20 + 15) / 50 = 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5: (0.7 - 0.5) / (1 - 0.5)."""
    first, second = wins_of_table([[20, 5], [10, 15]], [1.0, 0.0])
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(second, first) == pytest.approx(0.4)


def test_kappa_of_three_by_three_table() -> None:
    """Observed 12 / 20 = 0.6, by chance (10 * 8 + 4 * 5 + 6 * 7) / 400 = 0.355: 0.245 / 0.645."""
    first, second = wins_of_table([[6, 2, 2], [1, 2, 1], [1, 1, 4]], [1.0, 0.5, 0.0])
    assert cohen_kappa(first, second) == pytest.approx(0.245 / 0.645)


def test_kappa_counts_inconsistent_answers_on_the_side_that_they_lean_to() -> None:
    """A win in one order and a tie in the other, 0.75, is a win."""
    first, second = wins_of_table([[20, 5], [10, 15]], [0.75, 0.25])
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(first, np.where(second > 0.5, 1.0, 0.0)) == pytest.approx(0.4)


def test_kappa_of_opposite_judges_is_minus_1() -> None:
    wins = np.array([1.0, 0.0, 1.0, 0.0])
    assert cohen_kappa(wins, wins) == pytest.approx(1.0)
    assert cohen_kappa(wins, 1 - wins) == pytest.approx(-1.0)


def test_kappa_is_0_if_one_judge_always_says_the_same() -> None:
    assert cohen_kappa(np.ones(4), np.array([1.0, 0.0, 1.0, 0.5])) == pytest.approx(0.0)


def test_kappa_leaves_out_rows_that_one_judge_did_not_answer() -> None:
    first, second = wins_of_table([[20, 5], [10, 15]], [1.0, 0.0])
    gaps_first, gaps_second = np.array([NAN, NAN, 1.0, 0.0]), np.array([1.0, NAN, NAN, NAN])
    found = cohen_kappa(np.concatenate([gaps_first, first]), np.concatenate([gaps_second, second]))
    assert found == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("first", "second"),
    [([], []), ([NAN, 1.0], [0.0, NAN]), ([1.0, 1.0], [1.0, 1.0]), ([1.0, 0.0], [1.0, NAN]), ([0.5], [0.5])],
)
def test_kappa_is_undefined_without_two_different_answers(first: list[float], second: list[float]) -> None:
    assert cohen_kappa(np.array(first), np.array(second)) is None
