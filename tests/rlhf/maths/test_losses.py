import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from components.rlhf.maths.losses import Aggregation, aggregate, denominator_of, pairwise_loss, policy_loss, value_loss
from tests.support.random_batches import GARBAGE, doubles, equal, ragged, randn, spoil

AGGREGATIONS = get_args(Aggregation)
MASK = ragged(4, 1, 0, 3)
NEW, OLD, OTHER = (randn(4, 4, seed=seed) for seed in range(3))

# Losses as functions (new, old, advantages or returns, mask) -> scalar, where only new has a gradient.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "policy": lambda *tensors, **kwargs: policy_loss(*tensors, clip_range=0.2, **kwargs).loss,
    "policy, every clip": lambda *tensors, **kwargs: (
        policy_loss(*tensors, clip_range=0.2, clip_range_high=0.3, dual_clip=1.5, log_ratio_clamp=2.0, **kwargs).loss
    ),
    "policy, no clamp": lambda *tensors, **kwargs: (
        policy_loss(*tensors, clip_range=0.2, log_ratio_clamp=None, **kwargs).loss
    ),
    "policy, gspo": lambda *tensors, **kwargs: policy_loss(*tensors, clip_range=0.2, ratio="gspo", **kwargs).loss,
    "policy, gspo by token": lambda *tensors, **kwargs: (
        policy_loss(*tensors, clip_range=0.2, dual_clip=1.5, ratio="gspo-token", **kwargs).loss
    ),
    "policy, cispo": lambda *tensors, **kwargs: policy_loss(*tensors, clip_range=0.2, ratio="cispo", **kwargs).loss,
    "value": lambda *tensors, **kwargs: value_loss(*tensors, value_clip_range=0.2, **kwargs),
    "value, no clip": lambda *tensors, **kwargs: value_loss(*tensors, value_clip_range=None, **kwargs),
}
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
EVERY_AGGREGATION = pytest.mark.parametrize("aggregation", AGGREGATIONS)


