"""A linear judge: word n-grams weighted by what people's ratings, or their preferences, say of them.

The artifact is numbers only: vocabulary and settings as JSON, idf and coefficients as safetensors. scikit-learn fits and
transforms; nothing is pickled.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

from components.rlhf.data.records import Completion, PreferencePair, RatedText

FEATURES, WEIGHTS = "judge.json", "judge.safetensors"


class LinearJudge:
    """score = tf-idf(prompt + response) . coefficients + intercept. Implements Scorer."""

    def __init__(self, vectorizer: TfidfVectorizer, coefficients: np.ndarray[Any, Any], intercept: float) -> None:
        self.vectorizer = vectorizer
        self.coefficients = coefficients
        self.intercept = intercept

    def score(self, completions: Sequence[Completion]) -> Tensor:
        return self.score_texts([c.prompt.prompt + c.response for c in completions])

    def score_texts(self, texts: Sequence[str]) -> Tensor:
        """[B] fp32."""
        features = self.vectorizer.transform(texts)
        return torch.from_numpy((features @ self.coefficients + self.intercept).astype(np.float32))

    def save(self, directory: Path) -> None:
        vocabulary = {term: int(column) for term, column in self.vectorizer.vocabulary_.items()}
        content = {"max_ngram": self.vectorizer.ngram_range[1], "vocabulary": vocabulary}
        (directory / FEATURES).write_text(json.dumps(content, ensure_ascii=False, sort_keys=True), encoding="utf-8")
        weights = {
            "idf": self.vectorizer.idf_.astype(np.float64),
            "coefficients": self.coefficients.astype(np.float64),
            "intercept": np.array([self.intercept], dtype=np.float64),
        }
        save_file(weights, directory / WEIGHTS)


def load_judge(directory: Path) -> LinearJudge:
    content = json.loads((directory / FEATURES).read_text(encoding="utf-8"))
    weights = load_file(directory / WEIGHTS)
    vectorizer = _vectorizer(content["max_ngram"], vocabulary=content["vocabulary"])
    vectorizer.idf_ = weights["idf"]
    return LinearJudge(vectorizer, weights["coefficients"], float(weights["intercept"][0]))


def fit_to_ratings(rated: Sequence[RatedText], *, max_ngram: int, regularisation: float) -> LinearJudge:
    """Ridge regression of the mean ratings."""
    vectorizer = _vectorizer(max_ngram)
    features = vectorizer.fit_transform([text.prompt + text.completion for text in rated])
    fit = Ridge(alpha=regularisation).fit(features, [text.rating for text in rated])
    return LinearJudge(vectorizer, fit.coef_, float(fit.intercept_))


def fit_to_pairs(pairs: Sequence[PreferencePair], *, max_ngram: int, regularisation: float) -> LinearJudge:
    """Logistic regression on the difference of the two texts' features: a Bradley-Terry model that is linear in words."""
    vectorizer = _vectorizer(max_ngram)
    vectorizer.fit([pair.prompt + text for pair in pairs for text in (pair.chosen, pair.rejected)])
    chosen = vectorizer.transform([pair.prompt + pair.chosen for pair in pairs])
    rejected = vectorizer.transform([pair.prompt + pair.rejected for pair in pairs])
    signs = np.where(
        np.arange(len(pairs)) % 2, 1.0, -1.0
    )  # both classes must occur; the difference flips with the label
    differences = (chosen - rejected).multiply(signs[:, None]).tocsr()
    fit = LogisticRegression(C=1 / regularisation, fit_intercept=False, max_iter=1000).fit(differences, signs)
    return LinearJudge(vectorizer, fit.coef_[0], 0.0)


def _vectorizer(max_ngram: int, vocabulary: dict[str, int] | None = None) -> TfidfVectorizer:
    return TfidfVectorizer(ngram_range=(1, max_ngram), sublinear_tf=True, vocabulary=vocabulary)
