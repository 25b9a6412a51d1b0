"""Settings of supervised fine-tuning."""

from pydantic import model_validator

from components.rlhf.config.base import BaseConfig, Count, PositiveInt
from components.rlhf.config.budget import BudgetConfig
from components.rlhf.config.model import ModelConfig, Seed, TrainingConfig, check_zero3_compatibility
from components.rlhf.config.processes import Processes
from components.rlhf.config.storage import CheckpointConfig


class SftConfig(BaseConfig):
    """Supervised fine-tuning on demonstrations; the loss covers the answers only."""

    use: str | None = None
    """Folder or s3://BUCKET/PREFIX of your own fine-tuned model; it replaces the stage. A manifest.json in it is verified."""
    num_epochs: PositiveInt = 1
    """Number of epochs over the demonstrations."""
    max_steps: Count = 0
    """Maximum number of optimizer steps; 0 is unlimited."""
    batch_size: PositiveInt = 16
    """Demonstrations per optimizer step, over all processes."""
    training: TrainingConfig = TrainingConfig()


class SftStageConfig(BaseConfig):
    model: ModelConfig
    sft: SftConfig
    checkpoint: CheckpointConfig
    budget: BudgetConfig = BudgetConfig()
    seed: Seed

    @property
    def processes(self) -> Processes:
        training = self.sft.training
        return Processes(
            number=training.num_processes,
            key="sft.training.num_processes",
            timeout_minutes=training.timeout_minutes,
        )

    @model_validator(mode="after")
    def _require_unshared_weights(self) -> "SftStageConfig":
        check_zero3_compatibility(self.model, self.sft.training)
        return self
