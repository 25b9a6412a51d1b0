"""A small reward-model run."""

import threading
from pathlib import Path
from typing import Any

from components.reward_model.trainer import RewardModelTrainer
from components.rlhf.checkpoints.folder import CheckpointFolder
from components.rlhf.config.model import LoraSettings, ModelSettings, SamplingSettings, TrainingSettings
from components.rlhf.config.reward_model import RewardModelSettings, RewardModelStage
from components.rlhf.config.storage import CheckpointSettings
from components.rlhf.data.records import PreferencePair
from components.rlhf.edges.progress import Progress
from components.rlhf.edges.storage import FolderStore
from components.rlhf.edges.tracking import NullTracker

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


def stage_of(*, frozen: int = 0, lora: LoraSettings | None = None, **settings: Any) -> RewardModelStage:
    training = {"learning_rate": 1e-2, "schedule": "cosine", "warmup_fraction": 0.2, "microbatch_tokens": 128}
    defaults = {"num_epochs": 2, "batch_size": 4, "min_prefix_tokens": 2, "num_calibration_samples": 16}
    return RewardModelStage(
        model=ModelSettings(num_frozen_layers=frozen, precision="fp32", lora=lora),
        reward_model=RewardModelSettings(
            training=TrainingSettings(**(training | settings.pop("training", {}))), **(defaults | settings)
        ),
        sampling=SamplingSettings(max_new_tokens=6),
        checkpoint=CheckpointSettings(),
        seed=3,
    )


def trainer_of(
    folder: Path, *, checkpoints: CheckpointFolder | None = None, die_at: int = 0, **settings: Any
) -> RewardModelTrainer:
    nowhere = CheckpointFolder(None, "reward_model/x", CheckpointSettings())
    return RewardModelTrainer(
        stage_of(**settings), folder, checkpoints or nowhere, Progress("reward_model"), Recorder(die_at=die_at)
    )


def saving(root: Path) -> CheckpointFolder:
    """Checkpoints after every step. Who held the folder before is dead, as far as this test goes."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    for lease in root.rglob("lease.json"):
        lease.unlink()
    return CheckpointFolder(FolderStore(root), "reward_model/x", CheckpointSettings(every_minutes=0.0))
