import math
from typing import Any

import pytest
import torch
from torch import Tensor

from components.rlhf.maths.importance import importance_weights
from components.rlhf.maths.losses import policy_loss
from tests.support.random_batches import GARBAGE, doubles, equal, ragged, randn, spoil

BOUNDS = {"low": 0.5, "high": 5.0}


class TestWeights:
    def test_by_hand(self) -> None:
        trainer = doubles([math.log(p) for p in (0.4, 0.1, 0.9, 0.3)])
        engine = doubles([math.log(p) for p in (0.2, 0.5, 0.1, 0.3)])
        weights, outside = importance_weights(trainer, engine, ragged(4), **BOUNDS)
        assert equal(weights, [[2.0, 0.5, 5.0, 1.0]])  # 0.2 is raised, 9 is lowered
        assert outside.tolist() == [[False, True, True, False]]

    def test_engines_that_agree_weigh_nothing(self) -> None:
        logprobs = randn(3, 4)
        weights, outside = importance_weights(logprobs, logprobs, ragged(4, 2, 0), **BOUNDS)
        assert equal(weights, torch.ones(3, 4))
        assert not outside.any()

    @pytest.mark.parametrize("garbage", GARBAGE)
    def test_is_one_at_padding_whatever_stands_there(self, garbage: float) -> None:
        mask = ragged(4, 2, 0)
        trainer, engine = (spoil(randn(3, 4, seed=seed), mask, garbage) for seed in (0, 1))
        for pair in ((trainer, engine), (trainer, randn(3, 4)), (randn(3, 4), engine)):
            weights, outside = importance_weights(*pair, mask, **BOUNDS)
            assert (weights[~mask] == 1).all()
            assert not outside[~mask].any()

    def test_a_token_that_the_engine_held_for_impossible_stays_finite(self) -> None:
        weights, outside = importance_weights(doubles([-1.0]), doubles([-2000.0]), ragged(1), **BOUNDS)
        assert equal(weights, [[5.0]])
        assert outside.all()


class TestLoss:
    MASK = ragged(3, 2)
    TENSORS = (randn(2, 3), randn(2, 3, seed=1), randn(2, 3, seed=2), MASK)

    def test_is_weighed_token_by_token_over_the_same_denominator(self) -> None:
        weights = doubles([2.0, 0.5, 3.0], [1.5, 0.25, 77.0])
        plain = policy_loss(*self.TENSORS, clip_range=0.2)
        weighed = policy_loss(*self.TENSORS, clip_range=0.2, weights=weights)
        expected = (plain.per_token * weights)[self.MASK].sum() / 5
        assert equal(weighed.loss, expected)
        assert not equal(weighed.loss, plain.loss)
        for name in ("clip_fraction", "approx_kl"):
            assert equal(getattr(weighed, name), getattr(plain, name))

    @pytest.mark.parametrize("garbage", GARBAGE)
    def test_does_not_see_weights_at_padding(self, garbage: float) -> None:
        def found(weights: Tensor) -> tuple[Any, Any]:
            logprobs = self.TENSORS[0].clone().requires_grad_()
            loss = policy_loss(logprobs, *self.TENSORS[1:], clip_range=0.2, weights=weights).loss
            loss.backward()
            return loss.detach(), logprobs.grad

        weights = randn(2, 3, seed=4).exp()
        loss, gradient = found(weights)
        again, other_gradient = found(spoil(weights, self.MASK, garbage))
        assert equal(again, loss)
        assert equal(other_gradient, gradient)
