"""The linear judge: a tf-idf model on word n-grams, fitted to human ratings or preferences with scikit-learn.

The artifact contains no pickle: vocabulary and max_ngram are JSON, idf and coefficients are safetensors.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

from components.rlhf.data.records import Completion, PreferencePair, RatedText
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json_as

FEATURES, WEIGHTS = "judge.json", "judge.safetensors"
MAX_FEATURES_BYTES = 512 * 2**20


@dataclass(frozen=True, kw_only=True)
class JudgeFeatures:
    """Content of judge.json."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    max_ngram: Annotated[int, Field(ge=1, le=100)]
    vocabulary: Annotated[dict[str, int], Field(min_length=1)]  # n-gram -> its index in idf and coefficients


class LinearJudge:
    """score = tf-idf(prompt + response) . coefficients + intercept. Implements Scorer."""

    def __init__(self, vectorizer: TfidfVectorizer, coefficients: np.ndarray[Any, Any], intercept: float) -> None:
        self.vectorizer = vectorizer
        self.coefficients = coefficients
        self.intercept = intercept

    def score(self, completions: Sequence[Completion]) -> Tensor:
        return self.score_texts([c.prompt.prompt + c.response for c in completions])

    def score_texts(self, texts: Sequence[str]) -> Tensor:
        """Scores of whole texts, prompt included: [B] fp32."""
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
    """Load the judge that save wrote. Raises InputError for invalid files."""
    try:
        with (directory / FEATURES).open("rb") as file:
            text = file.read(MAX_FEATURES_BYTES + 1)
        if len(text) > MAX_FEATURES_BYTES:
            raise NotJsonError(f"longer than {MAX_FEATURES_BYTES // 2**20} MiB")
        features = parse_json_as(TypeAdapter(JudgeFeatures), text)
        max_ngram, vocabulary = features.max_ngram, features.vocabulary
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise NotJsonError("the indices of the vocabulary are not 0 to its size - 1")
        weights = {name: values.astype(np.float64) for name, values in load_file(directory / WEIGHTS).items()}
        shapes = {"idf": (len(vocabulary),), "coefficients": (len(vocabulary),), "intercept": (1,)}
        if {name: values.shape for name, values in weights.items()} != shapes:
            raise NotJsonError("idf and coefficients need one number per n-gram, and intercept one")
        if not all((np.abs(values) < 1e15).all() for values in weights.values()):
            raise NotJsonError("a weight is not finite or exceeds 1e15")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{directory} is not a loadable judge ({reason}); run the judge stage again.") from None
    vectorizer = _vectorizer(max_ngram, vocabulary=vocabulary)
    vectorizer.idf_ = weights["idf"]
    return LinearJudge(vectorizer, weights["coefficients"], float(weights["intercept"][0]))


def fit_to_ratings(rated: Sequence[RatedText], *, max_ngram: int, regularisation: float) -> LinearJudge:
    """Ridge regression on the mean ratings."""
    vectorizer = _vectorizer(max_ngram)
    features = vectorizer.fit_transform([text.prompt + text.completion for text in rated])
    fit = Ridge(alpha=regularisation).fit(features, [text.rating for text in rated])
    return LinearJudge(vectorizer, fit.coef_, float(fit.intercept_))


def fit_to_pairs(pairs: Sequence[PreferencePair], *, max_ngram: int, regularisation: float) -> LinearJudge:
    """Logistic regression on the difference of the two texts' features: a linear Bradley-Terry model."""
    vectorizer = _vectorizer(max_ngram)
    vectorizer.fit([pair.prompt + text for pair in pairs for text in (pair.chosen, pair.rejected)])
    chosen = vectorizer.transform([pair.prompt + pair.chosen for pair in pairs])
    rejected = vectorizer.transform([pair.prompt + pair.rejected for pair in pairs])
    # Both classes must occur, so every other pair is swapped; the difference changes its sign with the label.
    signs = np.where(np.arange(len(pairs)) % 2, 1.0, -1.0)
    differences = (chosen - rejected).multiply(signs[:, None]).tocsr()
    fit = LogisticRegression(C=1 / regularisation, fit_intercept=False, max_iter=1000).fit(differences, signs)
    return LinearJudge(vectorizer, fit.coef_[0], 0.0)


def _vectorizer(max_ngram: int, vocabulary: dict[str, int] | None = None) -> TfidfVectorizer:
    return TfidfVectorizer(ngram_range=(1, max_ngram), sublinear_tf=True, vocabulary=vocabulary)
