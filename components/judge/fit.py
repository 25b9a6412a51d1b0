"""Fitting the linear judge, and showing what it goes by."""

from collections.abc import Mapping, Sequence

import numpy as np

from components.rlhf.config.judge import JudgeConfig
from components.rlhf.data.records import PreferencePair, RatedText
from components.rlhf.rewards.linear import LinearJudge, fit_to_pairs, fit_to_ratings


def fit(config: JudgeConfig, ratings: Sequence[RatedText], pairs: Sequence[PreferencePair]) -> LinearJudge:
    """On ratings where the data has them, else on pairs."""
    options = {"max_ngram": config.max_ngram, "regularisation": config.regularisation}
    return fit_to_ratings(ratings, **options) if ratings else fit_to_pairs(pairs, **options)


def as_markdown(metrics: Mapping[str, float], judge: LinearJudge) -> str:
    terms = judge.vectorizer.get_feature_names_out()
    order = np.argsort(judge.coefficients)
    worst, best = (", ".join(terms[i] for i in side) for side in (order[:12], order[::-1][:12]))
    return (
        "# Judge\n\n"
        f"A linear model on {metrics['num_features']:.0f} word n-grams. On {metrics['num_heldout_pairs']:.0f} held-out pairs it "
        f"prefers what people preferred in **{metrics['heldout_accuracy']:.1%}**.\n\n"
        f"Words that raise its score most: {best}.\n\nWords that lower it most: {worst}.\n"
    )
