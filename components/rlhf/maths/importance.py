"""Truncated importance sampling (TIS) between the trainer and the rollout engine."""

import torch
from torch import Tensor


def importance_weights(
    logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, *, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """exp(logprobs - engine_logprobs) clamped to [low, high], 1 where mask is False; and where the clamp applied (bool).

    All tensors [B, T] -> [B, T], [B, T]. logprobs are the trainer's before any update, so the weights carry no gradient.
    They correct for the rollout engine sampling from a slightly different policy; the truncation trades bias for
    variance (Ionides 2008, "Truncated Importance Sampling"). Equal to `tis` of OpenRLHF 3c3be623 (models/loss.py
    `PolicyLoss`).
    """
    ratio = torch.where(mask, logprobs - engine_logprobs, 0).exp()
    weights = torch.where(mask, ratio.clamp(low, high), 1)
    return weights, mask & ((ratio < low) | (ratio > high))
