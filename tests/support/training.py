"""What every small training run needs: a tracker that records, and checkpoints after every step."""

import math
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.runtime.training import TrainingContext
from components.rlhf.storage.store import FolderStore
from components.rlhf.text.progress import Progress
from components.rlhf.tracking.mlflow import NullTracker

NEVER = -1


class Recorder(NullTracker):
    """Records what is logged. With interrupt_at the run ends like a lost node, before that step is saved."""

    def __init__(self, *, interrupt_at: int = NEVER) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.interrupt_at = interrupt_at

    def log(self, metrics: Any, step: int) -> None:
        if step == self.interrupt_at:
            raise KeyboardInterrupt
        self.rows.setdefault(step, {}).update(metrics)


def context_of(
    stage: str, *, checkpoints: CheckpointManager | None = None, interrupt_at: int = NEVER
) -> TrainingContext:
    """The context of a run in this process, without checkpoints unless they are given."""
    return TrainingContext(
        checkpoints=checkpoints or CheckpointManager(None, f"{stage}/x", CheckpointConfig()),
        progress=Progress(stage),
        tracker=Recorder(interrupt_at=interrupt_at),
        group=SINGLE_PROCESS,
    )


def checkpoints_every_step(root: Path, stage: str) -> CheckpointManager:
    """Checkpoints after every step, as of a new process: writer threads have ended, and no lease is held."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    for lease in root.rglob("lease.json"):
        lease.unlink()
    return CheckpointManager(FolderStore(root), f"{stage}/x", CheckpointConfig(every_minutes=0.0))


def break_after_saving(checkpoints: CheckpointManager, *, step: int, weight: Tensor) -> None:
    """Fill a weight with nan as soon as the checkpoint of this step has been written."""
    save = checkpoints.save

    def save_and_break(saved: int, *args: Any) -> None:
        save(saved, *args)
        checkpoints.wait()
        if saved == step:
            with torch.no_grad():
                weight.fill_(math.nan)

    checkpoints.save = save_and_break  # type: ignore[method-assign]
