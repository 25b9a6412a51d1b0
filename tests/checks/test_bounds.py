"""Each bound on numbers whose interval can be computed by hand."""

import numpy as np
import pytest

from components.checks.bounds import BOUNDS, Measured, unmeasured
from components.rlhf.maths.intervals import Bootstrap, bootstrap_ratio

BOOTSTRAP = Bootstrap(num_resamples=400, confidence=0.95, seed=0)


def measured(sft: list[float], policy: list[float], sizes: list[float] | None = None) -> Measured:
    own = None if sizes is None else np.array(sizes)
    return Measured(check="c", unit="u", sft=np.array(sft), policy=np.array(policy), sizes=own)


@pytest.mark.parametrize(
    ("bound", "limit", "passed"),
    [
        # 3 hits of 12: Wilson's interval at 95% is [0.0889, 0.5323].
        ("min_rate", 0.088, True),
        ("min_rate", 0.090, False),
        ("max_rate", 0.533, True),
        ("max_rate", 0.532, False),
    ],
)
def test_bounds_on_the_rate_of_the_policy_need_the_worse_end_of_wilsons_interval(
    bound: str, limit: float, passed: bool
) -> None:
    row = measured([1.0] * 12, [1.0] * 3 + [0.0] * 9).row(bound, limit, BOOTSTRAP)
    assert (row.passed, row.value, row.about, row.num) == (passed, 0.25, "the policy", 12)
    assert (row.low, row.high) == (pytest.approx(0.08894, abs=1e-5), pytest.approx(0.53231, abs=1e-5))


@pytest.mark.parametrize(("bound", "sign"), [("max_increase", 1), ("max_decrease", -1), ("max_drop", -1)])
def test_bounds_on_a_constant_difference_are_exact(bound: str, sign: int) -> None:
    """If every item changes by the same amount, so does every resample."""
    own = measured([1.0, 2.0, 4.0], [1.0 + sign * 0.5, 2.0 + sign * 0.5, 4.0 + sign * 0.5])
    row = own.row(bound, 0.5, BOOTSTRAP)
    assert row.passed and (row.value, row.low, row.high) == (0.5, 0.5, 0.5)
    assert not own.row(bound, 0.4999, BOOTSTRAP).passed
    # A change for the better keeps any bound.
    better = measured(own.policy.tolist(), own.sft.tolist())
    assert better.row(bound, 0.0, BOOTSTRAP).passed


@pytest.mark.parametrize("bound", ["max_increase", "max_decrease", "max_drop"])
def test_upper_end_of_the_interval_counts_and_not_the_mean(bound: str) -> None:
    """Of two items one changes by 1: a quarter of the resamples has a mean of 1, so that the interval is [0, 1]."""
    sft, policy = [0.5, 0.5], [1.5, 0.5]
    own = measured(sft, policy) if bound == "max_increase" else measured(policy, sft)
    row = own.row(bound, 0.9, BOOTSTRAP)
    assert (row.value, row.low, row.high, row.passed) == (0.5, 0.0, 1.0, False)
    assert own.row(bound, 1.0, BOOTSTRAP).passed


def test_difference_of_rates_has_a_width_where_little_differs() -> None:
    """Agresti and Min: one of 10 changes, so (1 +- 1.96 sqrt(2 - 1/12)) / 12; none of 35, so +- 1.96 / 37."""
    row = measured([0.0] * 10, [1.0] + [0.0] * 9).row("max_increase", 0.31, BOOTSTRAP)
    assert (row.value, row.passed) == (0.1, True)
    assert (row.low, row.high) == (pytest.approx(-0.14278, abs=1e-5), pytest.approx(0.30945, abs=1e-5))
    same = measured([1.0] * 35, [1.0] * 35)
    assert not same.row("max_decrease", 0.05, BOOTSTRAP).passed and same.row("max_decrease", 0.053, BOOTSTRAP).passed


def test_sizes_weigh_items_as_tokens_weigh_texts() -> None:
    """6 nats on 2 tokens and 1 on 8 are 0.7 per token, not the mean of 3 and 0.125."""
    row = measured([5.0, 0.0], [6.0, 1.0], [2.0, 8.0]).row("max_increase", 1.0, BOOTSTRAP)
    assert (row.sft, row.policy) == (0.5, 0.7) and row.value == pytest.approx(0.2)
    # Resamples have (1 + 1) / (2 + 2), / (8 + 8) or / (2 + 8).
    assert (row.low, row.high) == (pytest.approx(2 / 16), pytest.approx(2 / 4))


def test_ratio_of_resampled_sums_is_that_of_a_loop() -> None:
    sums, sizes = np.array([1.0, 5.0, 2.0, 0.5]), np.array([2.0, 3.0, 1.0, 4.0])
    generator = np.random.default_rng(7)
    ratios = []
    for _ in range(100):  # a block of resamples is drawn at once
        drawn = generator.integers(0, 4, size=4)
        ratios.append(sum(sums[i] for i in drawn) / sum(sizes[i] for i in drawn))
    found = bootstrap_ratio(sums, sizes, Bootstrap(num_resamples=100, confidence=0.9, seed=7))
    assert found.value == 0.85
    assert [found.low, found.high] == pytest.approx(np.quantile(ratios, [0.05, 0.95]).tolist())


def test_what_was_not_measured_has_not_passed() -> None:
    rows = unmeasured("c", dict.fromkeys(BOUNDS, 1.0), "it is broken")
    assert [row.bound for row in rows] == list(BOUNDS) and not any(row.passed for row in rows)
    assert rows[0].sentence() == "check c gives no verdict, because it is broken"
