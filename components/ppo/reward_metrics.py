"""Metrics of each reward beside their sum; components/ppo/README.md explains each name."""

from collections.abc import Mapping

import torch
from torch import Tensor

from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.engine.protocol import Group
from components.rlhf.maths.masked import masked_moments


def reward_metrics(
    parts: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    reward_clip: float | None,
    counts: Mapping[str, float] | None = None,
    counted: Tensor | None = None,
    group: Group = SINGLE_PROCESS,
) -> dict[str, float]:
    """Mean and standard deviation of the raw scores [B] of each reward over all ranks, and counts (Rewards.take_counts) in total.

    clipped_fraction is the share of responses for which weight x score alone is beyond reward_clip: of the sum of all rewards, which is
    what is clipped, this reward by itself takes up the whole range. counted [B] bool are the rows that count; None: all of them. Every
    rank passes the same names.
    """
    metrics: dict[str, float] = {}
    for name, scores in parts.items():
        every_row = torch.ones_like(scores, dtype=torch.bool) if counted is None else counted.to(scores.device)
        mean, variance = masked_moments(scores, every_row, group.sum)
        metrics[f"reward/{name}/mean"] = mean.item()
        metrics[f"reward/{name}/std"] = variance.item() ** 0.5
        if reward_clip is not None:
            beyond = ((weights[name] * scores).abs() > reward_clip).float()
            metrics[f"reward/{name}/clipped_fraction"] = masked_moments(beyond, every_row, group.sum)[0].item()
    names = sorted(counts or {})
    if counts and names:
        totals = group.sum(torch.tensor([counts[name] for name in names], dtype=torch.float64)).tolist()
        metrics |= {f"reward/{name}": total for name, total in zip(names, totals, strict=True)}
    return metrics
