"""Settings of reward-model training."""

from typing import Literal

from pydantic import model_validator

from components.rlhf.config.base import BaseConfig, Count, Fraction, PositiveInt
from components.rlhf.config.budget import BudgetConfig
from components.rlhf.config.model import ModelConfig, SamplingConfig, Seed, TrainingConfig, check_zero3_compatibility
from components.rlhf.config.processes import Processes
from components.rlhf.config.rollout import EngineConfig, check_engine, ranks_per_engine
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
    rollout: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig
    budget: BudgetConfig = BudgetConfig()
    seed: Seed

    @property
    def processes(self) -> Processes:
        training = self.reward_model.training
        return Processes(
            number=training.num_processes,
            key="reward_model.training.num_processes",
            timeout_minutes=training.timeout_minutes,
            ranks_per_engine=ranks_per_engine(self.rollout),
        )

    @model_validator(mode="after")
    def _require_consistent_values(self) -> "RewardModelStageConfig":
        check_zero3_compatibility(self.model, self.reward_model.training)
        check_calibration(
            self.reward_model,
            self.rollout,
            self.sampling,
            keys=("rollout", "sampling", "reward_model.training.num_processes"),
        )
        return self


def check_calibration(
    config: RewardModelConfig, rollout: EngineConfig, sampling: SamplingConfig, *, keys: tuple[str, str, str]
) -> None:
    """Raise ValueError if the engine of PPO cannot sample the calibration responses in the processes of this stage."""
    if config.num_calibration_samples:
        check_engine(rollout, sampling, config.training.num_processes, keys=keys)
