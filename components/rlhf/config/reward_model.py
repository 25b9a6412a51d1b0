"""Settings of reward-model training."""

from typing import Literal

from pydantic import model_validator

from components.rlhf.config.base import BaseConfig, Count, Fraction, PositiveInt
from components.rlhf.config.budget import BudgetConfig
from components.rlhf.config.model import ModelConfig, SamplingConfig, Seed, TrainingConfig, check_zero3_compatibility
from components.rlhf.config.storage import CheckpointConfig


class RewardModelConfig(BaseConfig):
    """Training of a reward model with the pairwise Bradley-Terry loss."""

    use: str | None = None
    """Folder, s3://BUCKET/PREFIX or Hugging Face id of a reward model to use as it is; only its accuracy and scale are measured."""
    init: Literal["sft", "base"] = "sft"
    """Model that training starts from: the SFT model or the base model."""
    num_epochs: PositiveInt = 1
    """Number of epochs over the preference pairs."""
    max_steps: Count = 0
    """Maximum number of optimizer steps; 0 is unlimited."""
    batch_size: PositiveInt = 16
    """Preference pairs per optimizer step, over all processes."""
    use_margin: bool = False
    """Subtract the margin of each pair in the loss, if the data has margins."""
    prefix_loss: Fraction = 0.5
    """Weight of the loss on both completions truncated to the same length, which teaches the model to score truncated text."""
    min_prefix_tokens: PositiveInt = 4
    """Minimum length of the truncated completions, in tokens."""
    num_calibration_samples: Count = 128
    """Number of SFT model responses whose reward mean and standard deviation PPO normalizes with; 0 uses raw rewards."""
    training: TrainingConfig = TrainingConfig()


class RewardModelStageConfig(BaseConfig):
    stage_name: Literal["reward_model", "judge_reward_model"] = "reward_model"  # of two tasks in one run
    model: ModelConfig
    reward_model: RewardModelConfig
    sampling: SamplingConfig
    checkpoint: CheckpointConfig
    budget: BudgetConfig = BudgetConfig()
    seed: Seed

    @model_validator(mode="after")
    def _require_unshared_weights(self) -> "RewardModelStageConfig":
        check_zero3_compatibility(self.model, self.reward_model.training)
        return self
