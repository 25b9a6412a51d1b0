"""Settings of the judge, which is fitted on data that no trained model has seen."""

from typing import Literal

from components.rlhf.config.base import BaseConfig, Positive, PositiveInt
from components.rlhf.config.model import Seed


class JudgeConfig(BaseConfig):
    """A linear model on word n-grams: ridge regression on ratings or, without ratings, logistic regression on pairs."""

    kind: Literal["linear"] = "linear"
    """Type of the judge; linear is the only one."""
    max_ngram: PositiveInt = 2
    """Longest word n-gram that is used as a feature."""
    regularisation: Positive = 1.0
    """Strength of the L2 penalty on the coefficients."""


class JudgeStageConfig(BaseConfig):
    judge: JudgeConfig
    seed: Seed
