"""Statistics over prompts: wins, bootstrap intervals, distinct-2."""

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

    def named(self, name: str) -> dict[str, float]:
        """The three numbers as metrics: name, name_low and name_high."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def pairwise_wins(scores: Sequence[float], baseline_scores: Sequence[float]) -> Floats:
    """1 where the score is higher than the baseline's, 0 where it is lower, 0.5 for a tie: [N]."""
    a, b = np.asarray(scores, dtype=np.float64), np.asarray(baseline_scores, dtype=np.float64)
    return np.where(a == b, 0.5, (a > b).astype(np.float64))


def bootstrap_mean(values: Floats, *, num_resamples: int, confidence: float, seed: int) -> Interval:
    """Mean with percentile bootstrap interval (Efron 1979). values [N] are one per prompt; prompts are resampled."""
    generator = np.random.default_rng(seed)
    means = values[generator.integers(0, len(values), size=(num_resamples, len(values)))].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(value=float(values.mean()), low=float(low), high=float(high))


def distinct_2(texts: Sequence[str]) -> float:
    """distinct-2 (Li et al. 2016): unique word bigrams over all word bigrams of all texts. Low values are repetitive."""
    pairs = [pair for text in texts for pair in itertools.pairwise(text.split())]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
