"""Losses that train a policy on preferences directly. Each gives the loss of every pair or answer, [N], not averaged.

A log-ratio is the log-prob of an answer under the policy minus that under the reference, summed over its tokens. The implicit
reward of an answer is beta times it (Rafailov et al. 2023, DPO, equation 5). All losses equal those of TRL 1.12.0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)) of log-ratios (Rafailov et al. 2023, equation 7). [N], [N] -> [N].

    With label_smoothing e it is conservative DPO (Mitchell 2023, cDPO): the cross-entropy to a target of 1 - e in place of 1, which is
    least at a margin of log((1 - e) / e). Equal to TRL's DPOTrainer `sigmoid`, and with smoothing to CPOTrainer `sigmoid` on log-ratios.
    """
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def robust_loss(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO's loss without the bias of pairs of which a fraction label_smoothing, below 0.5, is the wrong way round. [N], [N] -> [N].

    Its expectation over such pairs is the loss of the right ones (Chowdhury et al. 2024, Provably Robust DPO, equation 12), so that
    single losses may be negative. TRL's DPOTrainer `robust`.
    """
    logits = beta * (chosen - rejected)
    clean, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Squared distance of the margin from 1 / (2 beta) (Azar et al. 2023, IPO, equation 17). [N], [N] -> [N].

    The log-ratios are means over the tokens of each answer, as TRL's DPOTrainer `ipo` has it, so that long answers weigh no more.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma) (Meng et al. 2024, SimPO, equation 6). [N], [N] -> [N].

    There is no reference: chosen and rejected are the policy's log-probs, as means over the tokens. TRL's CPOTrainer `simpo`.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def kto_loss(
    log_ratios: Tensor,
    is_desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """How far each answer is from a sure gain or loss (Ethayarajh et al. 2024, KTO, equation 8). [N], [N] bool, scalar -> [N].

    An answer gains or loses against the point kl (kl_of_mismatches), which carries no gradient. TRL's KTOTrainer `kto`.
    """
    gain = torch.where(is_desirable, log_ratios - kl, kl - log_ratios)
    losses = 1 - torch.sigmoid(beta * gain)
    return torch.where(is_desirable, desirable_weight * losses, undesirable_weight * losses)


def kl_of_mismatches(log_ratio_sum: Tensor, count: Tensor | int) -> Tensor:
    """KTO's estimate of the KL to the reference, from the sum over `count` log-ratios of answers to the prompts of others: a scalar.

    It is their mean, or 0 if that is negative (KTO, section 4.1).
    """
    return (log_ratio_sum.detach() / count).clamp(min=0)
