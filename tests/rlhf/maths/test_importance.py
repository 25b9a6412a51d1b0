import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from components.rlhf.maths.importance import (
    ImportanceMode,
    RejectionStatistic,
    importance_weights,
    normalize_weights,
    rejection_mask,
)
from components.rlhf.maths.losses import policy_loss
from tests.support.random_batches import GARBAGE, doubles, equal, ragged, randn, spoil

BOUNDS: Any = {"mode": "truncate", "low": 0.5, "high": 5.0}


def test_hand_computed_weights() -> None:
    trainer = doubles([math.log(p) for p in (0.4, 0.1, 0.9, 0.3)])
    engine = doubles([math.log(p) for p in (0.2, 0.5, 0.1, 0.3)])
    weights, outside = importance_weights(trainer, engine, ragged(4), **BOUNDS)
    assert equal(weights, [[2.0, 0.5, 5.0, 1.0]])  # 0.2 is clamped to 0.5, and 9 to 5
    assert outside.tolist() == [[False, True, True, False]]


def test_equal_logprobs_have_weight_1() -> None:
    logprobs = randn(3, 4)
    weights, outside = importance_weights(logprobs, logprobs, ragged(4, 2, 0), **BOUNDS)
    assert equal(weights, torch.ones(3, 4))
    assert not outside.any()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_weights_are_1_at_padding(garbage: float) -> None:
    mask = ragged(4, 2, 0)
    trainer, engine = (spoil(randn(3, 4, seed=seed), mask, garbage) for seed in (0, 1))
    for pair in ((trainer, engine), (trainer, randn(3, 4)), (randn(3, 4), engine)):
        weights, outside = importance_weights(*pair, mask, **BOUNDS)
        assert (weights[~mask] == 1).all()
        assert not outside[~mask].any()


def test_weight_of_an_impossible_token_is_finite() -> None:
    weights, outside = importance_weights(doubles([-1.0]), doubles([-2000.0]), ragged(1), **BOUNDS)
    assert equal(weights, [[5.0]])
    assert outside.all()


# Log-ratios trainer / engine with ties, values exactly at the bounds 0.5, 2 and 5, and overflow of exp() in the far tail.
LOG_RATIOS = st.sampled_from([0.0, 0.01, -0.3, 0.6, -1.1, math.log(2), math.log(5), -math.log(2), 25.0, -25.0, 800.0])


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[list[float]], list[list[bool]]]:
    """Log-ratios and a mask, with gaps and empty rows."""
    width = draw(st.integers(1, 5))
    row = st.lists(st.tuples(LOG_RATIOS, st.booleans()), min_size=width, max_size=width)
    batch = draw(st.lists(row, min_size=1, max_size=4))
    return [[x for x, _ in row] for row in batch], [[real for _, real in row] for row in batch]


def exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def slow_weights(gaps: list[float], real: list[bool], mode: str, low: float, high: float) -> list[tuple[float, bool]]:
    """Weight and whether it is outside the bounds, for each token of one row."""
    kept = [gap for gap, is_real in zip(gaps, real, strict=True) if is_real]
    found = []
    for gap, is_real in zip(gaps, real, strict=True):
        if not is_real:
            found.append((1.0, False))
            continue
        token, product, geometric = exp(gap), exp(sum(kept)), exp(sum(kept) / len(kept))
        number = {"truncate": token, "mask": token, "sequence-truncate": product, "sequence-mask": geometric}[mode]
        outside = not low <= number <= high
        if mode.endswith("truncate"):
            found.append((min(max(number, low), high), outside))
        else:
            found.append((0.0 if outside else token, outside))
    return found


@settings(max_examples=100, deadline=None)
@given(
    rows(), st.sampled_from(get_args(ImportanceMode)), st.sampled_from([0.45, 0.9]), st.sampled_from([1.1, 2.1, 5.2])
)
def test_weights_equal_the_slow_version(
    batch: tuple[list[list[float]], list[list[bool]]], mode: ImportanceMode, low: float, high: float
) -> None:
    gaps, mask = doubles(*batch[0]), torch.tensor(batch[1])
    for garbage in (0.0, math.nan, math.inf):
        trainer = spoil(gaps, mask, garbage)
        weights, outside = importance_weights(trainer, torch.zeros_like(gaps), mask, mode=mode, low=low, high=high)
        expected = [slow_weights(*row, mode, low, high) for row in zip(*batch, strict=True)]
        assert equal(weights, [[weight for weight, _ in row] for row in expected])
        assert outside.tolist() == [[is_outside for _, is_outside in row] for row in expected]


