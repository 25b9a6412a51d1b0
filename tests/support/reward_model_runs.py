"""A small reward-model run."""

import threading
from pathlib import Path
from typing import Any

from components.reward_model.trainer import RewardModelTrainer
from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.config.model import LoraConfig, ModelConfig, SamplingConfig, TrainingConfig
from components.rlhf.config.reward_model import RewardModelConfig, RewardModelStageConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.data.records import PreferencePair
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.runtime.training import TrainingContext
from components.rlhf.storage.store import FolderStore
from components.rlhf.text.progress import Progress
from components.rlhf.tracking.mlflow import NullTracker

GOOD, BAD = (" good", " a good film", " very good", " good!"), (" bad", " a bad one", " very bad", " so bad")
PAIRS = [PreferencePair(prompt="It is", chosen=good, rejected=bad) for good in GOOD[:3] for bad in BAD[:3]]
HELDOUT = [
    PreferencePair(prompt=prompt, chosen=good, rejected=bad)
    for prompt in ("It is", "It")
    for good, bad in zip(GOOD, BAD, strict=True)
]


class Recorder(NullTracker):
    """Keeps what was logged; may end the run like a lost node, before the given step is saved."""

    def __init__(self, *, die_at: int = 0) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.die_at = die_at

    def log(self, metrics: Any, step: int) -> None:
        if step == self.die_at:
            raise KeyboardInterrupt
        self.rows[step] = dict(metrics)


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
    folder: Path, *, checkpoints: CheckpointManager | None = None, die_at: int = 0, **settings: Any
) -> RewardModelTrainer:
    nowhere = CheckpointManager(None, "reward_model/x", CheckpointConfig())
    context = TrainingContext(
        checkpoints=checkpoints or nowhere,
        progress=Progress("reward_model"),
        tracker=Recorder(die_at=die_at),
        group=SINGLE_PROCESS,
    )
    return RewardModelTrainer(config_of(**settings), folder, context)


def checkpoints_every_step(root: Path) -> CheckpointManager:
    """Checkpoints after every step. Who held the folder before is dead, as far as this test goes."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    for lease in root.rglob("lease.json"):
        lease.unlink()
    return CheckpointManager(FolderStore(root), "reward_model/x", CheckpointConfig(every_minutes=0.0))
