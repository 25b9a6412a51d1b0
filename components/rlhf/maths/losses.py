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

Aggregation = Literal["token-mean", "sequence-mean", "sequence-sum", "sequence-sum-norm"]
PolicyRatio = Literal["token", "gspo", "gspo-token", "cispo"]


def denominator_of(mask: Tensor, aggregation: Aggregation = "token-mean") -> Tensor:
    """Denominator of a loss over mask [B, T]: a scalar.

    The number of tokens (token-mean), of rows with at least one token (sequence-mean, sequence-sum), or T (sequence-sum-norm).
    """
    match aggregation:
        case "token-mean":
            return mask.sum()
        case "sequence-mean" | "sequence-sum":
            return mask.any(dim=1).sum()
        case "sequence-sum-norm":
            return torch.tensor(mask.shape[1], device=mask.device)
    raise ValueError(f"unknown aggregation {aggregation!r}")


def aggregate(
    per_token: Tensor, mask: Tensor, aggregation: Aggregation = "token-mean", denominator: Tensor | float | None = None
) -> Tensor:
    """Sum of per_token [B, T], or of its rows' means (sequence-mean), over the denominator: a scalar.

    - token-mean: every token of the batch weighs the same (DAPO).
    - sequence-mean: every row weighs the same (GRPO; OpenRLHF v0.5.5).
    - sequence-sum: the mean over rows of their sums, so that long rows weigh more (RLOO; verl `seq-mean-token-sum`).
    - sequence-sum-norm: the sum of everything over a constant. Without a denominator this is T, as in verl
      (`seq-mean-token-sum-norm`), which grows with the number of rows; rows x longest allowed response is Dr. GRPO.
    """
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
    clip_fraction: (
        Tensor  # scalar, fraction of tokens whose clipped surrogate is the smaller one; of ratios outside, for cispo
    )
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
    ratio: PolicyRatio = "token",
    weights: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    denominator: Tensor | float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7), negated, or one of its later forms. All tensors [B, T].

    clip_range_high widens only the upper bound (DAPO). dual_clip c > 1 bounds the loss by -c * A where A < 0 (Ye et al.
    2020). log_ratio_clamp keeps exp() finite; the gradient beyond it is 0. weights [B, T] multiply the loss of each token
    (maths/importance.py) and do not change the denominator. OpenRLHF v0.5.5 is clip_range 0.2 with
    log_ratio_clamp None and sequence-mean; OpenRLHF 3c3be623 is the default here (models/loss.py `PolicyLoss`).

    ratio is of the token, or one of these:

    - gspo: the geometric mean of the response's ratios, at all of its tokens (Zheng et al. 2025, GSPO, equation 7). Used with
      sequence-mean and clip ranges near 3e-4 (OpenRLHF `gspo`, TRL importance_sampling_level `sequence`).
    - gspo-token: the same number, with the gradient of the token's own log-prob (equation 14; verl `gspo`). Where a response's
      advantages are all equal, it has gspo's gradient.
    - cispo: the loss is -r * A * logprob, where r is the clipped ratio without a gradient, so that no token is left out
      (MiniMax-M1, equation 4; verl `cispo`). A clip_range of 1 has no lower bound, as in the paper and in TRL, whose
      epsilon_high is 1 + clip_range_high. It has no dual_clip (ValueError).
    """
    logprobs, old_logprobs, advantages = (torch.where(mask, x, 0) for x in (logprobs, old_logprobs, advantages))
    log_ratio = logprobs - old_logprobs
    approx_kl = masked_mean(-log_ratio.detach(), mask)
    if ratio in ("gspo", "gspo-token"):
        log_ratio = _sequence_log_ratio(log_ratio, mask, through_token=ratio == "gspo-token")
    if log_ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
    ratios = log_ratio.exp()
    clipped = ratios.clamp(1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high))
    if ratio == "cispo":
        if dual_clip is not None:
            raise ValueError("dual_clip bounds PPO's surrogate; cispo has none: leave dual_clip out")
        per_token, is_clipped = -clipped.detach() * advantages * logprobs, clipped != ratios
    else:
        per_token, is_clipped = _surrogate(ratios * advantages, clipped * advantages, advantages, dual_clip)
    if weights is not None:
        per_token = per_token * torch.where(mask, weights, 1)
    return PolicyLoss(
        loss=aggregate(per_token, mask, aggregation, denominator),
        per_token=per_token,
        clip_fraction=masked_mean(is_clipped.to(logprobs.dtype).detach(), mask),
        approx_kl=approx_kl,
    )


def _sequence_log_ratio(log_ratio: Tensor, mask: Tensor, *, through_token: bool) -> Tensor:
    """The mean of each row's log-ratios (0 at padding), at every token; with its own gradient, or with that of the token."""
    mean = (log_ratio.sum(dim=1) / mask.sum(dim=1).clamp(min=1))[:, None]
    return mean.detach() + (log_ratio - log_ratio.detach()) if through_token else mean.expand_as(log_ratio)


def _surrogate(
    surrogate: Tensor, clipped: Tensor, advantages: Tensor, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """The loss per token, and where the clipped surrogate is the smaller one (before the dual clip)."""
    per_token = -torch.min(surrogate, clipped)
    if dual_clip is not None:
        per_token = torch.where(advantages < 0, torch.min(per_token, -dual_clip * advantages), per_token)
    return per_token, clipped < surrogate


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
