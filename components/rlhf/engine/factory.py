"""The one place that knows both engines."""

from importlib.metadata import version

import torch
from torch import nn

from components.rlhf.config.model import TrainingConfig
from components.rlhf.engine.protocol import Group, TrainEngine
from components.rlhf.engine.torch import TorchEngine


def create_engine(
    module: nn.Module,
    training: TrainingConfig,
    *,
    num_steps: int,
    group: Group,
    dtype: torch.dtype,
    learning_rate: float | None = None,
) -> TrainEngine:
    """The engine that the settings name, over what in the module has gradients.

    learning_rate is the peak of the schedule where it is not the settings' own. dtype is what the model computes in.
    """
    if training.engine == "torch":
        return TorchEngine(module, training, num_steps=num_steps, group=group, learning_rate=learning_rate)
    from components.rlhf.engine.deepspeed import DeepSpeedEngine  # takes seconds to import

    return DeepSpeedEngine(module, training, num_steps=num_steps, group=group, dtype=dtype, learning_rate=learning_rate)


def prepare_frozen_model(
    module: nn.Module, training: TrainingConfig, *, group: Group, dtype: torch.dtype, device: torch.device
) -> None:
    """Put a module that is not trained where it computes: on the device, or in shards over all processes under ZeRO-3."""
    if not shards_weights(training):
        module.to(device)
        return
    from components.rlhf.engine.deepspeed import shard_frozen_model

    shard_frozen_model(module, training, group=group, dtype=dtype)


def shards_weights(training: TrainingConfig) -> bool:
    """Whether no process ever has the whole model on its device, so that it must not be moved there in one piece."""
    return training.engine == "deepspeed" and training.zero_stage == 3


def engine_name(training: TrainingConfig, group: Group) -> str:
    """What really trained, with its version, for people and summaries."""
    name = f"torch {torch.__version__}"
    if training.engine == "deepspeed":
        name = f"deepspeed {version('deepspeed')}, ZeRO-{training.zero_stage}"
    return name if group.world_size == 1 else f"{name}, {group.world_size} processes"