def loss_and_gradient(loss: Callable[..., Tensor], new: Tensor, *rest: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    new = new.detach().clone().requires_grad_()
    result = loss(new, *rest, **kwargs)
    result.backward()
    return result.detach(), new.grad


def one_token(ratio: float, advantage: float, **kwargs: Any) -> tuple[float, float]:
    """Policy loss of one token and its gradient with respect to the log-prob; unclipped, both are -advantage * ratio."""
    loss, gradient = loss_and_gradient(
        lambda *tensors: policy_loss(*tensors, **kwargs).loss,
        doubles([math.log(ratio)]),
        doubles([0.0]),
        doubles([advantage]),
        ragged(1),
    )
    return loss.item(), gradient.item()


# Rows [1, 3] and [2, 2, 2, 6], and one without tokens.
PER_TOKEN, ROWS = doubles([1, 3, 99, 99], [2, 2, 2, 6], [99] * 4), ragged(2, 4, 0)


@pytest.mark.parametrize(
    ("aggregation", "denominator", "expected"),
    [
        ("token-mean", None, 16 / 6),
        ("sequence-mean", None, (2 + 3) / 2),  # the empty row is not counted
        ("sequence-sum", None, (4 + 12) / 2),
        ("sequence-sum-norm", None, 16 / 4),  # T is 4
        ("token-mean", 10.0, 1.6),
        ("sequence-sum", 5, 16 / 5),
        ("sequence-sum-norm", 3 * 8, 16 / 24),  # 3 rows of up to 8 tokens
        ("sequence-mean", torch.tensor(4), 5 / 4),
    ],
)
def test_hand_computed_aggregation(aggregation: Aggregation, denominator: float | None, expected: float) -> None:
    assert equal(aggregate(PER_TOKEN, ROWS, aggregation, denominator), expected)


def test_denominators() -> None:
    assert denominator_of(ROWS) == denominator_of(ROWS, "token-mean") == 6
    assert denominator_of(ROWS, "sequence-mean") == denominator_of(ROWS, "sequence-sum") == 2
    assert denominator_of(ROWS, "sequence-sum-norm") == 4
    with pytest.raises(ValueError, match="token-sum"):
        denominator_of(ROWS, "token-sum")  # type: ignore[arg-type]


@EVERY_LOSS
@EVERY_AGGREGATION
def test_microbatch_losses_sum_to_the_minibatch_loss(loss: Callable[..., Tensor], aggregation: Aggregation) -> None:
    tensors = NEW, OLD, OTHER, MASK
    whole_loss, whole_gradient = loss_and_gradient(loss, *tensors, aggregation=aggregation)
    denominator = denominator_of(MASK, aggregation)
    for cuts in ([1, 3], [2, 2], [1, 1, 1, 1]):
        parts = zip(*(x.split(cuts) for x in tensors), strict=True)
        results = [loss_and_gradient(loss, *p, aggregation=aggregation, denominator=denominator) for p in parts]
        assert equal(torch.stack([part_loss for part_loss, _ in results]).sum(), whole_loss)
        assert equal(torch.cat([gradient for _, gradient in results]), whole_gradient)


@EVERY_LOSS
@EVERY_AGGREGATION
@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_changes_nothing(loss: Callable[..., Tensor], aggregation: Aggregation, garbage: float) -> None:
    expected_loss, expected_gradient = loss_and_gradient(loss, NEW, OLD, OTHER, MASK, aggregation=aggregation)
    corrupted = (spoil(x, MASK, garbage) for x in (NEW, OLD, OTHER))
    got_loss, got_gradient = loss_and_gradient(loss, *corrupted, MASK, aggregation=aggregation)
    assert equal(got_loss, expected_loss)
    assert equal(got_gradient, expected_gradient) and bool((got_gradient[~MASK] == 0).all())


@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_does_not_change_policy_metrics(garbage: float) -> None:
    corrupted = (spoil(x, MASK, garbage) for x in (NEW, OLD, OTHER))
    got = policy_loss(*corrupted, MASK, clip_range=0.2)
    expected = policy_loss(NEW, OLD, OTHER, MASK, clip_range=0.2)
    assert equal(got.clip_fraction, expected.clip_fraction) and equal(got.approx_kl, expected.approx_kl)


@EVERY_LOSS
@EVERY_AGGREGATION
def test_permuting_the_batch_permutes_the_gradient(loss: Callable[..., Tensor], aggregation: Aggregation) -> None:
    order = torch.tensor([2, 0, 3, 1])
    whole_loss, whole_gradient = loss_and_gradient(loss, NEW, OLD, OTHER, MASK, aggregation=aggregation)
    tensors = (x[order] for x in (NEW, OLD, OTHER, MASK))
    got_loss, got_gradient = loss_and_gradient(loss, *tensors, aggregation=aggregation)
    assert equal(got_loss, whole_loss) and equal(got_gradient, whole_gradient[order])


@EVERY_LOSS
@EVERY_AGGREGATION
def test_batch_without_tokens_has_zero_loss(loss: Callable[..., Tensor], aggregation: Aggregation) -> None:
    for denominator in (None, 7.0):
        kwargs = {"aggregation": aggregation, "denominator": denominator}
        got, gradient = loss_and_gradient(loss, NEW, OLD, OTHER, MASK & False, **kwargs)
        assert got == 0 and equal(gradient, torch.zeros(4, 4))


def test_hand_computed_policy_loss() -> None:
    # ratios exp(0.3) = 1.349859, exp(-0.4) = 0.670320, 1, exp(1.1) = 3.004166; advantages 1, -1, 2, -2
    # -1.2 (clipped), 0.8 (clipped), -2, 6.008332 (the clipped 2.4 is not the worse one)
    new, old, advantages = doubles([-0.7, -0.9, -2, 0.9]), doubles([-1, -0.5, -2, -0.2]), doubles([1, -1, 2, -2])
    result = policy_loss(new, old, advantages, ragged(4), clip_range=0.2)
    assert equal(result.per_token, [[-1.2, 0.8, -2, 2 * math.exp(1.1)]])
    assert equal(result.loss, (-1.2 + 0.8 - 2 + 2 * math.exp(1.1)) / 4)
    assert equal(result.clip_fraction, 2 / 4)
    assert equal(result.approx_kl, (-0.3 + 0.4 + 0 - 1.1) / 4)
    dual = policy_loss(new, old, advantages, ragged(4), clip_range=0.2, dual_clip=3.0)
    assert equal(dual.per_token, [[-1.2, 0.8, -2, 6]])  # at most 3 * 2
    assert equal(dual.clip_fraction, 2 / 4)


def test_ratio_1_gives_minus_the_mean_advantage() -> None:
    loss, gradient = loss_and_gradient(LOSSES["policy, every clip"], NEW, NEW, OTHER, MASK)
    assert equal(loss, -OTHER[MASK].mean())
    assert equal(gradient, torch.where(MASK, -OTHER / MASK.sum(), 0))


@pytest.mark.parametrize("name", ["policy", "policy, every clip", "policy, no clamp"])
def test_zero_advantage_gives_zero_gradient(name: str) -> None:
    _, gradient = loss_and_gradient(LOSSES[name], NEW, OLD, torch.zeros(4, 4), MASK)
    assert equal(gradient, torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("ratio", "advantage", "kwargs", "loss", "gradient"),
    [
        (1.5, 2.0, {}, -2.4, 0.0),  # positive advantage, ratio above the range: clipped
        (0.5, 2.0, {}, -1.0, -1.0),  # positive advantage, ratio below the range: not clipped
        (0.5, -2.0, {}, 1.6, 0.0),  # negative advantage, ratio below the range: clipped
        (1.5, -2.0, {}, 3.0, 3.0),  # negative advantage, ratio above the range: not clipped
        (1.1, 2.0, {}, -2.2, -2.2),  # inside the bounds
        (0.9, -2.0, {}, 1.8, 1.8),
        (1.5, 2.0, {"clip_range_high": 0.6}, -3.0, -3.0),  # only the upper bound is wider
        (0.5, -2.0, {"clip_range_high": 0.6}, 1.6, 0.0),
        (4.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0),  # negative advantage, ratio above dual_clip
        (2.5, -2.0, {"dual_clip": 3.0}, 5.0, 5.0),
        (0.1, 2.0, {"dual_clip": 3.0}, -0.2, -0.2),  # dual_clip does not apply to a positive advantage
        (4.0, 2.0, {"dual_clip": 3.0}, -2.4, 0.0),
    ],
)
def test_each_clip_zeroes_the_gradient_on_its_side(
    ratio: float, advantage: float, kwargs: dict[str, float], loss: float, gradient: float
) -> None:
    assert one_token(ratio, advantage, clip_range=0.2, **kwargs) == pytest.approx((loss, gradient), abs=1e-12)


def test_log_ratio_is_clamped_at_20_by_default() -> None:
    assert one_token(math.exp(25), -1.0, clip_range=0.2) == pytest.approx((math.exp(20), 0.0))
    assert one_token(math.exp(-25), 1.0, clip_range=0.2) == pytest.approx((-math.exp(-20), 0.0))
    free = one_token(math.exp(25), -1.0, clip_range=0.2, log_ratio_clamp=None)
    assert free == pytest.approx((math.exp(25), math.exp(25)))
    # approx_kl is that of the policies, not of the clamped ratio.
    result = policy_loss(doubles([-25]), doubles([0]), doubles([1]), ragged(1), clip_range=0.2)
    assert equal(result.approx_kl, 25.0)


def test_metrics_carry_no_gradient() -> None:
    result = policy_loss(NEW.clone().requires_grad_(), OLD, OTHER, MASK, clip_range=0.2)
    assert result.loss.requires_grad
    assert not result.clip_fraction.requires_grad and not result.approx_kl.requires_grad


VALUE_HAND = doubles([0.9, 0.35, 0.1, 0.25]), doubles([0.5, 0.4, 0.3, 0.2]), doubles([1, 0, 1, 0]), ragged(4)


def test_hand_computed_value_loss() -> None:
    # clipped values 0.7, 0.35, 0.1, 0.25: the worse squares are 0.3^2, 0.35^2, 0.9^2, 0.25^2
    assert equal(value_loss(*VALUE_HAND, value_clip_range=0.2), 0.5 * (0.09 + 0.1225 + 0.81 + 0.0625) / 4)
    # without a clip the first is 0.1^2
    assert equal(value_loss(*VALUE_HAND, value_clip_range=None), 0.5 * (0.01 + 0.1225 + 0.81 + 0.0625) / 4)


def test_value_clip_zeroes_the_gradient_of_an_overshooting_step() -> None:
    # Where the clipped value is the worse one the gradient is 0; elsewhere it is (value - return) / 4.
    _, gradient = loss_and_gradient(LOSSES["value"], *VALUE_HAND)
    assert equal(gradient, [[0, 0.35 / 4, -0.9 / 4, 0.25 / 4]])
    _, free = loss_and_gradient(LOSSES["value, no clip"], *VALUE_HAND)
    assert equal(free, [[-0.1 / 4, 0.35 / 4, -0.9 / 4, 0.25 / 4]])


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["upwards", "downwards"])
def test_value_clip_bounds_the_step_in_both_directions(sign: float) -> None:
    # From 0.5 to 0.9 with a return of 1: the clipped value 0.7 is the worse one, so 0.5 * 0.3^2 and no gradient.
    new, old, returns = (sign * doubles([x]) for x in (0.9, 0.5, 1.0))
    loss, gradient = loss_and_gradient(LOSSES["value"], new, old, returns, ragged(1))
    assert equal(loss, 0.5 * 0.09) and equal(gradient, [[0]])


