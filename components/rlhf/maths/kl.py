"""Per-token KL estimators between the policy and the reference, and the adaptive KL controller.

With d = log pi(token) - log ref(token), tokens sampled from pi (Schulman, "Approximating KL divergence", 2020):
k1 = d (unbiased), k2 = d^2 / 2, k3 = exp(-d) - 1 + d (unbiased, never negative).
"""

import math
from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]


def estimate_kl(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: KlEstimator = "k1", clamp: float | None = None
) -> Tensor:
    """KL estimate per token in nats; 0 where mask is False. All [B, T] -> [B, T].

    clamp bounds the estimate to [-clamp, clamp]: None is OpenRLHF v0.5.5, 10.0 is OpenRLHF 3c3be623 (models/utils.py
    `compute_approx_kl`).
    """
    # Padding may hold inf: the difference would be nan, whose gradient is nan even behind a mask.
    d = torch.where(mask, logprobs, 0) - torch.where(mask, ref_logprobs, 0)
    match estimator:
        case "k1":
            kl = d
        case "k2":
            kl = d**2 / 2
        case "k3":
            if clamp is not None:
                # Far beyond the clamp, so that the result is the same, but exp() stays finite: its gradient would be 0 * inf.
                d = d.clamp(min=-2 * (1 + math.log1p(clamp)))
            kl = torch.exp(-d) - 1 + d
    if clamp is not None:
        kl = kl.clamp(-clamp, clamp)
    return torch.where(mask, kl, 0)


def exact_kl(logits: Tensor, ref_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(logits / temperature) || softmax(ref_logits / temperature)) in nats: [..., V] -> [...], in fp32 (fp64 stays fp64).

    A token that logits mask (-inf) contributes 0; one that only ref_logits mask makes the KL infinite.
    """
    logprobs, ref_logprobs = (
        torch.log_softmax((x if x.dtype == torch.float64 else x.float()) / temperature, dim=-1)
        for x in (logits, ref_logits)
    )
    gap = torch.where(logprobs.isneginf(), 0, logprobs - ref_logprobs)
    return (logprobs.exp() * gap).sum(-1)


def truncated_kl(
    logits: Tensor, ref_logits: Tensor, kept: Tensor, ref_kept: Tensor, temperature: float = 1.0
) -> Tensor:
    """Mean log-ratio in nats of a token sampled from the kept ones of softmax(logits / temperature): all [..., V] -> [...].

    The reference gives each token its probability among its own kept ones and that token, as the log-probs of sampled tokens do
    (truncation.keep_only), so this is the mean of their log-ratio. If both keep the same tokens it is the KL of the renormalized
    distributions. Otherwise that KL would be infinite, and this is finite, but may be slightly negative, because the reference's
    probabilities then sum to more than 1.
    """
    scaled, ref_scaled = ((x if x.dtype == torch.float64 else x.float()) / temperature for x in (logits, ref_logits))
    logprobs = torch.log_softmax(scaled.masked_fill(~kept, float("-inf")), dim=-1)
    ref_left = ref_scaled.masked_fill(~ref_kept, float("-inf"))
    with_own = ref_scaled - torch.logaddexp(ref_left.logsumexp(dim=-1, keepdim=True), ref_scaled)
    ref_logprobs = torch.where(ref_kept, torch.log_softmax(ref_left, dim=-1), with_own)
    return (logprobs.exp() * torch.where(kept, logprobs - ref_logprobs, 0)).sum(-1)


def adapt_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, num_samples: int) -> float:
    """The next KL coefficient: raised when the KL is above target, lowered when below, by at most 20% x num_samples / horizon.

    kl and target are in the same unit: nats per sequence (summed over its response tokens), as in Ziegler et al. 2019, "Fine-Tuning
    Language Models from Human Preferences", section 2.2, or nats per token (mean over all tokens), as in OpenRLHF and verl, whose
    targets are smaller by a factor of the response length.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_samples / horizon)
