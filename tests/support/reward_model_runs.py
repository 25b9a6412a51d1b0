"""A small reward-model run."""

from pathlib import Path
from typing import Any

from components.reward_model.trainer import RewardModelTrainer
from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.config.model import LoraConfig, ModelConfig, SamplingConfig, TrainingConfig
from components.rlhf.config.reward_model import RewardModelConfig, RewardModelStageConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.data.records import PreferencePair
from tests.support.training import NEVER, context_of

GOOD, BAD = (" good", " a good film", " very good", " good!"), (" bad", " a bad one", " very bad", " so bad")
PAIRS = [PreferencePair(prompt="It is", chosen=good, rejected=bad) for good in GOOD[:3] for bad in BAD[:3]]
HELDOUT = [
    PreferencePair(prompt=prompt, chosen=good, rejected=bad)
    for prompt in ("It is", "It")
    for good, bad in zip(GOOD, BAD, strict=True)
]


def config_of(*, frozen: int = 0, lora: LoraConfig | None = None, **settings: Any) -> RewardModelStageConfig:
    training = {"learning_rate": 1e-2, "schedule": "cosine", "warmup_fraction": 0.2, "microbatch_tokens": 128}
    defaults = {"num_epochs": 2, "batch_size": 4, "min_prefix_tokens": 2, "num_calibration_samples": 16}
    return RewardModelStageConfig(
        model=ModelConfig(num_frozen_layers=frozen, precision="fp32", lora=lora),
        reward_model=RewardModelConfig(
            training=TrainingConfig(**(training | settings.pop("training", {}))), **(defaults | settings)
        ),
        sampling=SamplingConfig(max_new_tokens=6),
        checkpoint=CheckpointConfig(),
        seed=3,
    )


def trainer_of(
    folder: Path, *, checkpoints: CheckpointManager | None = None, interrupt_at: int = NEVER, **settings: Any
) -> RewardModelTrainer:
    context = context_of("reward_model", checkpoints=checkpoints, interrupt_at=interrupt_at)
    return RewardModelTrainer(config_of(**settings), folder, context)
