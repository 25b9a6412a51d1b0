"""Advantages: generalized advantage estimation (GAE), discounted returns, and baselines of a group of samples per prompt."""

from typing import Literal

import torch
from torch import Tensor

GroupBaseline = Literal["rloo", "group_norm", "dr_grpo", "reinforce++-baseline", "opo"]


def estimate_advantages(
    values: Tensor, rewards: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """GAE (Schulman et al. 2015, equation 16). All [B, T] -> (advantages, returns), both [B, T] and 0 where mask is False.

    values[t] is the value of the state before action t. The advantages are not whitened, and
    returns = advantages + values. Equal to OpenRLHF v0.5.5 experience_maker.py `get_advantages_and_returns`.

    Where mask is False between two actions, no time passes: the state after an action is the one before the next action, as if
    each row had only its True columns (verl b178a3cd core_algos.py `compute_gae_advantage_return`).
    """
    values = torch.where(mask, values, 0)
    rewards = torch.where(mask, rewards, 0)
    next_value = torch.zeros_like(values[:, 0])
    advantage = torch.zeros_like(values[:, 0])
    columns = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # delta_t = r_t + gamma V_{t+1} - V_t
        # A_t = delta_t + gamma lambda A_{t+1}
        advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return torch.where(mask, advantages, 0), torch.where(mask, advantages + values, 0)


def reward_to_go(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each token to the end. [B, T] -> [B, T]. Equal to GAE with zero values and lambda 1.

    Columns where mask is False are 0 and discount nothing.
    """
    advantages, _ = estimate_advantages(torch.zeros_like(rewards), rewards, mask, gamma=gamma, gae_lambda=1.0)
    return advantages


def shape_group_scores(
    scores: Tensor, method: GroupBaseline, *, eps: float = 1e-9, lengths: Tensor | None = None
) -> Tensor:
    """Subtract from each score a baseline of the N samples of its prompt. scores [P, N] -> [P, N].

    - rloo: the mean of the other samples' scores (Ahmadian et al. 2024, "Back to Basics").
    - group_norm: the mean of the group, then division by its standard deviation + eps (Shao et al. 2024, GRPO), with Bessel's
      correction. eps is 1e-9 in OpenRLHF 3c3be623, 1e-6 in verl and 1e-4 in TRL.
    - dr_grpo: the mean of the group (Liu et al. 2025, "Understanding R1-Zero-Like Training").
    - reinforce++-baseline: the mean of the group; the caller whitens the advantages over the whole batch (Hu et al. 2025).
    - opo: the mean weighted by the lengths [P, N] of the responses (Hao et al. 2025, "On-Policy RL with Optimal Reward
      Baseline"), as verl b178a3cd computes it.

    A group of equal scores is exactly 0: in floating point its mean may differ from its scores, and group_norm would blow this
    rounding error up to advantages of about 1. Raises ValueError for N = 1, which has no baseline: OpenRLHF divides 0 by 0
    (rloo, group_norm) or returns 0 for every sample, and verl silently leaves the score without a baseline.
    """
    num_samples = scores.shape[1]
    if num_samples < 2:
        raise ValueError(
            f"{method} compares the samples of one prompt: it needs at least 2 per prompt, not {num_samples}"
        )
    mean = scores.mean(dim=1, keepdim=True)
    match method:
        case "rloo":
            shaped = scores - (scores.sum(dim=1, keepdim=True) - scores) / (num_samples - 1)
        case "group_norm":
            shaped = (scores - mean) / (scores.std(dim=1, keepdim=True) + eps)
        case "dr_grpo" | "reinforce++-baseline":
            shaped = scores - mean
        case "opo":
            if lengths is None:
                raise ValueError("opo weighs scores by the lengths of the responses: pass lengths [P, N]")
            weight = lengths.to(scores.dtype)
            shaped = scores - (weight * scores).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1)
        case _:
            raise ValueError(f"unknown baseline {method!r}")
    return torch.where(equal_groups(scores)[:, None], 0, shaped)


def shape_valid_scores(scores: Tensor, valid: Tensor, method: GroupBaseline) -> Tensor:
    """shape_group_scores() of the samples that are valid [P, N] bool, as if the others had not been drawn. Returns [P, N].

    The others are 0, and so is a sample without a valid other one, which has no baseline.
    """
    shaped = shape_group_scores(scores, method)
    for group in (~valid).any(dim=1).nonzero().flatten().tolist():
        kept, shaped[group] = valid[group], 0
        if kept.sum() > 1:
            shaped[group, kept] = shape_group_scores(scores[group, kept][None], method)[0]
    return shaped


def equal_groups(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Prompts whose samples all have exactly the same score, and so teach nothing. scores [P, N] -> [P] bool; nan equals nothing.

    Samples that are not valid [P, N] bool do not count.
    """
    if valid is None:
        return (scores == scores[:, :1]).all(dim=1)
    first = scores.gather(1, valid.int().argmax(dim=1, keepdim=True))
    return ((scores == first) | ~valid).all(dim=1)
