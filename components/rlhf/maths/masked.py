"""Statistics over the non-padding tokens of a batch."""

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """The reduction of a single process."""
    return x


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [*] where mask [*] is True; 0 if it is nowhere True. Returns a scalar."""
    # where(), not a product: padding may hold inf or nan, and 0 * inf is nan.
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def masked_moments(x: Tensor, mask: Tensor, reduce: Reduce = identity) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x [B, T] where mask [B, T] is True, over all processes that `reduce` sums over.

    Two passes, because one pass (E[x^2] - E[x]^2) loses all precision in fp32 when the mean is large.
    """
    count = reduce(mask.sum().to(x.dtype)).clamp(min=1)
    mean = reduce(torch.where(mask, x, 0).sum()) / count
    variance = reduce(torch.where(mask, (x - mean) ** 2, 0).sum()) / count
    return mean, variance


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, reduce: Reduce = identity) -> Tensor:
    """Scale x [B, T] to unit variance, and to zero mean unless shift_mean is False; 0 where mask is False.

    Biased variance with a floor of 1e-8, as OpenRLHF computes it over the whole rollout batch
    (v0.5.5 replay_buffer.py `normalize`; 3c3be623 experience_maker.py `compute_advantages_and_returns`).
    """
    mean, variance = masked_moments(x, mask, reduce)
    whitened = (x - mean) * torch.rsqrt(variance.clamp(min=1e-8))
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0)
