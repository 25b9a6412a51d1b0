"""Trains the SFT model with the PPO of this project: `python -m benchmarks.learning.ours_ppo JOB`.

JOB is a JSON file that benchmarks/learning/arms.py describes. Every few iterations the policy is saved as a model folder.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import logging

from benchmarks.learning.runs import params_of
from components.ppo.setup import create_trainer
from components.ppo.trainer import PpoTrainer
from components.rlhf.artifacts.directory import atomic_directory
from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.config.storage import CheckpointConfig, StorageConfig
from components.rlhf.data.datasets import load_records
from components.rlhf.data.records import Prompt
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.models.saving import save_model
from components.rlhf.runtime.training import TrainingContext
from components.rlhf.storage.store import FolderStore
from components.rlhf.text.progress import Progress
from components.rlhf.tracking.mlflow import NullTracker
from pipelines.settings import settings_of_stage


class SavingProgress(Progress):
    """Saves the policy every few iterations, which a trainer reports when they are done."""

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__("ppo", every_seconds=0)
        self.folder, self.every = folder, every
        self.trainer: PpoTrainer | None = None

    def step(self, step: int, total: int, metrics: Mapping[str, float], unit: str = "step") -> None:
        super().step(step, total, metrics, unit)
        assert self.trainer is not None
        if unit == "iteration" and step % self.every == 0:
            with atomic_directory(self.folder / f"iteration-{step:02d}") as draft:
                lm = self.trainer.learner.models.actor.lm
                save_model(lm, self.trainer.rollout.tokenizer, draft, dtype=torch.float32)


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = Path(sys.argv[1])
    job = json.loads(path.read_text(encoding="utf-8"))
    params = params_of(job["seed"], job["num_iterations"])
    config = PpoStageConfig.model_validate_json(settings_of_stage(params, "ppo"))
    progress = SavingProgress(path.parent, job["every"])
    # A killed run goes on from its last checkpoint.
    store, minutes = FolderStore(path.parent / "checkpoints"), CheckpointConfig(every_minutes=1.0)
    checkpoints = CheckpointManager(store, "ours", minutes, log=progress.log)
    context = TrainingContext(
        checkpoints=checkpoints,
        progress=progress,
        tracker=NullTracker(),
        group=SINGLE_PROCESS,
    )
    prompts = load_records(Path(job["prompts"]), "train", Prompt)
    progress.trainer = create_trainer(
        config,
        context,
        StorageConfig(),
        prompts,
        sft_model=Path(job["sft_model"]),
        reward_model=Path(job["reward_model"]),
        code=None,
        demonstrations=None,
    )
    history = progress.trainer.train(prompts, [])
    (path.parent / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
    progress.trainer.close()
    checkpoints.delete_all()


if __name__ == "__main__":
    main()
