"""Settings of the judge: an opinion that no trained stage has seen."""

from typing import Literal

from components.rlhf.config.base import BaseConfig, Positive, PositiveInt
from components.rlhf.config.model import Seed


class JudgeConfig(BaseConfig):
    """A linear model on word n-grams, fitted to ratings (ridge) or, where there are none, to pairs (logistic)."""

    kind: Literal["linear"] = "linear"
    """What judges."""
    max_ngram: PositiveInt = 2
    """Longest run of words that counts as one feature."""
    regularisation: Positive = 1.0
    """Weight of the squared coefficients in the fit."""


class JudgeStageConfig(BaseConfig):
    judge: JudgeConfig
    seed: Seed
