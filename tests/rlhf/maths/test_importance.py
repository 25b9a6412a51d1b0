import math
from typing import Any

import pytest
import torch
from torch import Tensor

from components.rlhf.maths.importance import importance_weights
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
