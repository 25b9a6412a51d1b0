"""Settings of supervised fine-tuning."""

from pydantic import model_validator

from components.rlhf.config.base import BaseConfig, Count, PositiveInt
from components.rlhf.config.model import ModelConfig, Seed, TrainingConfig, reject_zero3_with_shared_weights
from components.rlhf.config.storage import CheckpointConfig


class SftConfig(BaseConfig):
    """Completion-only language modelling on demonstrations."""

    use: str | None = None
    """A folder or s3://BUCKET/PREFIX with your own fine-tuned model; it replaces this stage and is verified like any artifact."""
    num_epochs: PositiveInt = 1
    """Passes over the demonstrations."""
    max_steps: Count = 0
    """Stop after this many steps; 0 is no limit."""
    batch_size: PositiveInt = 16
    """Demonstrations in one optimiser step."""
    training: TrainingConfig = TrainingConfig()
    """Engine and optimiser."""


class SftStageConfig(BaseConfig):
    model: ModelConfig
    sft: SftConfig
    checkpoint: CheckpointConfig
    seed: Seed

    @model_validator(mode="after")
    def _weights(self) -> "SftStageConfig":
        reject_zero3_with_shared_weights(self.model, self.sft.training)
        return self
