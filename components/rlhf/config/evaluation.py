"""Settings of the held-out comparison and of the gate that follows it."""

from components.rlhf.config.base import BaseConfig, Fraction, NonNegative, PositiveInt
from components.rlhf.config.model import ModelConfig, SamplingConfig, Seed


class EvaluationConfig(BaseConfig):
    """PPO against the fine-tuned model on prompts that nothing was trained on."""

    num_prompts: PositiveInt = 256
    """Held-out prompts; each is one vote."""
    sampling: SamplingConfig | None = None
    """How both models sample; null is as in PPO's rollouts."""
    num_bootstrap: PositiveInt = 2000
    """Resamples of the prompts behind each interval."""
    confidence: Fraction = 0.95
    """Of each interval."""


class GateConfig(BaseConfig):
    """What a model must show to be promoted."""

    min_win_rate: Fraction = 0.5
    """The lower end of the win rate's interval must lie above this."""
    max_kl: NonNegative = 10.0
    """Nats per sequence from the fine-tuned model, at the most."""


class EvaluationStageConfig(BaseConfig):
    model: ModelConfig
    evaluation: EvaluationConfig
    sampling: SamplingConfig
    gate: GateConfig
    seed: Seed
