"""Random batches, and values that padding may contain."""

import math
from typing import Any

import torch
from torch import Tensor

# No output and no gradient may depend on these values at padding.
GARBAGE = [math.nan, math.inf, -math.inf, 1e30]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ragged(*lengths: int, width: int | None = None) -> Tensor:
    """The mask of rows with these lengths: [B, width] bool; width defaults to the longest row."""
    return torch.tensor([[t < length for t in range(max(lengths) if width is None else width)] for length in lengths])


def doubles(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def spoil(x: Tensor, mask: Tensor, garbage: float) -> Tensor:
    """A copy of x with garbage where mask is False."""
    return torch.where(mask, x, garbage)


def equal(got: Tensor | None, expected: Any, atol: float = 1e-12) -> bool:
    """Same shape, no nan, and equal up to rounding."""
    assert got is not None
    expected = torch.as_tensor(expected, dtype=got.dtype)
    return got.shape == expected.shape and bool(torch.allclose(got, expected, rtol=1e-9, atol=atol))
