"""Win rates and their intervals, with prompts as the unit."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    value: float
    low: float
    high: float


def wins(ours: Sequence[float], theirs: Sequence[float]) -> Floats:
    """1 where ours is higher, 0 where theirs is, 0.5 where they are equal: [N]."""
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    return np.where(a == b, 0.5, (a > b).astype(np.float64))


def bootstrap_mean(values: Floats, *, num_resamples: int, confidence: float, seed: int) -> Interval:
    """Mean with its percentile bootstrap interval (Efron 1979). values [N] are one number a prompt, resampled whole."""
    generator = np.random.default_rng(seed)
    means = values[generator.integers(0, len(values), size=(num_resamples, len(values)))].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(value=float(values.mean()), low=float(low), high=float(high))


def distinct_2(texts: Sequence[str]) -> float:
    """Share of different word pairs among all word pairs of all texts (Li et al. 2016): low is repetitive."""
    pairs = [pair for text in texts for pair in itertools.pairwise(text.split())]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
