"""Settings of reward-model training."""

from typing import Literal

from pydantic import model_validator

from components.rlhf.config.base import BaseConfig, Count, Fraction, PositiveInt
from components.rlhf.config.model import (
    ModelConfig,
    SamplingConfig,
    Seed,
    TrainingConfig,
    reject_zero3_with_shared_weights,
)
from components.rlhf.config.storage import CheckpointConfig


class RewardModelConfig(BaseConfig):
    """Pairwise (Bradley-Terry) training of a scalar head on preferences."""

    use: str | None = None
    """A folder or s3://BUCKET/PREFIX with your own reward model; it replaces this stage and is verified like any artifact."""
    init: Literal["sft", "base"] = "sft"
    """The model that the reward model starts from."""
    num_epochs: PositiveInt = 1
    """Passes over the preference pairs."""
    max_steps: Count = 0
    """Stop after this many steps; 0 is no limit."""
    batch_size: PositiveInt = 16
    """Pairs in one optimiser step."""
    use_margin: bool = False
    """Subtract each pair's margin in the loss, where the data has one."""
    prefix_loss: Fraction = 0.5
    """Share of the loss that compares the two texts cut at the same length, so that a text without an end is no surprise."""
    min_prefix_tokens: PositiveInt = 4
    """Shortest such cut, in completion tokens."""
    num_calibration_samples: Count = 128
    """Responses of the fine-tuned model whose scores fix the mean and the spread that PPO normalises by; 0 leaves raw scores."""
    training: TrainingConfig = TrainingConfig()
    """Engine and optimiser."""


class RewardModelStageConfig(BaseConfig):
    model: ModelConfig
    reward_model: RewardModelConfig
    sampling: SamplingConfig
    checkpoint: CheckpointConfig
    seed: Seed

    @model_validator(mode="after")
    def _weights(self) -> "RewardModelStageConfig":
        reject_zero3_with_shared_weights(self.model, self.reward_model.training)
        return self
