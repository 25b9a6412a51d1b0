"""Generalized advantage estimation (GAE) and discounted returns, one response per row."""

import torch
from torch import Tensor


def estimate_advantages(
    values: Tensor, rewards: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """GAE (Schulman et al. 2015, equation 16). All [B, T] -> (advantages, returns), both [B, T] and 0 at padding.

    values[t] is the value of the state before action t. The advantages are not whitened, and
    returns = advantages + values. Equal to OpenRLHF v0.5.5 experience_maker.py `get_advantages_and_returns`.
    """
    values = torch.where(mask, values, 0)
    rewards = torch.where(mask, rewards, 0)
    next_value = torch.zeros_like(values[:, 0])
    advantage = torch.zeros_like(values[:, 0])
    columns = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # delta_t = r_t + gamma V_{t+1} - V_t
        advantage = delta + gamma * gae_lambda * advantage  # A_t = delta_t + gamma lambda A_{t+1}
        next_value = values[:, t]
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return torch.where(mask, advantages, 0), torch.where(mask, advantages + values, 0)


def reward_to_go(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each token to the end. [B, T] -> [B, T]. Equal to GAE with zero values and lambda 1."""
    advantages, _ = estimate_advantages(torch.zeros_like(rewards), rewards, mask, gamma=gamma, gae_lambda=1.0)
    return advantages
