"""Fits the linear judge, and summarizes it as Markdown."""

from collections.abc import Mapping, Sequence

import numpy as np

from components.rlhf.config.judge import JudgeConfig
from components.rlhf.data.records import PreferencePair, RatedText
from components.rlhf.rewards.linear import LinearJudge, fit_to_pairs, fit_to_ratings


def fit(config: JudgeConfig, ratings: Sequence[RatedText], pairs: Sequence[PreferencePair]) -> LinearJudge:
    """Fit to the ratings if there are any, else to the pairs."""
    options = {"max_ngram": config.max_ngram, "regularisation": config.regularisation}
    return fit_to_ratings(ratings, **options) if ratings else fit_to_pairs(pairs, **options)


def as_markdown(metrics: Mapping[str, float], judge: LinearJudge) -> str:
    terms = judge.vectorizer.get_feature_names_out()
    order = np.argsort(judge.coefficients)
    worst, best = (", ".join(terms[i] for i in indices) for indices in (order[:12], order[::-1][:12]))
    return (
        "# Judge\n\n"
        f"A linear model on {metrics['num_features']:.0f} word n-grams. Accuracy on {metrics['num_heldout_pairs']:.0f} held-out "
        f"pairs: **{metrics['heldout_accuracy']:.1%}**.\n\n"
        f"Most positive words: {best}.\n\nMost negative words: {worst}.\n"
    )
