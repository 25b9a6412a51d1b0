"""Agreement of a judge with people on held-out pairs, with an interval, and what the gate makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from components.rlhf.data.records import PreferencePair

CONFIDENCE = 0.95
MIN_ANSWERED = 0.9  # of the pairs, for a verdict: what a judge does not answer is not left out at random
MIN_PROMPTS = 10


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often a judge prefers the response that people preferred."""

    accuracy: float  # ties of the judge are halves
    low: float
    high: float
    num_pairs: int  # that the judge answered
    num_asked: int
    num_independent: int  # see independent_pairs
    longer_wins: float  # accuracy of always preferring the longer text, ties as halves: what a judge should beat
    consistency: float  # fraction of the pairs on which the judge prefers the same response in both orders

    @property
    def is_above_chance(self) -> bool:
        return self.low > 0.5

    def explain(self) -> str:
        return f"{self.accuracy:.1%} [{self.low:.1%}, {self.high:.1%}] on {self.num_pairs} held-out human pairs"


def measure_agreement(wins: Tensor, pairs: Sequence[PreferencePair], consistent: Tensor) -> Agreement | None:
    """Agreement from the wins [B] of the chosen over the rejected texts; None if the judge answered no pair.

    The interval is that of Clopper and Pearson (1934), which holds for any number of pairs.
    """
    answered = (~wins.isnan()).nonzero().flatten().tolist()
    if not answered:
        return None
    kept = [pairs[i] for i in answered]
    accuracy, independent = float(wins[answered].mean()), independent_pairs(kept)
    low, high = binomial_interval(accuracy * independent, independent, confidence=CONFIDENCE)
    gaps = np.array([len(pair.chosen) - len(pair.rejected) for pair in kept])
    return Agreement(
        accuracy=accuracy,
        low=low,
        high=high,
        num_pairs=len(kept),
        num_asked=len(pairs),
        num_independent=independent,
        longer_wins=float(np.where(gaps == 0, 0.5, gaps > 0).mean()),
        consistency=float(consistent[answered].float().mean()),
    )


def independent_pairs(pairs: Sequence[PreferencePair]) -> int:
    """The number of prompts; with fewer than 10 of them, that of the pairs that share no text, taking them in their order.

    Pairs of one prompt, such as all pairs of a ranking, are not independent: an interval by their number is too narrow.
    """
    prompts = {pair.prompt for pair in pairs}
    if len(prompts) >= MIN_PROMPTS:
        return len(prompts)
    used: set[tuple[str, str]] = set()
    count = 0
    for pair in pairs:
        texts = {(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)}
        if not texts & used:
            used |= texts
            count += 1
    return count


def binomial_interval(successes: float, trials: int, *, confidence: float) -> tuple[float, float]:
    """Interval of Clopper and Pearson for a probability. successes may be a fraction, because ties are halves."""
    from scipy.stats import beta  # takes half a second to import, and the evaluation computes no interval

    tail = (1 - confidence) / 2
    low = 0.0 if successes <= 0 else float(beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes >= trials else float(beta.ppf(1 - tail, successes + 1, trials - successes))
    return low, high
