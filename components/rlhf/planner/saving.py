"""Checkpoints: bytes and seconds of a save, and how often to save for a given rate of lost nodes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from components.rlhf.config.params import Params
from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.planner.plan import Shapes, job_of, machine_of
from components.rlhf.planner.ppo_models import ppo_copies
from components.rlhf.planner.training_stages import model_copy

HOST_COPY_BYTES_PER_SECOND = 5e9  # from a device to main memory, of one process


@dataclass(frozen=True, kw_only=True)
class Saves:
    """The checkpoints of a stage. Training waits while tensors are copied to main memory; writing them goes on beside it."""

    stage: str
    total_bytes: int
    stall_seconds: float
    write_seconds: float

    def minutes(self, mtbf_hours: float) -> float:
        """The proposed checkpoint.every_minutes: never more often than a save takes to be written."""
        return max(best_interval(max(self.stall_seconds, 1.0), 3600 * mtbf_hours), self.write_seconds) / 60


def proposed_minutes(longest: Saves, all_saves: Sequence[Saves], mtbf_hours: float) -> int:
    """One interval for a run: that of its longest stage, but no stage may save more often than its saves can be written."""
    slowest = max(saves.write_seconds for saves in all_saves) / 60
    return max(round(longest.minutes(mtbf_hours)), math.ceil(slowest), 1)


def best_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """Seconds between saves that lose the least time (Young 1974, Daly 2006): sqrt(2 x save x time between failures)."""
    return math.sqrt(2 * save_seconds * mtbf_seconds)


def lost_share(interval: float, save_seconds: float, mtbf_seconds: float) -> float:
    """The share of time that is lost to saves, and to work since the last one."""
    return save_seconds / interval + interval / 2 / mtbf_seconds


def saves_of(params: Params, shapes: Shapes, stage: str, *, bytes_per_second: float, num_nodes: int) -> Saves:
    """The saves of a training stage; every node writes its processes' shares at this many bytes a second."""
    machine = machine_of(params.cluster.profile(stage), params.model.precision)
    job = job_of(params, shapes, machine)
    training = getattr(params, stage).training
    if stage == "ppo":
        copies = ppo_copies(params.stage(PpoStageConfig), job)
        each = copies.actor.snapshot + copies.critic.snapshot
    else:
        each = model_copy(shapes.base, params.model, training, job, scalar=stage == "reward_model").snapshot
    # The engine torch saves from rank 0 alone.
    writers = training.num_processes if training.engine == "deepspeed" else 1
    total, nodes = each * writers, num_nodes if training.engine == "deepspeed" else 1
    return Saves(
        stage=stage,
        total_bytes=total,
        stall_seconds=each / HOST_COPY_BYTES_PER_SECOND,
        write_seconds=total / nodes / bytes_per_second,
    )
