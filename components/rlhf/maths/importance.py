"""Corrections for rollouts from a slightly different policy: importance weights and rejected tokens or responses.

The tokens were sampled by the rollout engine (other kernels, another precision, older weights); logprobs are the trainer's
before any update, so neither weights nor masks carry a gradient. All tensors are [B, T], one response per row.
"""

import math
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from components.rlhf.maths.kl import KlEstimator, estimate_kl
from components.rlhf.maths.masked import Reduce, identity

ImportanceMode = Literal["truncate", "mask", "sequence-truncate", "sequence-mask"]
RejectionStatistic = Literal[
    "token_k1", "token_k2", "token_k3",
    "seq_sum_k1", "seq_sum_k2", "seq_sum_k3",
    "seq_mean_k1", "seq_mean_k2", "seq_mean_k3",
    "seq_max_k2", "seq_max_k3",
]  # fmt: skip
LOG_RATIO_BOUND = 20.0  # verl's: keeps exp() of a log-ratio finite


def importance_weights(
    logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, *, mode: ImportanceMode, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Weights of the tokens' losses, 1 where mask is False; and where the bounds [low, high] applied (bool). Both [B, T].

    With w = exp(logprobs - engine_logprobs) per token:

    - truncate: w clamped to the bounds (Ionides 2008, "Truncated Importance Sampling"; OpenRLHF 3c3be623 `tis`; verl `token`
      has only the upper bound). It trades bias for variance.
    - mask: w, or 0 outside the bounds (IcePop; OpenRLHF `icepop`).
    - sequence-truncate: the product of w over the response, clamped, at all of its tokens (verl `sequence`, TRL
      `sequence_truncate`).
    - sequence-mask: w, unclamped, or 0 in the whole response if the geometric mean of w is outside (OpenRLHF `seq-mask-tis`).

    A weight of 0 leaves the denominator of the loss as it is; rejection_mask is for leaving tokens out of both.
    """
    log_ratio = torch.where(mask, logprobs - engine_logprobs, 0)
    ratio = log_ratio.exp()
    match mode:
        case "truncate" | "mask":
            bounded = ratio
        case "sequence-truncate":
            bounded = log_ratio.sum(dim=1, keepdim=True).exp().expand_as(ratio)
        case "sequence-mask":
            bounded = (log_ratio.sum(dim=1, keepdim=True) / _counts(mask)).exp().expand_as(ratio)
        case _:
            raise ValueError(f"unknown importance mode {mode!r}")
    outside = mask & ((bounded < low) | (bounded > high))
    if mode in ("truncate", "sequence-truncate"):
        return torch.where(mask, bounded.clamp(low, high), 1), outside
    return torch.where(mask, ratio, 1).masked_fill(outside, 0), outside


def normalize_weights(weights: Tensor, mask: Tensor, *, by_response: bool = False, reduce: Reduce = identity) -> Tensor:
    """Divide weights [B, T] by their mean over all tokens, or over responses (those of sequence-truncate); 1 at padding.

    A mean of at most 1e-8 divides nothing. `reduce` sums over processes. Equal to verl b178a3cd
    rollout_corr_helper.py `compute_rollout_correction_weights` with rollout_is_batch_normalize.
    """
    total, count = torch.where(mask, weights, 0), mask
    if by_response:
        total, count = total.sum(dim=1) / _counts(mask)[:, 0], mask.any(dim=1)
    mean = reduce(total.sum()) / reduce(count.sum().to(weights.dtype)).clamp(min=1)
    return torch.where(mask, weights / torch.where(mean > 1e-8, mean, 1), 1)


def rejection_mask(
    logprobs: Tensor,
    engine_logprobs: Tensor,
    mask: Tensor,
    statistic: RejectionStatistic,
    low: float | None,
    high: float,
) -> Tensor:
    """The tokens of mask that stay in the loss: those, or those of the responses, within the bounds. Returns [B, T] bool.

    With d = engine_logprobs - logprobs, clamped to 20 nats in both directions, a token has k1 = d, k2 = d^2 / 2 and
    k3 = exp(-d) - 1 + d (maths/kl.py); seq_sum, seq_mean and seq_max are taken over the tokens of a response. k1 is kept where
    log low <= k1 <= log high: the bounds are those of the ratio engine / trainer (of the response's product for seq_sum, of
    its geometric mean for seq_mean), and a low of None is 1 / high. k2 and k3, which are never negative, are kept up to high,
    in nats (for k2 in nats squared), and take no low.

    Equal to verl b178a3cd rollout_corr_helper.py `compute_rollout_rejection_mask`; several statistics are combined with &.
    """
    if statistic not in get_args(RejectionStatistic):
        raise ValueError(f"unknown rejection statistic {statistic!r}")
    level, estimator = statistic.rsplit("_", 1)
    least, most = _rejection_bounds(estimator, low, high)
    gap = torch.where(mask, engine_logprobs - logprobs, 0).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    divergence = estimate_kl(gap, torch.zeros_like(gap), mask, cast(KlEstimator, estimator))
    match level:
        case "token":
            found = divergence
        case "seq_sum":
            found = divergence.sum(dim=1, keepdim=True)
        case "seq_mean":
            found = divergence.sum(dim=1, keepdim=True) / _counts(mask)
        case _:  # seq_max, of k2 and k3 only: padding has their least value, 0
            found = divergence.amax(dim=1, keepdim=True)
    return mask & (found >= least) & (found <= most)


def _rejection_bounds(estimator: str, low: float | None, high: float) -> tuple[float, float]:
    """Bounds of the statistic itself."""
    if high <= 0 or (low is not None and not 0 < low <= high):
        raise ValueError(f"rejection bounds are positive, the lower one first; got low {low} and high {high}")
    if estimator == "k1":
        return math.log(1 / high if low is None else low), math.log(high)
    if low is not None:
        raise ValueError(f"{estimator} is never negative and has only an upper bound: leave low out (got {low})")
    return -math.inf, high


def _counts(mask: Tensor) -> Tensor:
    """Tokens per row, at least 1: [B, T] -> [B, 1]."""
    return mask.sum(dim=1, keepdim=True).clamp(min=1)
