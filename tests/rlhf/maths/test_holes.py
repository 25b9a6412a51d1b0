"""Masks with holes: every number is that of the rows without their holes, computed by an independent slow version."""

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from components.rlhf.maths.advantages import (
    equal_groups,
    estimate_advantages,
    reward_to_go,
    shape_group_scores,
    shape_valid_scores,
)
from components.rlhf.maths.importance import ImportanceMode, RejectionStatistic, importance_weights, rejection_mask
from components.rlhf.maths.kl import KlEstimator, estimate_kl
from components.rlhf.maths.losses import Aggregation, PolicyRatio, aggregate, policy_loss, value_loss
from components.rlhf.maths.masked import masked_mean, whiten
from components.rlhf.maths.rewards import token_rewards
from tests.support.random_batches import doubles, equal, randn

MASKS = st.integers(1, 4).flatmap(
    lambda rows: st.integers(1, 7).flatmap(
        lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows)
    )
)
FRACTIONS = st.sampled_from([0.0, 0.5, 0.9, 1.0])
SEEDS = st.integers(0, 1000)
FEW = settings(max_examples=40, deadline=None)


def rows_of(x: Tensor, mask: Tensor) -> list[list[float]]:
    """The values of each row where the mask is True."""
    return [row[real].tolist() for row, real in zip(x, mask, strict=True)]


