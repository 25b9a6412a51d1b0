import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.rlhf.maths.kl import KlEstimator, adapt_kl_coef, estimate_kl
from tests.support.random_batches import GARBAGE, doubles, equal, ragged, randn, spoil

ESTIMATORS = get_args(KlEstimator)
MASK = ragged(4, 1, 0, 3)
POLICY, REFERENCE = randn(4, 4), randn(4, 4, seed=1)

# d = log pi - log ref = [0.2, -0.1, -0.5, 0.4]
HAND_POLICY, HAND_REFERENCE = doubles([-1, -0.5, -2, -0.2]), doubles([-1.2, -0.4, -1.5, -0.6])
HAND = {
    "k1": [0.2, -0.1, -0.5, 0.4],
    "k2": [0.02, 0.005, 0.125, 0.08],  # d^2 / 2
    # exp(-d) - 1 + d
    "k3": [math.exp(-0.2) - 0.8, math.exp(0.1) - 1.1, math.exp(0.5) - 1.5, math.exp(-0.4) - 0.6],
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_hand_computed_estimates(estimator: KlEstimator) -> None:
    got = estimate_kl(HAND_POLICY, HAND_REFERENCE, ragged(4), estimator)
    assert equal(got, [HAND[estimator]])


def test_k1_is_the_default() -> None:
    assert equal(estimate_kl(HAND_POLICY, HAND_REFERENCE, ragged(4)), [HAND["k1"]])


@pytest.mark.parametrize(("estimator", "slope"), [("k1", 1.0), ("k2", 0.2), ("k3", 1 - math.exp(-0.2))])
def test_gradient(estimator: KlEstimator, slope: float) -> None:
    # d = 0.2: dk1/dd = 1, dk2/dd = d, dk3/dd = 1 - exp(-d)
    policy = doubles([-1]).requires_grad_()
    estimate_kl(policy, doubles([-1.2]), ragged(1), estimator).sum().backward()
    assert equal(policy.grad, [[slope]])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: KlEstimator) -> None:
    """Their exact expectation over the policy's own tokens is the KL divergence."""
    policy, reference = torch.log_softmax(randn(1, 50), -1), torch.log_softmax(randn(1, 50, seed=1), -1)
    estimates = estimate_kl(policy, reference, ragged(50), estimator)
    assert equal((policy.exp() * estimates).sum(), (policy.exp() * (policy - reference)).sum())


@settings(max_examples=50, deadline=None)
@given(st.floats(-30, 0), st.floats(-30, 0))
def test_k2_and_k3_are_never_negative(policy: float, reference: float) -> None:
    for estimator in ("k2", "k3"):
        # exp(-d) - 1 + d cancels when d is near 0: the result may be one rounding error below 0.
        assert estimate_kl(doubles([policy]), doubles([reference]), ragged(1), estimator).item() >= -1e-15


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_of_equal_policies_is_0(estimator: KlEstimator) -> None:
    assert equal(estimate_kl(POLICY, POLICY, MASK, estimator), torch.zeros(4, 4))


def test_clamp_bounds_the_estimate_on_both_sides() -> None:
    policy, reference = doubles([0, -12, -3, -30]), doubles([-12, 0, -1, 0])  # d = 12, -12, -2, -30
    assert equal(estimate_kl(policy, reference, ragged(4), "k1", clamp=10.0), [[10, -10, -2, -10]])
    assert equal(estimate_kl(policy, reference, ragged(4), "k2", clamp=10.0), [[10, 10, 2, 10]])
    # exp(-12) + 11, exp(12) - 13, exp(2) - 3, exp(30) - 31
    assert equal(estimate_kl(policy, reference, ragged(4), "k3", clamp=10.0), [[10, 10, math.exp(2) - 3, 10]])
    assert estimate_kl(policy, reference, ragged(4), "k3").max().item() == pytest.approx(math.exp(30), rel=1e-6)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_padding_changes_nothing(estimator: KlEstimator, garbage: float) -> None:
    clean, corrupted = (x.clone().requires_grad_() for x in (POLICY, spoil(POLICY, MASK, garbage)))
    expected = estimate_kl(clean, REFERENCE, MASK, estimator)
    got = estimate_kl(corrupted, spoil(REFERENCE, MASK, garbage), MASK, estimator)
    assert equal(got, expected) and bool((got[~MASK] == 0).all())
    expected.sum().backward(), got.sum().backward()
    assert equal(corrupted.grad, clean.grad) and bool((corrupted.grad[~MASK] == 0).all())


def test_permuting_the_batch_permutes_the_result() -> None:
    order = torch.tensor([2, 0, 3, 1])
    got = estimate_kl(POLICY[order], REFERENCE[order], MASK[order], "k3")
    assert equal(got, estimate_kl(POLICY, REFERENCE, MASK, "k3")[order])


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (3.0, 0.1 * (1 - 0.2 * 256 / 10000)),  # 3 / 6 - 1 = -0.5, clamped to -0.2
        (5.4, 0.1 * (1 - 0.1 * 256 / 10000)),  # 5.4 / 6 - 1 = -0.1
        (6.0, 0.1),
        (6.6, 0.1 * (1 + 0.1 * 256 / 10000)),
        (9.0, 0.1 * (1 + 0.2 * 256 / 10000)),  # 9 / 6 - 1 = 0.5, clamped to 0.2
    ],
)
def test_hand_computed_adaptive_coefficient(kl: float, expected: float) -> None:
    assert adapt_kl_coef(0.1, kl, target=6.0, horizon=10000, num_samples=256) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1e6), st.floats(0.01, 10), st.integers(1, 1000))
def test_adaptive_coefficient_moves_toward_target_in_bounded_steps(kl: float, target: float, num_samples: int) -> None:
    coef = adapt_kl_coef(0.1, kl, target=target, horizon=10000, num_samples=num_samples)
    assert coef > 0.1 or kl < 1.001 * target
    assert coef < 0.1 or kl > 0.999 * target
    assert abs(coef / 0.1 - 1) <= 0.2 * num_samples / 10000 + 1e-12