@pytest.mark.parametrize("mode", get_args(ImportanceMode))
def test_bounds_are_inclusive(mode: ImportanceMode) -> None:
    trainer = doubles([math.log(2)], [0.0], [-math.log(2)])
    weights, outside = importance_weights(trainer, torch.zeros(3, 1), ragged(1, 1, 1), mode=mode, low=0.5, high=2.0)
    assert equal(weights, [[2.0], [1.0], [0.5]])
    assert not outside.any()


def test_sequence_mask_keeps_unbounded_weights_of_a_response_within() -> None:
    # Geometric means 1, exp(-1) and exp(0.4), the product exp(0.8) = 2.2: only the second row loses its weights.
    trainer = doubles([3, -3], [1, -3], [0.4, 0.4])
    weights, outside = importance_weights(
        trainer, torch.zeros(3, 2), ragged(2, 2, 2), mode="sequence-mask", low=0.5, high=2.0
    )
    assert equal(weights, [[math.exp(3), math.exp(-3)], [0, 0], [math.exp(0.4)] * 2])
    assert outside.tolist() == [[False, False], [True, True], [False, False]]


def test_sequence_truncate_bounds_the_product() -> None:
    # Products exp(0.8) = 2.2 and exp(-0.3), at padding 1
    weights, outside = importance_weights(
        doubles([0.4, 0.4], [-0.3, 9]), torch.zeros(2, 2), ragged(2, 1), mode="sequence-truncate", low=0.5, high=2.0
    )
    assert equal(weights, [[2, 2], [math.exp(-0.3), 1]])
    assert outside.tolist() == [[True, True], [False, False]]


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="icepop"):
        importance_weights(randn(1, 1), randn(1, 1), ragged(1), mode="icepop", low=0.5, high=2.0)  # type: ignore[arg-type]


