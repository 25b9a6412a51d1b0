"""Confidence intervals: percentile bootstrap of means over groups, Wilson's of a rate, Agresti and Min's of a difference of two."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
RESAMPLES_AT_ONCE = 100


@dataclass(frozen=True, kw_only=True)
class Interval:
    value: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        """The three numbers as metrics: name, name_low and name_high."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How intervals are computed: percentile bootstrap (Efron 1979) over groups."""

    num_resamples: int
    confidence: float
    seed: int

    def counts(self, num_groups: int) -> Iterator[Floats]:
        """How often each resample contains each group: [n, num_groups] for RESAMPLES_AT_ONCE resamples at a time."""
        generator = np.random.default_rng(self.seed)
        for start in range(0, self.num_resamples, RESAMPLES_AT_ONCE):
            size = min(RESAMPLES_AT_ONCE, self.num_resamples - start)
            drawn = generator.integers(0, num_groups, size=(size, num_groups)) + np.arange(size)[:, None] * num_groups
            yield np.bincount(drawn.ravel(), minlength=size * num_groups).reshape(size, num_groups).astype(np.float64)

    def interval(self, value: float, resampled: Floats) -> Interval:
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(resampled, [tail, 1 - tail])
        return Interval(value=value, low=float(low), high=float(high))


def bootstrap_mean(values: Floats, groups: Sequence[int], bootstrap: Bootstrap) -> Interval | None:
    """Mean of the values [R] that are not nan, with its interval; None if there are none. Groups without values are left out."""
    kept = ~np.isnan(values)
    if not kept.any():
        return None
    numbers = numbered(np.asarray(groups)[kept])
    sizes = np.bincount(numbers).astype(np.float64)
    return bootstrap_ratio(np.bincount(numbers, weights=values[kept]).astype(np.float64), sizes, bootstrap)


def bootstrap_ratio(sums: Floats, sizes: Floats, bootstrap: Bootstrap) -> Interval:
    """sum(sums) / sum(sizes) over groups [G], such as nats and tokens of texts, with its interval. Groups are resampled whole."""
    ratios = np.concatenate([(n @ sums) / (n @ sizes) for n in bootstrap.counts(len(sums))])
    return bootstrap.interval(float(sums.sum() / sizes.sum()), ratios)


def wilson_interval(successes: float, trials: int, *, confidence: float) -> tuple[float, float]:
    """Score interval of a probability (Wilson 1927), which is sensible for few trials and near 0 and 1."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate, share = successes / trials, z**2 / trials
    center = (rate + share / 2) / (1 + share)
    half = z / (1 + share) * math.sqrt(rate * (1 - rate) / trials + share / (4 * trials))
    return max(0.0, center - half), min(1.0, center + half)


def paired_rates(differences: Floats, confidence: float) -> Interval:
    """Mean of differences [N] in {-1, 0, 1} of two rates on the same items, such as hits of two models (Agresti and Min 2005).

    Half an observation is added to each of the four outcomes of a pair, so that the interval has a width even where nothing differs; that
    of the bootstrap is far too narrow for few differences.
    """
    num, z = len(differences) + 2, NormalDist().inv_cdf(0.5 + confidence / 2)
    total, changed = float(differences.sum()), float(np.abs(differences).sum()) + 1
    half = z * math.sqrt(changed - total**2 / num) / num
    return Interval(value=float(differences.mean()), low=total / num - half, high=total / num + half)


def numbered(groups: NDArray[np.generic]) -> Ints:
    """Groups as consecutive numbers from 0."""
    numbers: Ints = np.unique(groups, return_inverse=True)[1].ravel()
    return numbers
