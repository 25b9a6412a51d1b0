"""Settings of the evaluation on held-out prompts and of the promotion gate."""

from components.rlhf.config.base import BaseConfig, Fraction, NonNegative, PositiveInt
from components.rlhf.config.judge import Judges, LinearJudge
from components.rlhf.config.model import ModelConfig, SamplingConfig, Seed


class EvaluationConfig(BaseConfig):
    """Comparison of the PPO policy with the SFT model on held-out prompts."""

    num_prompts: PositiveInt = 256
    """Number of held-out prompts."""
    num_samples: PositiveInt = 1
    """Number of responses of each model to every prompt."""
    sampling: SamplingConfig | None = None
    """How both models sample; null uses ppo.rollout.sampling."""
    num_bootstrap: PositiveInt = 2000
    """Number of bootstrap resamples of the prompts for the confidence intervals."""
    confidence: Fraction = 0.95
    """Confidence level of the intervals, between 0 and 1."""


class GateConfig(BaseConfig):
    """Conditions for the promotion of a policy."""

    min_win_rate: Fraction = 0.5
    """The lower bound of the win rate's confidence interval must be above this value."""
    max_kl: NonNegative = 10.0
    """Maximum KL divergence from the SFT model, in nats per sequence."""
    min_prompts: PositiveInt = 30
    """Least number of prompts that the judge has compared; with fewer there is no verdict, and nothing is promoted."""


class EvaluationStageConfig(BaseConfig):
    model: ModelConfig
    evaluation: EvaluationConfig
    sampling: SamplingConfig
    gate: GateConfig
    judge: Judges = LinearJudge()
    seed: Seed
