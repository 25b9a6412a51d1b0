"""The loss that the settings name, and the rewards of the answers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from components.rlhf.config.dpo import DpoConfig
from components.rlhf.maths.preferences import dpo_loss, ipo_loss, kto_loss, robust_loss, simpo_loss


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Log-probs of N answers, each summed over its tokens."""

    logprobs: Tensor  # [N] fp32, with a gradient
    ref_logprobs: Tensor  # [N] fp32; 0 without a reference
    lengths: Tensor  # [N] tokens that were summed

    @property
    def log_ratios(self) -> Tensor:
        return self.logprobs - self.ref_logprobs


def pair_losses(config: DpoConfig, answers: Answers) -> Tensor:
    """The loss of each of N pairs, whose answers are the N chosen and then the N rejected ones: [N]."""
    beta, smoothing = config.strength, config.label_smoothing
    whole = answers.log_ratios.chunk(2)
    match config.loss:
        case "dpo":
            return dpo_loss(*whole, beta=beta)
        case "cdpo":
            return dpo_loss(*whole, beta=beta, label_smoothing=smoothing)
        case "robust":
            return robust_loss(*whole, beta=beta, label_smoothing=smoothing)
        case "ipo":
            return ipo_loss(*(answers.log_ratios / answers.lengths).chunk(2), beta=beta)
        case "simpo":
            return simpo_loss(*(answers.logprobs / answers.lengths).chunk(2), beta=beta, gamma=config.simpo_gamma)
    raise ValueError(f"loss {config.loss} is not one of pairs")


def answer_losses(config: DpoConfig, answers: Answers, is_desirable: Tensor, kl: Tensor) -> Tensor:
    """KTO's loss of each of N labeled answers (is_desirable [N] bool), given its estimate of the KL: [N]."""
    weights = {"desirable_weight": config.desirable_weight, "undesirable_weight": config.undesirable_weight}
    return kto_loss(answers.log_ratios, is_desirable, kl, beta=config.strength, **weights)


@torch.no_grad()
def rewards_of(config: DpoConfig, answers: Answers) -> Tensor:
    """Implicit reward of each answer: beta x log-ratio, or for simpo beta x mean log-prob of a token. [N], as TRL reports them."""
    values = answers.log_ratios if config.has_reference else answers.logprobs / answers.lengths
    return config.strength * values.detach()
