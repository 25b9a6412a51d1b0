"""policy_loss with the ratios of GSPO and CISPO, against a version in plain Python with gradients by hand."""

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from components.rlhf.maths.losses import Aggregation, PolicyLoss, PolicyRatio, policy_loss
from tests.support.random_batches import GARBAGE, doubles, equal, ragged, randn, spoil

RATIOS = get_args(PolicyRatio)
LOW, HIGH = 0.2, 0.3

# Log-ratios of which no mean over up to 5 tokens, and no clamp, is exactly at a bound.
LOG_RATIOS = st.sampled_from([0.0, 0.01, -0.05, 0.1, -0.17, 0.37, -1.3, 2.1, 24.7, -23.9])
ADVANTAGES = st.sampled_from([0.0, 1.0, -1.0, 0.5, -2.5])


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, old_logprobs, advantages [B, T], and a mask with gaps and empty rows."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def table(cells: st.SearchStrategy[Any]) -> Any:
        return draw(
            st.lists(st.lists(cells, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0])
        )

    old = -doubles(*table(st.sampled_from([0.0, 0.5, 3.0, 11.0])))
    mask = torch.tensor(table(st.booleans()))
    return old + doubles(*table(LOG_RATIOS)), old, doubles(*table(ADVANTAGES)), mask


def clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def slow_row(
    new: list[float], old: list[float], advantages: list[float], kind: str, dual_clip: float | None
) -> tuple[list[float], list[float], list[bool]]:
    """Of the real tokens of one row: losses, the derivative of their sum by each log-prob, and which are clipped."""
    gaps = [a - b for a, b in zip(new, old, strict=True)]
    losses, slopes, clipped = [], [0.0] * len(gaps), []
    for t, advantage in enumerate(advantages):
        gap = gaps[t] if kind in ("token", "cispo") else sum(gaps) / len(gaps)
        ratio, moves = math.exp(clamp(gap, -20, 20)), abs(gap) < 20
        bounded = clamp(ratio, 1 - LOW, 1 + HIGH)
        if kind == "cispo":
            losses.append(-bounded * advantage * new[t])
            slopes[t] = -bounded * advantage
            clipped.append(bounded != ratio)
            continue
        loss = max(-ratio * advantage, -bounded * advantage)
        moves = moves and loss == -ratio * advantage  # not where the clipped one is larger
        clipped.append(bounded * advantage < ratio * advantage)
        if dual_clip is not None and advantage < 0 and loss > -dual_clip * advantage:
            loss, moves = -dual_clip * advantage, False
        losses.append(loss)
        if moves and kind == "gspo":
            slopes = [slope - ratio * advantage / len(gaps) for slope in slopes]
        elif moves:
            slopes[t] -= ratio * advantage
    return losses, slopes, clipped


def slow(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], kind: str, aggregation: str, dual_clip: float | None
) -> tuple[float, Tensor, float]:
    """Loss, gradient [B, T] and clip fraction."""
    *numbers, mask = tensors
    gradient, total, clips = torch.zeros_like(numbers[0]), 0.0, []
    counts = mask.sum(dim=1).tolist()
    rows = sum(count > 0 for count in counts)
    whole = {"token-mean": sum(counts), "sequence-mean": rows, "sequence-sum": rows, "sequence-sum-norm": mask.shape[1]}
    for row, count in enumerate(counts):
        if count == 0:
            continue
        real = mask[row]
        losses, slopes, clipped = slow_row(*(x[row][real].tolist() for x in numbers), kind, dual_clip)
        scale = 1 / whole[aggregation] / (count if aggregation == "sequence-mean" else 1)
        total += scale * sum(losses)
        gradient[row, real] = scale * torch.tensor(slopes, dtype=torch.float64)
        clips += clipped
    return total, gradient, sum(clips) / max(len(clips), 1)


def run(tensors: tuple[Tensor, ...], **kwargs: Any) -> tuple[PolicyLoss, Tensor]:
    new, *rest = tensors
    new = new.detach().clone().requires_grad_()
    result = policy_loss(new, *rest, clip_range=LOW, clip_range_high=HIGH, **kwargs)
    result.loss.backward()
    assert new.grad is not None
    return result, new.grad


@settings(max_examples=200, deadline=None)
@given(batches(), st.sampled_from(RATIOS), st.sampled_from(get_args(Aggregation)), st.sampled_from([None, 3.0]))
def test_equals_the_slow_version(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], kind: PolicyRatio, aggregation: Aggregation, dual_clip: float | None
) -> None:
    dual_clip = None if kind == "cispo" else dual_clip
    loss, gradient, clip_fraction = slow(tensors, kind, aggregation, dual_clip)
    *numbers, mask = tensors
    for garbage in (0.0, math.nan, math.inf):
        spoiled = (*(spoil(x, mask, garbage) for x in numbers), mask)
        result, got = run(spoiled, ratio=kind, aggregation=aggregation, dual_clip=dual_clip)
        assert equal(result.loss.detach(), loss) and equal(got, gradient)
        assert equal(result.clip_fraction, clip_fraction)


