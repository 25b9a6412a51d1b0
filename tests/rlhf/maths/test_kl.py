import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.rlhf.maths.kl import KlEstimator, adapt_kl_coef, estimate_kl, exact_kl
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


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("clamp", [0.5, 10.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_beyond_the_clamp_is_0_and_finite_everywhere(
    estimator: KlEstimator, clamp: float, dtype: torch.dtype
) -> None:
    """exp() of 1,000 nats is infinite, and 0 * inf would be nan."""
    d = torch.tensor([[-1e5, -1000, -100, -20, -3, -0.1, 0.1, 3, 20, 100, 1000, 1e5]], dtype=dtype)
    policy = d.clone().requires_grad_()
    kl = estimate_kl(policy, torch.zeros_like(d), ragged(12), estimator, clamp)
    kl.sum().backward()
    assert policy.grad is not None and bool(policy.grad.isfinite().all())
    for gap, estimate, slope in zip(*(x[0].tolist() for x in (d, kl.detach(), policy.grad)), strict=True):
        growth = math.exp(min(-gap, 700))
        exact, derivative = {"k1": (gap, 1), "k2": (gap**2 / 2, gap), "k3": (growth - 1 + gap, 1 - growth)}[estimator]
        assert estimate == pytest.approx(max(min(exact, clamp), -clamp), rel=1e-5, abs=1e-6)
        assert slope == pytest.approx(derivative if abs(exact) < clamp else 0, rel=1e-5, abs=1e-6)


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


# The exact KL of two distributions.


def slow_exact_kl(logits: list[float], ref_logits: list[float], temperature: float) -> float:
    """sum of p (log p - log q) over the tokens that p can sample, one at a time."""

    def log_normalizer(values: list[float]) -> float:
        largest = max(values)
        return largest + math.log(sum(math.exp(v - largest) for v in values))

    p, q = ([x / temperature for x in values] for values in (logits, ref_logits))
    total = 0.0
    for i in range(len(p)):
        if p[i] > -math.inf:
            logprob = p[i] - log_normalizer(p)
            total += math.exp(logprob) * (logprob - (q[i] - log_normalizer(q)))
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_exact_kl_equals_a_double_loop(temperature: float) -> None:
    logits, ref_logits = 3 * randn(4, 5, 11), 3 * randn(4, 5, 11, seed=1)
    got = exact_kl(logits, ref_logits, temperature)
    expected = [
        [slow_exact_kl(logits[i, t].tolist(), ref_logits[i, t].tolist(), temperature) for t in range(5)]
        for i in range(4)
    ]
    assert equal(got, expected)
    fp32 = exact_kl(logits.float(), ref_logits.float(), temperature)
    assert fp32.dtype == torch.float32
    assert torch.allclose(fp32.double(), got, rtol=1e-5, atol=1e-5)


def test_hand_computed_exact_kl() -> None:
    """1/4 and 3/4 against 1/2 and 1/2, whatever is added to all logits of a row."""
    got = exact_kl(doubles([0, math.log(3)], [5, 5 + math.log(3)]), doubles([0, 0], [-7, -7]))
    assert equal(got, [0.25 * math.log(0.5) + 0.75 * math.log(1.5)] * 2)


def test_exact_kl_is_computed_in_fp32() -> None:
    logits, ref_logits = randn(3, 50).bfloat16(), randn(3, 50, seed=1).bfloat16()
    got = exact_kl(logits, ref_logits)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), exact_kl(logits.double(), ref_logits.double()), rtol=1e-5)


def test_exact_kl_of_equal_logits_is_0() -> None:
    logits = randn(4, 7)
    logits[:, 2] = -math.inf
    assert equal(exact_kl(logits, logits), torch.zeros(4), atol=0)
    assert equal(exact_kl(logits + 3, logits), torch.zeros(4))


def test_masked_tokens_have_no_part_in_exact_kl() -> None:
    """Tokens that both models mask are as good as absent."""
    logits, ref_logits = randn(4, 7), randn(4, 7, seed=1)
    expected = exact_kl(logits[:, 2:], ref_logits[:, 2:])
    for x in (logits, ref_logits):
        x[:, :2] = -math.inf
    assert equal(exact_kl(logits, ref_logits, 1.0), expected)


def test_token_that_only_one_model_masks() -> None:
    """The mass of half of the tokens is doubled: log 2. A token that only the reference masks is infinitely unlikely."""
    ref_logits = torch.zeros(1, 4, dtype=torch.float64)
    logits = doubles([0, 0, -math.inf, -math.inf])
    assert equal(exact_kl(logits, ref_logits), [math.log(2)])
    assert exact_kl(ref_logits, logits).tolist() == [math.inf]


def test_exact_kl_has_the_mean_of_k1_and_less_variance() -> None:
    """Of two tokens, of which the second depends on the first; both estimates are sums over a sampled pair."""
    size, num_samples = 8, 40_000
    start, ref_start, after, ref_after = (
        randn(size),
        randn(size, seed=1),
        randn(size, size, seed=2),
        randn(size, size, seed=3),
    )
    p, q, p_after, q_after = (torch.log_softmax(x, -1) for x in (start, ref_start, after, ref_after))
    joint, ref_joint = p[:, None] + p_after, q[:, None] + q_after
    truth = (joint.exp() * (joint - ref_joint)).sum().item()
    generator = torch.Generator().manual_seed(0)
    first = torch.multinomial(p.exp(), num_samples, replacement=True, generator=generator)
    second = torch.multinomial(p_after.exp()[first], 1, generator=generator)[:, 0]
    k1 = (joint - ref_joint)[first, second]
    exact = exact_kl(start, ref_start) + exact_kl(after, ref_after)[first]
    for estimates in (k1, exact):
        assert abs(estimates.mean().item() - truth) < 4 * estimates.std().item() / math.sqrt(num_samples)
    assert exact.std() < 0.5 * k1.std()
    assert k1.min() < 0 < exact.min()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=20))
def test_exact_kl_is_never_negative(pairs: list[tuple[float, float]]) -> None:
    logits, ref_logits = doubles([a for a, _ in pairs]), doubles([b for _, b in pairs])
    assert exact_kl(logits, ref_logits).item() >= -1e-13  # rounding


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
