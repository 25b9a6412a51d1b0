"""The linear judge: a tf-idf model on words and characters, fitted to human ratings or preferences with scikit-learn.

The artifact contains no pickle: the vocabularies are JSON, idf and coefficients are safetensors.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_matrix, hstack
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor

from components.rlhf.config.judge import LinearJudge as LinearConfig
from components.rlhf.data.records import Completion, PreferencePair, RatedText
from components.rlhf.rewards.protocol import ComputedStates, compare_scores
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json_as
from components.rlhf.text.words import split_words

FEATURES, WEIGHTS = "judge.json", "judge.safetensors"
MAX_FEATURES_BYTES = 512 * 2**20
MAX_TERMS = 500_000  # of one vocabulary: the most frequent ones
MAX_RECORDS, MAX_RECORDS_OF_CHOICE = (
    10_000,
    2_000,
)  # a random subset is used: time grows with the data, quality hardly does
MIN_GROUPS = 10  # prompts, or texts of a data set with fewer prompts, for a choice of features
Analyzer = Literal["words", "characters"]
Features = tuple[Analyzer, ...]
CANDIDATES: dict[str, Features] = {
    "words": ("words",),
    "characters": ("characters",),
    "both": ("words", "characters"),
}
Array = NDArray[np.float64]
Data = TypeVar("Data", RatedText, PreferencePair)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """One vocabulary in judge.json."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    analyzer: Analyzer
    max_ngram: Annotated[int, Field(ge=1, le=100)]
    terms: Annotated[dict[str, int], Field(min_length=1)]  # n-gram -> its index


@dataclass(frozen=True, kw_only=True)
class JudgeFeatures:
    """Content of judge.json."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    vocabularies: Annotated[tuple[Vocabulary, ...], Field(min_length=1, max_length=2)]


class LinearJudge:
    """score = tf-idf(prompt + response) . coefficients + intercept. Implements Scorer."""

    def __init__(self, vectorizers: dict[Analyzer, TfidfVectorizer], coefficients: Array, intercept: float) -> None:
        """coefficients are those of the vectorizers' features, one after the other."""
        self.vectorizers = vectorizers
        self.coefficients = coefficients
        self.intercept = intercept

    @property
    def terms(self) -> list[str]:
        """The n-gram of each coefficient."""
        return [str(term) for v in self.vectorizers.values() for term in v.get_feature_names_out()]

    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        return self.score_texts([c.prompt.prompt + c.response for c in completions])

    def score_texts(self, texts: Sequence[str]) -> Tensor:
        """Scores of whole texts, prompt included: [B] fp32."""
        if not texts:
            return torch.zeros(0)
        features = _transform(self.vectorizers, texts)
        return torch.from_numpy((features @ self.coefficients + self.intercept).astype(np.float32))

    def save(self, directory: Path) -> None:
        vocabularies, weights = [], {}
        for analyzer, vectorizer in self.vectorizers.items():
            terms = {term: int(column) for term, column in vectorizer.vocabulary_.items()}
            vocabularies.append({"analyzer": analyzer, "max_ngram": vectorizer.ngram_range[1], "terms": terms})
            weights[f"idf_{analyzer}"] = vectorizer.idf_.astype(np.float64)
        text = json.dumps({"vocabularies": vocabularies}, ensure_ascii=False, sort_keys=True)
        (directory / FEATURES).write_text(text, encoding="utf-8")
        weights |= {
            "coefficients": self.coefficients.astype(np.float64),
            "intercept": np.array([self.intercept], dtype=np.float64),
        }
        save_file(weights, directory / WEIGHTS)


def load_linear_judge(directory: Path) -> LinearJudge:
    """Load the judge that save wrote. Raises InputError for invalid files."""
    try:
        with (directory / FEATURES).open("rb") as file:
            text = file.read(MAX_FEATURES_BYTES + 1)
        if len(text) > MAX_FEATURES_BYTES:
            raise NotJsonError(f"longer than {MAX_FEATURES_BYTES // 2**20} MiB")
        vocabularies = parse_json_as(TypeAdapter(JudgeFeatures), text).vocabularies
        if len({v.analyzer for v in vocabularies}) < len(vocabularies):
            raise NotJsonError("two vocabularies have one analyzer")
        for vocabulary in vocabularies:
            if sorted(vocabulary.terms.values()) != list(range(len(vocabulary.terms))):
                raise NotJsonError("the indices of a vocabulary are not 0 to its size - 1")
        weights = {name: values.astype(np.float64) for name, values in load_file(directory / WEIGHTS).items()}
        shapes = {f"idf_{v.analyzer}": (len(v.terms),) for v in vocabularies} | {
            "coefficients": (sum(len(v.terms) for v in vocabularies),),
            "intercept": (1,),
        }
        if {name: values.shape for name, values in weights.items()} != shapes:
            raise NotJsonError("idf and coefficients need one number per n-gram, and intercept one")
        if not all((np.abs(values) < 1e15).all() for values in weights.values()):
            raise NotJsonError("a weight is not finite or exceeds 1e15")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{directory} is not a loadable judge ({reason}); run the judge stage again.") from None
    vectorizers = {}
    for vocabulary in vocabularies:
        vectorizer = _vectorizer(vocabulary.analyzer, vocabulary.max_ngram, vocabulary=vocabulary.terms)
        vectorizer.idf_ = weights[f"idf_{vocabulary.analyzer}"]
        vectorizers[vocabulary.analyzer] = vectorizer
    return LinearJudge(vectorizers, weights["coefficients"], float(weights["intercept"][0]))


