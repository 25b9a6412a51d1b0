import numpy as np
import pytest

from components.evaluation.statistics import Interval, bootstrap_mean, distinct_2, wins

OPTIONS = {"num_resamples": 500, "confidence": 0.95, "seed": 0}


class TestWins:
    def test_ties_are_half_a_win(self) -> None:
        assert wins([1.0, 2.0, 3.0], [0.0, 2.0, 4.0]).tolist() == [1.0, 0.5, 0.0]

    def test_against_oneself(self) -> None:
        assert wins([0.1, -5.0], [0.1, -5.0]).tolist() == [0.5, 0.5]


class TestBootstrap:
    @pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
    def test_what_never_varies_has_no_width(self, value: float) -> None:
        """All wins are [1, 1], all losses [0, 0], all ties [0.5, 0.5]."""
        assert bootstrap_mean(np.full(40, value), **OPTIONS) == Interval(value=value, low=value, high=value)

    def test_two_prompts_by_hand(self) -> None:
        """Resamples of (0, 1) have means 0, 0.5, 1 with chances 1/4, 1/2, 1/4: the middle 95 % is all of it, 40 % is 0.5."""
        both = np.array([0.0, 1.0])
        assert bootstrap_mean(both, **OPTIONS) == Interval(value=0.5, low=0.0, high=1.0)
        assert bootstrap_mean(both, **(OPTIONS | {"confidence": 0.4})) == Interval(value=0.5, low=0.5, high=0.5)

    def test_a_win_rate_has_the_width_that_theory_gives(self) -> None:
        """64 % of 400: 0.64 +- 1.96 * sqrt(0.64 * 0.36 / 400) = 0.64 +- 0.047."""
        found = bootstrap_mean(np.array([1.0] * 256 + [0.0] * 144), num_resamples=4000, confidence=0.95, seed=1)
        assert found.value == 0.64
        assert found.low == pytest.approx(0.593, abs=0.006)
        assert found.high == pytest.approx(0.687, abs=0.006)

    def test_the_interval_lies_around_the_mean_and_widens_with_confidence(self) -> None:
        values = np.array([0.0, 0.5, 1.0, 1.0, 0.0, 1.0, 0.5])
        narrow, wide = (bootstrap_mean(values, **(OPTIONS | {"confidence": c})) for c in (0.5, 0.99))
        assert wide.low < narrow.low < values.mean() < narrow.high < wide.high

    def test_follows_from_its_seed(self) -> None:
        values = np.random.default_rng(0).normal(size=50)
        a, b, c = (bootstrap_mean(values, **(OPTIONS | {"seed": seed})) for seed in (1, 1, 2))
        assert a == b != c

    def test_one_prompt(self) -> None:
        assert bootstrap_mean(np.array([1.0]), **OPTIONS) == Interval(value=1.0, low=1.0, high=1.0)


class TestDistinct2:
    @pytest.mark.parametrize(
        ("texts", "expected"),
        [
            (["a b c"], 1.0),
            (["a b a b"], 2 / 3),  # ab, ba, ab
            (["a b", "a b"], 1 / 2),
            (["a b", "b a"], 1.0),
            (["a a a a"], 1 / 3),
            (["one", "two"], 0.0),  # no pair at all; none reaches over the end of a text
            (["", "a b"], 1.0),
            ([], 0.0),
        ],
    )
    def test_by_hand(self, texts: list[str], expected: float) -> None:
        assert distinct_2(texts) == pytest.approx(expected)