def packed(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors without holes, right-padded with nan, and their mask last."""
    lengths = mask.sum(dim=1).tolist()
    width = max(max(lengths), 1)
    found = []
    for x in tensors:
        rows = [row + [math.nan] * (width - len(row)) for row in rows_of(x, mask)]
        found.append(torch.tensor(rows, dtype=torch.float64))
    return [*found, torch.tensor([[t < length for t in range(width)] for length in lengths])]


def batch_of(mask: list[list[bool]], count: int, seed: int) -> tuple[Tensor, ...]:
    """A mask, and tensors that are nan where it is False."""
    real = torch.tensor(mask)
    return (real, *(torch.where(real, randn(*real.shape, seed=seed * 9 + i), math.nan) for i in range(count)))


@FEW
@given(MASKS, FRACTIONS, FRACTIONS, SEEDS)
def test_gae_and_reward_to_go(mask: list[list[bool]], gamma: float, gae_lambda: float, seed: int) -> None:
    real, values, rewards = batch_of(mask, 2, seed)
    advantages, returns = estimate_advantages(values, rewards, real, gamma=gamma, gae_lambda=gae_lambda)
    to_go = reward_to_go(rewards, real, gamma=gamma)
    for row in range(len(mask)):
        v, r = values[row][real[row]].tolist(), rewards[row][real[row]].tolist()
        deltas = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(v))]
        slow = [sum((gamma * gae_lambda) ** (s - t) * deltas[s] for s in range(t, len(v))) for t in range(len(v))]
        assert advantages[row][real[row]].tolist() == pytest.approx(slow, abs=1e-9)
        assert returns[row][real[row]].tolist() == pytest.approx(
            [a + b for a, b in zip(slow, v, strict=True)], abs=1e-9
        )
        expected = [sum(gamma ** (s - t) * r[s] for s in range(t, len(r))) for t in range(len(r))]
        assert to_go[row][real[row]].tolist() == pytest.approx(expected, abs=1e-9)
    assert not torch.stack([advantages, returns, to_go])[:, ~real].any()


@FEW
@given(MASKS, SEEDS)
def test_rewards_whitening_and_kl(mask: list[list[bool]], seed: int) -> None:
    real, logprobs, ref, x = batch_of(mask, 3, seed)
    for estimator in get_args(KlEstimator):
        kl = estimate_kl(logprobs, ref, real, estimator)
        slow = {
            "k1": lambda d: d,
            "k2": lambda d: d * d / 2,
            "k3": lambda d: math.exp(-d) - 1 + d,
        }[estimator]
        for got, a, b in zip(rows_of(kl, real), rows_of(logprobs, real), rows_of(ref, real), strict=True):
            assert got == pytest.approx([slow(p - q) for p, q in zip(a, b, strict=True)], abs=1e-9)
        assert not kl[~real].any()
    scores = randn(len(mask), seed=seed)
    found = rows_of(token_rewards(scores, logprobs, real, kl_coef=0.3), real)
    for got, kls, score in zip(found, rows_of(logprobs, real), scores.tolist(), strict=True):
        expected = [-0.3 * value for value in kls]
        if expected:
            expected[-1] += score  # at the last token of the model, wherever the environment speaks
        assert got == pytest.approx(expected, abs=1e-12)
    every = [value for row in rows_of(x, real) for value in row]
    if every:
        mean = sum(every) / len(every)
        spread = math.sqrt(max(sum((value - mean) ** 2 for value in every) / len(every), 1e-8))
        whitened = [value for row in rows_of(whiten(x, real), real) for value in row]
        assert whitened == pytest.approx([(value - mean) / spread for value in every], abs=1e-6)
        assert masked_mean(x, real).item() == pytest.approx(mean)
    assert not whiten(x, real)[~real].any()


@FEW
@given(MASKS.filter(lambda mask: any(map(any, mask))), SEEDS)
def test_losses_and_their_gradients_are_those_without_holes(mask: list[list[bool]], seed: int) -> None:
    real, logprobs, old, advantages, weights = batch_of(mask, 4, seed)
    short_logprobs, short_old, short_advantages, short_weights, short_mask = packed(
        real, logprobs, old, advantages, weights
    )

    def both(function: Any, x: Tensor, short: Tensor) -> None:
        x, short = (each.clone().requires_grad_() for each in (x, short))
        loss, expected = function(x, False), function(short, True)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
        loss.backward()
        expected.backward()
        assert x.grad is not None and short.grad is not None
        assert not x.grad[~real].any()  # exactly 0, also of nan
        for got, slow in zip(rows_of(x.grad, real), rows_of(short.grad, short_mask), strict=True):
            assert got == pytest.approx(slow, abs=1e-9)

    for aggregation in get_args(Aggregation):
        # The sum over a constant takes it from the settings, not from the width of the batch.
        options: dict[str, Any] = {"aggregation": aggregation, "denominator": 7.0 if "norm" in aggregation else None}
        for ratio in get_args(PolicyRatio):

            def policy(x: Tensor, is_short: bool, ratio: PolicyRatio = ratio, options: Any = options) -> Tensor:
                rest = (short_old, short_advantages, short_mask) if is_short else (old, advantages, real)
                factors = short_weights if is_short else weights
                return policy_loss(x, *rest, clip_range=0.2, ratio=ratio, weights=factors, **options).loss

            both(policy, logprobs, short_logprobs)

        def value(x: Tensor, is_short: bool, options: Any = options) -> Tensor:
            rest = (short_old, short_advantages, short_mask) if is_short else (old, advantages, real)
            return value_loss(x, *rest, value_clip_range=0.2, **options)

        def mean(x: Tensor, is_short: bool, options: Any = options) -> Tensor:
            return aggregate(x, short_mask if is_short else real, **options)

        both(value, logprobs, short_logprobs)
        both(mean, logprobs, short_logprobs)


@FEW
@given(MASKS, SEEDS)
def test_importance_and_rejection_are_those_without_holes(mask: list[list[bool]], seed: int) -> None:
    real, trainer, engine = batch_of(mask, 2, seed)
    short_trainer, short_engine, short_mask = packed(real, trainer, engine)
    for mode in get_args(ImportanceMode):
        weights, outside = importance_weights(trainer, engine, real, mode=mode, low=0.5, high=2.0)
        short, short_outside = importance_weights(short_trainer, short_engine, short_mask, mode=mode, low=0.5, high=2.0)
        assert rows_of(weights, real) == [pytest.approx(row) for row in rows_of(short, short_mask)]
        assert rows_of(outside, real) == rows_of(short_outside, short_mask)
        assert bool((weights[~real] == 1).all()) and not outside[~real].any()
    for statistic in get_args(RejectionStatistic):
        kept = rejection_mask(trainer, engine, real, statistic, None, 1.5)
        short_kept = rejection_mask(short_trainer, short_engine, short_mask, statistic, None, 1.5)
        assert rows_of(kept, real) == rows_of(short_kept, short_mask)
        assert not kept[~real].any()


@pytest.mark.parametrize("method", ["rloo", "group_norm", "dr_grpo", "reinforce++-baseline"])
@FEW
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4), SEEDS)
def test_baselines_are_those_of_the_responses_that_did_not_fail(
    method: Any, valid: list[list[bool]], seed: int
) -> None:
    scores, kept = randn(len(valid), 4, seed=seed).round(decimals=1), torch.tensor(valid)
    shaped, teaches_nothing = shape_valid_scores(scores, kept, method), equal_groups(scores, kept)
    for group in range(len(valid)):
        own = scores[group][kept[group]]
        slow = shape_group_scores(own[None], method)[0] if len(own) > 1 else torch.zeros_like(own)
        assert equal(shaped[group][kept[group]], slow)
        assert not shaped[group][~kept[group]].any()
        assert teaches_nothing[group].item() == (len(set(own.tolist())) < 2)


def test_baseline_by_hand_with_one_failure() -> None:
    # 1 - (4 + 7) / 2, 4 - (1 + 7) / 2 and 7 - (1 + 4) / 2, without the 100 of the failed response
    valid = torch.tensor([[True, True, False, True]])
    assert equal(shape_valid_scores(doubles([1, 4, 100, 7]), valid, "rloo"), [[-4.5, 0, 0, 4.5]])