def fit_linear_judge(
    config: LinearConfig, ratings: Sequence[RatedText], pairs: Sequence[PreferencePair], *, seed: int
) -> tuple[LinearJudge, dict[str, float]]:
    """Fit to the ratings if there are any, else to the pairs.

    With features: auto, the features are those that predict a fifth of this data best, of other prompts than the rest: by the rank
    correlation with the ratings, or the accuracy on the pairs. The second result is that quality by the name of the features,
    empty if there was no choice, or too little data for one.
    """
    if ratings:
        return _choose_and_fit(config, _subset(ratings, MAX_RECORDS, seed), fit_to_ratings, rank_correlation, seed)
    return _choose_and_fit(config, _subset(pairs, MAX_RECORDS, seed), fit_to_pairs, accuracy, seed)


def _subset(data: Sequence[Data], size: int, seed: int) -> Sequence[Data]:
    return data if len(data) <= size else random.Random(seed).sample(list(data), size)


def _choose_and_fit(
    config: LinearConfig,
    data: Sequence[Data],
    fit: Callable[[Sequence[Data], LinearConfig], LinearJudge],
    quality_on: Callable[[LinearJudge, Sequence[Data]], float],
    seed: int,
) -> tuple[LinearJudge, dict[str, float]]:
    if config.features != "auto":
        return fit(data, config), {}
    sample = _subset(data, MAX_RECORDS_OF_CHOICE, seed)
    groups = [record.prompt for record in sample]
    if len(set(groups)) < MIN_GROUPS:  # one prompt, such as none at all: then the records are the groups
        groups = list(map(str, range(len(sample))))
    if len(set(groups)) < MIN_GROUPS:
        return fit(data, config.model_copy(update={"features": "both"})), {}
    train, held_out = next(GroupShuffleSplit(1, test_size=0.2, random_state=seed % 2**32).split(groups, groups=groups))
    quality = {}
    for features in CANDIDATES:
        judge = fit([sample[i] for i in train], config.model_copy(update={"features": features}))
        quality[features] = quality_on(judge, [sample[i] for i in held_out])
    best = max(quality, key=lambda features: quality[features])
    return fit(data, config.model_copy(update={"features": best})), quality


def fit_to_ratings(rated: Sequence[RatedText], config: LinearConfig) -> LinearJudge:
    """Ridge regression on the mean ratings."""
    texts = [text.prompt + text.completion for text in rated]
    vectorizers = _fit_vectorizers(texts, config)
    fit = Ridge(alpha=config.regularisation).fit(_transform(vectorizers, texts), [text.rating for text in rated])
    return LinearJudge(vectorizers, fit.coef_, float(fit.intercept_))


def fit_to_pairs(pairs: Sequence[PreferencePair], config: LinearConfig) -> LinearJudge:
    """Logistic regression on the difference of the two texts' features: a linear Bradley-Terry model."""
    vectorizers = _fit_vectorizers(
        [pair.prompt + text for pair in pairs for text in (pair.chosen, pair.rejected)], config
    )
    chosen = _transform(vectorizers, [pair.prompt + pair.chosen for pair in pairs])
    rejected = _transform(vectorizers, [pair.prompt + pair.rejected for pair in pairs])
    # Each pair in both orders: both classes occur, also with one pair, and the fit has no preference for an order.
    differences = csr_matrix(np.r_[1.0, -1.0].repeat(len(pairs))[:, None]).multiply(
        csr_matrix((chosen - rejected)[np.r_[0 : len(pairs), 0 : len(pairs)]])
    )
    signs = np.r_[1.0, -1.0].repeat(len(pairs))
    fit = LogisticRegression(C=0.5 / config.regularisation, fit_intercept=False, max_iter=1000)
    return LinearJudge(vectorizers, fit.fit(differences.tocsr(), signs).coef_[0], 0.0)


def accuracy(judge: LinearJudge, pairs: Sequence[PreferencePair]) -> float:
    """Fraction of pairs whose chosen text scores higher; ties are halves."""
    chosen, rejected = (
        judge.score_texts([pair.prompt + getattr(pair, side) for pair in pairs]) for side in ("chosen", "rejected")
    )
    return float(compare_scores(chosen, rejected).wins.mean())


def rank_correlation(judge: LinearJudge, rated: Sequence[RatedText]) -> float:
    """Spearman's rank correlation of scores and ratings; 0 if one of them is constant."""
    scores = judge.score_texts([text.prompt + text.completion for text in rated]).numpy()
    ratings = np.array([text.rating for text in rated])
    if np.ptp(scores) == 0 or np.ptp(ratings) == 0:
        return 0.0
    return float(spearmanr(scores, ratings).statistic)


def _fit_vectorizers(texts: Sequence[str], config: LinearConfig) -> dict[Analyzer, TfidfVectorizer]:
    if not any(text.strip() for text in texts):
        raise InputError("The texts that the judge is trained on contain nothing but spaces; correct data.preferences.")
    longest = {"words": config.max_ngram, "characters": config.max_character_ngram}
    vectorizers = {}
    for analyzer in CANDIDATES[config.features]:
        vectorizers[analyzer] = _vectorizer(analyzer, longest[analyzer]).fit(texts)
    return vectorizers


def _transform(vectorizers: dict[Analyzer, TfidfVectorizer], texts: Sequence[str]) -> csr_matrix:
    return hstack([vectorizer.transform(texts) for vectorizer in vectorizers.values()], format="csr")


def _vectorizer(analyzer: Analyzer, max_ngram: int, vocabulary: dict[str, int] | None = None) -> TfidfVectorizer:
    options: dict[str, Any] = {"analyzer": "char"}
    if analyzer == "words":
        options = {"analyzer": "word", "tokenizer": split_words, "token_pattern": None, "lowercase": False}
    return TfidfVectorizer(
        ngram_range=(1, max_ngram), sublinear_tf=True, vocabulary=vocabulary, max_features=MAX_TERMS, **options
    )