def test_hand_computed_gspo() -> None:
    # Mean log-ratio (0.3 - 0.1) / 2 = 0.1, so both tokens have the ratio exp(0.1) = 1.105, inside [0.8, 1.3].
    tensors = doubles([-0.7, -1.1]), doubles([-1.0, -1.0]), doubles([1.0, 2.0]), ragged(2)
    s = math.exp(0.1)
    for kind, gradient in (("gspo", [-1.5 * s / 2, -1.5 * s / 2]), ("gspo-token", [-s / 2, -2 * s / 2])):
        result, got = run(tensors, ratio=kind, aggregation="sequence-mean")
        assert equal(result.loss.detach(), -1.5 * s)
        assert equal(got, [gradient])
        assert result.clip_fraction == 0 and equal(result.approx_kl, -0.1)


def test_hand_computed_cispo() -> None:
    # Ratios exp(0.5) -> 1.3 and exp(-0.1): both keep a gradient, -ratio * A.
    tensors = doubles([-0.5, -1.1]), doubles([-1.0, -1.0]), doubles([2.0, -1.0]), ragged(2)
    result, gradient = run(tensors, ratio="cispo")
    assert equal(result.per_token.detach(), [[1.3 * 2 * 0.5, -math.exp(-0.1) * 1.1]])
    assert equal(gradient, [[-1.3 * 2 / 2, math.exp(-0.1) / 2]])
    assert equal(result.clip_fraction, 0.5) and equal(result.approx_kl, -0.2)


def test_cispo_without_a_lower_bound() -> None:
    new = doubles([-9.0]).requires_grad_()
    policy_loss(new, doubles([0.0]), doubles([1.0]), ragged(1), clip_range=1.0, ratio="cispo").loss.backward()
    assert equal(new.grad, [[-math.exp(-9)]])


def test_cispo_has_no_dual_clip() -> None:
    with pytest.raises(ValueError, match="dual_clip"):
        run((randn(1, 2), randn(1, 2), randn(1, 2), ragged(2)), ratio="cispo", dual_clip=3.0)


def test_both_forms_of_gspo_agree_where_a_response_has_one_advantage() -> None:
    mask = ragged(4, 1, 0, 3)
    old, advantages = randn(4, 4), randn(4, 1, seed=1).expand(4, 4)
    tensors = old + 0.2 * randn(4, 4, seed=2), old, advantages, mask
    (one, first), (other, second) = (
        run(tensors, ratio=kind, aggregation="sequence-mean") for kind in ("gspo", "gspo-token")
    )
    assert equal(one.loss.detach(), other.loss.detach()) and equal(first, second)
    assert bool(first[mask].any())


@pytest.mark.parametrize("kind", RATIOS)
def test_first_step_has_the_policy_gradient(kind: PolicyRatio) -> None:
    """Where nothing has been updated every ratio is 1, and the gradient that of REINFORCE (gspo: of the row's mean advantage)."""
    mask, new, advantages = ragged(4, 1, 0, 3), randn(4, 4), randn(4, 4, seed=1)
    result, gradient = run((new, new, advantages, mask), ratio=kind)
    real = torch.where(mask, advantages, 0)
    if kind == "gspo":
        real = torch.where(mask, (real.sum(dim=1) / mask.sum(dim=1).clamp(min=1))[:, None], 0)
    assert equal(gradient, -real / mask.sum())
    assert result.clip_fraction == 0 and result.approx_kl == 0


@pytest.mark.parametrize("kind", RATIOS)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_every_input_may_hold_anything_at_padding(kind: PolicyRatio, garbage: float) -> None:
    mask = ragged(4, 1, 0, 3) & (torch.arange(4) != 1)  # with a gap
    tensors, weights = [randn(4, 4, seed=seed) for seed in range(3)], randn(4, 4, seed=3).exp()
    expected, gradient = run((*tensors, mask), ratio=kind, weights=weights)
    for spoiled in range(4):
        inputs = [spoil(x, mask, garbage) if i == spoiled else x for i, x in enumerate((*tensors, weights))]
        got, got_gradient = run((*inputs[:3], mask), ratio=kind, weights=inputs[3])
        assert equal(got.loss.detach(), expected.loss.detach()) and equal(got_gradient, gradient)
        assert equal(got.clip_fraction, expected.clip_fraction) and equal(got.approx_kl, expected.approx_kl)
