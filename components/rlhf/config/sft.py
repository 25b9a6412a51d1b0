"""Settings of supervised fine-tuning."""

from pydantic import model_validator

from components.rlhf.config.base import Count, PositiveInt, Settings
from components.rlhf.config.model import ModelSettings, Seed, TrainingSettings, require_own_weights
from components.rlhf.config.storage import CheckpointSettings


class SftSettings(Settings):
    """Completion-only language modelling on demonstrations."""

    use: str | None = None
    """A folder or s3://BUCKET/PREFIX with your own fine-tuned model; it replaces this stage and is verified like any artifact."""
    num_epochs: PositiveInt = 1
    """Passes over the demonstrations."""
    max_steps: Count = 0
    """Stop after this many steps; 0 is no limit."""
    batch_size: PositiveInt = 16
    """Demonstrations in one optimiser step."""
    training: TrainingSettings = TrainingSettings()
    """Engine and optimiser."""


class SftStage(Settings):
    model: ModelSettings
    sft: SftSettings
    checkpoint: CheckpointSettings
    seed: Seed

    @model_validator(mode="after")
    def _weights(self) -> "SftStage":
        require_own_weights(self.model, self.sft.training)
        return self
