"""The losses of RLHF. Each takes tensors and a denominator, so that losses of microbatches and processes add up exactly.

With the denominator of the whole minibatch, the losses of all its microbatches (in all processes) sum to the loss of the
minibatch. Without a denominator, the given batch is the whole minibatch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from components.rlhf.maths.masked import masked_mean

Aggregation = Literal["token-mean", "sequence-mean"]


def denominator_of(mask: Tensor, aggregation: Aggregation = "token-mean") -> Tensor:
    """Denominator of a loss over mask [B, T]: the number of tokens, or of rows with at least one token. Returns a scalar."""
    return mask.sum() if aggregation == "token-mean" else mask.any(dim=1).sum()


def aggregate(
    per_token: Tensor, mask: Tensor, aggregation: Aggregation = "token-mean", denominator: Tensor | float | None = None
) -> Tensor:
    """Sum of per_token [B, T] (token-mean), or of its rows' means (sequence-mean), over the denominator: a scalar."""
    if denominator is None:
        denominator = denominator_of(mask, aggregation).clamp(min=1)
    total = torch.where(mask, per_token, 0)
    if aggregation == "sequence-mean":
        total = total.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return total.sum() / denominator


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    loss: Tensor  # scalar, carries the gradient
    per_token: Tensor  # [B, T], before aggregation, undefined at padding
    clip_fraction: Tensor  # scalar, fraction of tokens whose clipped surrogate is the smaller one
    approx_kl: Tensor  # scalar, mean of old_logprobs - logprobs: nats per token


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    weights: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    denominator: Tensor | float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7), negated. All tensors [B, T].

    clip_range_high widens only the upper bound (DAPO). dual_clip c > 1 bounds the loss by -c * A where A < 0 (Ye et al.
    2020). log_ratio_clamp keeps exp() finite; the gradient beyond it is 0. weights [B, T] multiply the loss of each token
    (maths/importance.py) and do not change the denominator. OpenRLHF v0.5.5 is clip_range 0.2 with
    log_ratio_clamp None and sequence-mean; OpenRLHF 3c3be623 is the default here (models/loss.py `PolicyLoss`).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    approx_kl = masked_mean(-log_ratio.detach(), mask)
    if log_ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
    ratio = log_ratio.exp()
    high = clip_range if clip_range_high is None else clip_range_high
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + high) * advantages
    per_token = -torch.min(surrogate, clipped)
    if dual_clip is not None:
        per_token = torch.where(advantages < 0, torch.min(per_token, -dual_clip * advantages), per_token)
    if weights is not None:
        per_token = per_token * weights
    return PolicyLoss(
        loss=aggregate(per_token, mask, aggregation, denominator),
        per_token=per_token,
        clip_fraction=masked_mean((clipped < surrogate).to(logprobs.dtype).detach(), mask),
        approx_kl=approx_kl,
    )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    value_clip_range: float | None,
    aggregation: Aggregation = "token-mean",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Half the squared error to the returns; with a clip range, the maximum of the unclipped and the clipped error.

    All tensors [B, T]; returns a scalar. Equal to OpenRLHF models/loss.py `ValueLoss` (v0.5.5: sequence-mean, clip 0.2;
    3c3be623: token-mean).
    """
    # Mask before squaring: where padding holds nan, the gradient of its square is nan even behind a mask.
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    per_token = (values - returns) ** 2
    if value_clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
        per_token = torch.max(per_token, (clipped - returns) ** 2)
    return 0.5 * aggregate(per_token, mask, aggregation, denominator)


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) per pair (Bradley-Terry). Scores [*] -> [*], not averaged."""
    difference = chosen - rejected
    return -F.logsigmoid(difference if margin is None else difference - margin)