def test_value_clip_can_only_raise_the_loss() -> None:
    free = value_loss(NEW, OLD, OTHER, MASK, value_clip_range=None)
    for clip in (0.0, 0.1, 0.5, 2.0):
        assert value_loss(NEW, OLD, OTHER, MASK, value_clip_range=clip) >= free
    assert equal(value_loss(NEW, OLD, OTHER, MASK, value_clip_range=100.0), free)


def test_hand_computed_pairwise_loss() -> None:
    # log(1 + exp(-(1.5 - 0.5))), and with a margin log(1 + exp(-(1.5 - 0.5 - 0.5)))
    chosen, rejected = doubles([1.5])[0], doubles([0.5])[0]
    assert equal(pairwise_loss(chosen, rejected), [math.log1p(math.exp(-1))])
    assert equal(pairwise_loss(chosen, rejected, torch.tensor([0.5])), [math.log1p(math.exp(-0.5))])


def test_pairwise_loss_gradient() -> None:
    chosen, rejected = (x.flatten().clone().requires_grad_() for x in (NEW, OLD))
    margin = OTHER.flatten()
    pairwise_loss(chosen, rejected, margin).sum().backward()
    wrong = torch.sigmoid(rejected - chosen + margin).detach()  # the probability that the model prefers the rejected
    assert equal(chosen.grad, -wrong) and equal(rejected.grad, wrong)


def test_pairwise_loss_is_finite_for_large_differences() -> None:
    far = doubles([1000, -1000])[0]
    assert equal(pairwise_loss(far, -far), [0, 2000])


def test_swapping_a_pair_changes_the_loss_by_the_difference() -> None:
    assert equal(pairwise_loss(NEW, OLD) - pairwise_loss(OLD, NEW), OLD - NEW)
