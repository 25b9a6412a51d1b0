"""Statistics over prompts: bootstrap intervals, length-controlled win rate, distinct-2, agreement of judges.

Values are one per row, which is a pair of responses. Rows of one prompt form a group, and are resampled together.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from components.rlhf.maths.intervals import Bootstrap, Floats, Interval, bootstrap_mean, numbered, wilson_interval
from components.rlhf.text.words import split_words

# Weak penalties on the logistic model, without which its optimum is infinite if one response always wins.
INTERCEPT_PENALTY, LENGTH_PENALTY = 1e-3, 1.0
NEWTON_STEPS = 30
MIN_SHARE = 0.05


def pairwise_wins(scores: Sequence[float], baseline_scores: Sequence[float]) -> Floats:
    """1 where the score is higher than the baseline's, 0 where it is lower, 0.5 for a tie: [R]."""
    a, b = np.asarray(scores, dtype=np.float64), np.asarray(baseline_scores, dtype=np.float64)
    return np.where(a == b, 0.5, (a > b).astype(np.float64))


def pass_rate(passed: Floats, groups: Sequence[int], bootstrap: Bootstrap) -> Interval:
    """pass@1: the mean of passed [R] (0 or 1) with its interval: Wilson's with one row per prompt, else the bootstrap over prompts."""
    if len(set(groups)) < len(groups):
        interval = bootstrap_mean(passed, groups, bootstrap)
        assert interval is not None
        return interval
    low, high = wilson_interval(float(passed.sum()), len(passed), confidence=bootstrap.confidence)
    return Interval(value=float(passed.mean()), low=low, high=high)


def length_controlled(
    wins: Floats, length_gaps: Floats, groups: Sequence[int], bootstrap: Bootstrap
) -> Interval | None:
    """Win rate at equal length: that of a logistic model of the wins [R], at a length difference of 0.

    The model is that of AlpacaEval 2 (Dubois et al. 2024) for two models: logit P(win) = a + b tanh(gap / std(gap)). Rows with nan are
    left out. length_gaps [R] are the lengths minus those of the baseline. None if one of the two is longer in more than 95% of the rows,
    because the data then does not say what would be at equal length.
    """
    kept = ~np.isnan(wins)
    if not kept.any() or min((length_gaps[kept] <= 0).mean(), (length_gaps[kept] >= 0).mean()) < MIN_SHARE:
        return None
    wins, gaps, numbers = wins[kept], length_gaps[kept], numbered(np.asarray(groups)[kept])
    scale = gaps.std()
    features = np.tanh(gaps / scale) if scale > 0 else np.zeros_like(gaps)
    value = _win_rate_at_equal_length(wins, features, np.ones((1, len(wins))))[0]
    counts = bootstrap.counts(int(numbers.max()) + 1)
    resampled = [_win_rate_at_equal_length(wins, features, n[:, numbers]) for n in counts]
    return bootstrap.interval(float(value), np.concatenate(resampled))


def _win_rate_at_equal_length(wins: Floats, features: Floats, weights: Floats) -> Floats:
    """sigmoid(a) of the penalized maximum-likelihood fits with weights [n, R], by Newton's method: [n]."""
    a, b = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * features)))
        slope = weights * (p - wins)
        curve = weights * p * (1 - p)
        grad_a, grad_b = slope.sum(1) + INTERCEPT_PENALTY * a, slope @ features + LENGTH_PENALTY * b
        h_aa, h_ab, h_bb = curve.sum(1) + INTERCEPT_PENALTY, curve @ features, curve @ features**2 + LENGTH_PENALTY
        determinant = h_aa * h_bb - h_ab**2
        step_a = (h_bb * grad_a - h_ab * grad_b) / determinant
        step_b = (h_aa * grad_b - h_ab * grad_a) / determinant
        a, b = a - step_a, b - step_b
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < 1e-9:
            break
    rate: Floats = 1 / (1 + np.exp(-a))
    return rate


def distinct_2(*sets: Sequence[str]) -> tuple[float, ...]:
    """distinct-2 (Li et al. 2016) of sets of texts: unique bigrams of words over all of a set. Low values are repetitive.

    It falls with the amount of text, so that the texts of a row, one of each set, are cut to the number of words of the shortest one.
    """
    rows = [[split_words(text) for text in row] for row in zip(*sets, strict=True)]
    cut = [[words[: min(map(len, row))] for words in row] for row in rows]
    return tuple(_distinct_2([row[number] for row in cut]) for number in range(len(sets)))


def _distinct_2(texts: Sequence[Sequence[str]]) -> float:
    pairs = [pair for text in texts for pair in itertools.pairwise(text)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def cohen_kappa(first: Floats, second: Floats) -> float | None:
    """Cohen's kappa of the wins of two judges, in win, tie and loss, on the rows that both answered; None if it is undefined."""
    from sklearn.metrics import cohen_kappa_score

    both = ~(np.isnan(first) | np.isnan(second))
    labels = [np.sign(wins[both] - 0.5).astype(int) for wins in (first, second)]
    if not both.any() or len(set(labels[0]) | set(labels[1])) < 2:
        return None
    return float(cohen_kappa_score(*labels))
