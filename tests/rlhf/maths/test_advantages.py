import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from components.rlhf.maths.advantages import estimate_advantages, reward_to_go
from tests.support.random_batches import GARBAGE, doubles, equal, ragged, randn, spoil

MASK = ragged(4, 1, 0, 3)
VALUES, REWARDS = randn(4, 4), randn(4, 4, seed=1)

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any)
FRACTIONS = st.sampled_from([0.0, 0.5, 0.9, 0.95, 1.0])


def explicit_sum(values: Tensor, rewards: Tensor, length: int, gamma: float, gae_lambda: float) -> list[float]:
    """A_t = sum over l of (gamma lambda)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), for one row, without a recursion."""
    advantages = []
    for t in range(length):
        total = 0.0
        for k in range(t, length):
            next_value = float(values[k + 1]) if k + 1 < length else 0.0
            delta = float(rewards[k]) + gamma * next_value - float(values[k])
            total += (gamma * gae_lambda) ** (k - t) * delta
        advantages.append(total)
    return advantages


def test_hand_computed_gae() -> None:
    # deltas: 1 + 0.5 * 4 - 2 = 1, 3 + 0.5 * 6 - 4 = 2, 5 - 6 = -1; gamma lambda = 0.5 * 0.8 = 0.4
    # A_2 = -1, A_1 = 2 + 0.4 * -1 = 1.6, A_0 = 1 + 0.4 * 1.6 = 1.64; returns = A + V
    values, rewards = doubles([2, 4, 6]), doubles([1, 3, 5])
    advantages, returns = estimate_advantages(values, rewards, ragged(3), gamma=0.5, gae_lambda=0.8)
    assert equal(advantages, [[1.64, 1.6, -1]])
    assert equal(returns, [[3.64, 5.6, 5]])


@settings(max_examples=50, deadline=None)
@given(LENGTHS, FRACTIONS, FRACTIONS, st.integers(0, 99))
def test_equals_explicit_explicit_sum(lengths: list[int], gamma: float, gae_lambda: float, seed: int) -> None:
    mask = ragged(*lengths)
    values, rewards = randn(*mask.shape, seed=seed), randn(*mask.shape, seed=seed + 100)
    advantages, returns = estimate_advantages(values, rewards, mask, gamma=gamma, gae_lambda=gae_lambda)
    for row, length in enumerate(lengths):
        expected = explicit_sum(values[row], rewards[row], length, gamma, gae_lambda)
        assert equal(advantages[row, :length], expected)
        assert equal(returns[row, :length], doubles(expected)[0] + values[row, :length])


def test_gamma_1_lambda_1_telescopes() -> None:
    """Intermediate values cancel: advantage = undiscounted reward-to-go minus value."""
    advantages, returns = estimate_advantages(VALUES, REWARDS, MASK, gamma=1.0, gae_lambda=1.0)
    real_rewards = torch.where(MASK, REWARDS, 0)
    to_go = real_rewards.flip(1).cumsum(dim=1).flip(1)
    assert equal(advantages, torch.where(MASK, to_go - VALUES, 0))
    assert equal(returns, torch.where(MASK, to_go, 0))


def test_lambda_0_is_the_one_step_td_error() -> None:
    advantages, _ = estimate_advantages(VALUES, REWARDS, MASK, gamma=0.9, gae_lambda=0.0)
    values = torch.where(MASK, VALUES, 0)
    next_values = torch.cat([values[:, 1:], torch.zeros(4, 1)], dim=1)
    assert equal(advantages, torch.where(MASK, REWARDS + 0.9 * next_values - VALUES, 0))


def test_gap_in_mask_is_no_step() -> None:
    # t = 2: A = 5 - 6 = -1; t = 0: 1 + 0.5 * 6 - 2 + 0.4 * -1 = 1.6
    mask = torch.tensor([[True, False, True]])
    advantages, returns = estimate_advantages(doubles([2, 99, 6]), doubles([1, 99, 5]), mask, gamma=0.5, gae_lambda=0.8)
    assert equal(advantages, [[1.6, 0, -1]])
    assert equal(returns, [[3.6, 0, 5]])


def test_hand_computed_reward_to_go() -> None:
    # 4; 2 + 0.5 * 4 = 4; 1 + 0.5 * 4 = 3
    got = reward_to_go(doubles([1, 2, 4, 9], [8, 9, 9, 9]), ragged(3, 1, width=4), gamma=0.5)
    assert equal(got, [[3, 4, 4, 0], [8, 0, 0, 0]])


@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_changes_nothing(garbage: float) -> None:
    corrupted = spoil(VALUES, MASK, garbage), spoil(REWARDS, MASK, garbage)
    got = estimate_advantages(*corrupted, MASK, gamma=0.9, gae_lambda=0.95)
    expected = estimate_advantages(VALUES, REWARDS, MASK, gamma=0.9, gae_lambda=0.95)
    for one, other in zip(got, expected, strict=True):
        assert equal(one, other) and bool((one[~MASK] == 0).all())
    assert equal(reward_to_go(corrupted[1], MASK, gamma=0.9), reward_to_go(REWARDS, MASK, gamma=0.9))


def test_more_padding_changes_nothing() -> None:
    wide = torch.nn.functional.pad
    got = estimate_advantages(
        wide(VALUES, (0, 3)), wide(REWARDS, (0, 3)), wide(MASK, (0, 3)), gamma=0.9, gae_lambda=0.95
    )
    expected = estimate_advantages(VALUES, REWARDS, MASK, gamma=0.9, gae_lambda=0.95)
    assert all(equal(one[:, :4], other) for one, other in zip(got, expected, strict=True))


def test_permuting_the_batch_permutes_the_result() -> None:
    order = torch.tensor([2, 0, 3, 1])
    got = estimate_advantages(VALUES[order], REWARDS[order], MASK[order], gamma=0.9, gae_lambda=0.95)
    expected = estimate_advantages(VALUES, REWARDS, MASK, gamma=0.9, gae_lambda=0.95)
    assert all(equal(one, other[order]) for one, other in zip(got, expected, strict=True))