def test_hand_computed_normalization() -> None:
    # Tokens: (1 + 2 + 3 + 0) / 4 = 1.5. Responses: 2, 0 and an empty one, so (2 + 0) / 2 = 1.
    weights, mask = doubles([1, 2, 3, 9], [0, 9, 9, 9], [9, 9, 9, 9]), ragged(3, 1, 0, width=4)
    assert equal(normalize_weights(weights, mask), [[1 / 1.5, 2 / 1.5, 2, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    assert equal(normalize_weights(weights, mask, by_response=True), [[1, 2, 3, 1], [0, 1, 1, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize("by_response", [False, True])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_normalization_over_processes_equals_one_process(by_response: bool, garbage: float) -> None:
    mask = ragged(4, 0, 2, 1)
    weights = spoil(randn(4, 4).exp(), mask, garbage)
    expected = normalize_weights(weights, mask, by_response=by_response)
    parts = [(weights[:1], mask[:1]), (weights[1:], mask[1:])]
    sent: list[list[Tensor]] = [[], []]
    for number, part in enumerate(parts):  # what each process adds to the two sums
        normalize_weights(*part, by_response=by_response, reduce=lambda x, n=number: sent[n].append(x) or x)
    for number, part in enumerate(parts):
        totals = iter([a + b for a, b in zip(*sent, strict=True)])
        got = normalize_weights(*part, by_response=by_response, reduce=lambda x, t=totals: next(t))
        assert equal(got, expected[:1] if number == 0 else expected[1:])


@pytest.mark.parametrize("mask", [ragged(2, 2), ragged(2, 2) & False])
def test_weights_that_are_all_0_are_not_divided(mask: Tensor) -> None:
    assert equal(normalize_weights(torch.zeros(2, 2), mask), torch.where(mask, 0.0, 1.0))


def slow_kept(gaps: list[float], real: list[bool], statistic: str, low: float | None, high: float) -> list[bool]:
    """Which tokens of one row stay; gaps are engine - trainer."""
    level, estimator = statistic.rsplit("_", 1)
    divergences = []
    for gap in gaps:
        d = min(max(gap, -20.0), 20.0)
        divergences.append({"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator])
    response = [x for x, is_real in zip(divergences, real, strict=True) if is_real]
    kept = []
    for divergence, is_real in zip(divergences, real, strict=True):
        if not is_real:
            kept.append(False)
            continue
        number = {
            "token": divergence,
            "seq_sum": sum(response),
            "seq_mean": sum(response) / len(response),
            "seq_max": max(response),
        }[level]
        if estimator == "k1":
            kept.append(math.log(1 / high if low is None else low) <= number <= math.log(high))
        else:
            kept.append(number <= high)
    return kept


@settings(max_examples=150, deadline=None)
@given(
    rows(),
    st.sampled_from(get_args(RejectionStatistic)),
    st.sampled_from([0.05, 0.3, 1.1, 2.2, 30.0, 1e9]),
    st.booleans(),
)
def test_rejection_equals_the_slow_version(
    batch: tuple[list[list[float]], list[list[bool]]], statistic: RejectionStatistic, high: float, with_low: bool
) -> None:
    low = None
    if statistic.endswith("k1"):
        high = max(high, 1.1)
        low = 0.35 if with_low else None
    gaps, mask = doubles(*batch[0]), torch.tensor(batch[1])
    for garbage in (0.0, math.nan, math.inf):
        engine = spoil(gaps, mask, garbage)
        got = rejection_mask(torch.zeros_like(gaps), engine, mask, statistic, low, high)
        assert got.tolist() == [slow_kept(*row, statistic, low, high) for row in zip(*batch, strict=True)]


def test_hand_computed_rejection() -> None:
    # d = 1, -1 | 0.5, 0.1 with padding; k2 = 0.5, 0.5 | 0.125, 0.005
    engine, mask = doubles([1, -1, 0], [0.5, 0.1, 9]), ragged(3, 2)
    trainer = torch.zeros(2, 3)

    def kept(statistic: RejectionStatistic, low: float | None, high: float) -> list[list[bool]]:
        return rejection_mask(trainer, engine, mask, statistic, low, high).tolist()

    assert kept("token_k1", 0.5, 2.0) == [[False, False, True], [True, True, False]]
    assert kept("token_k1", 0.3, 2.0) == [[False, True, True], [True, True, False]]
    assert kept("seq_sum_k1", None, 1.5) == [[True] * 3, [False] * 3]  # sums 0 and 0.6, log 1.5 = 0.41
    assert kept("seq_mean_k1", None, 1.5) == [[True] * 3, [True, True, False]]  # means 0 and 0.3
    assert kept("seq_max_k2", None, 0.5) == [[True] * 3, [True, True, False]]  # the bound belongs to what is kept
    assert kept("seq_max_k2", None, 0.4) == [[False] * 3, [True, True, False]]
    assert kept("seq_mean_k2", None, 0.1) == [[False] * 3, [True, True, False]]  # 1 / 3, and 0.065
    assert kept("token_k3", None, 0.5) == [[True, False, True], [True, True, False]]  # exp(-1), e - 2, 0 | 0.107, ...


def test_nan_at_a_real_token_is_rejected() -> None:
    engine = doubles([math.nan, 0.0])
    for statistic in get_args(RejectionStatistic):
        kept = rejection_mask(torch.zeros(1, 2), engine, ragged(2), statistic, None, 5.0)
        assert kept.tolist() == [[False, statistic.startswith("token")]]


@pytest.mark.parametrize(
    ("statistic", "low", "high", "message"),
    [
        ("token_k2", 0.5, 2.0, "only an upper bound"),
        ("token_k1", 2.0, 0.5, "the lower one first"),
        ("token_k1", 0.0, 2.0, "positive"),
        ("seq_sum_k3", None, 0.0, "positive"),
        ("seq_max_k1", None, 2.0, "unknown rejection statistic 'seq_max_k1'"),
        ("token_k4", None, 2.0, "unknown rejection statistic 'token_k4'"),
        ("k1", None, 2.0, "unknown rejection statistic 'k1'"),
    ],
)
def test_wrong_rejections_are_refused(statistic: Any, low: float | None, high: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rejection_mask(randn(1, 2), randn(1, 2), ragged(2), statistic, low, high)


LOSS_MASK = ragged(3, 2)
LOSS_INPUTS = (randn(2, 3), randn(2, 3, seed=1), randn(2, 3, seed=2), LOSS_MASK)


def test_policy_loss_is_weighted_per_token_with_unchanged_denominator() -> None:
    weights = doubles([2.0, 0.5, 3.0], [1.5, 0.25, 77.0])
    plain = policy_loss(*LOSS_INPUTS, clip_range=0.2)
    weighted = policy_loss(*LOSS_INPUTS, clip_range=0.2, weights=weights)
    expected = (plain.per_token * weights)[LOSS_MASK].sum() / 5
    assert equal(weighted.loss, expected)
    assert not equal(weighted.loss, plain.loss)
    for name in ("clip_fraction", "approx_kl"):
        assert equal(getattr(weighted, name), getattr(plain, name))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_policy_loss_ignores_weights_at_padding(garbage: float) -> None:
    def loss_and_gradient(weights: Tensor) -> tuple[Any, Any]:
        logprobs = LOSS_INPUTS[0].clone().requires_grad_()
        loss = policy_loss(logprobs, *LOSS_INPUTS[1:], clip_range=0.2, weights=weights).loss
        loss.backward()
        return loss.detach(), logprobs.grad

    weights = randn(2, 3, seed=4).exp()
    loss, gradient = loss_and_gradient(weights)
    corrupted_loss, corrupted_gradient = loss_and_gradient(spoil(weights, LOSS_MASK, garbage))
    assert equal(corrupted_loss, loss)
    assert equal(corrupted_gradient, gradient)
