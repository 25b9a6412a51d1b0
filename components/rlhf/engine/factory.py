"""Creating the engine that a config names."""

from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from components.rlhf.config.model import TrainingConfig
from components.rlhf.engine.protocol import Group, TrainEngine
from components.rlhf.engine.torch import TorchEngine

if TYPE_CHECKING:
    from components.rlhf.engine.deepspeed import WeightShards


def create_engine(
    module: nn.Module,
    training: TrainingConfig,
    *,
    num_steps: int,
    group: Group,
    dtype: torch.dtype,
) -> TrainEngine:
    """The engine named by training.engine, over the parameters of the module that require gradients.

    dtype is the precision that the model computes in.
    """
    if training.engine == "torch":
        return TorchEngine(module, training, num_steps=num_steps, group=group)
    from components.rlhf.engine.deepspeed import DeepSpeedEngine  # takes seconds to import

    return DeepSpeedEngine(module, training, num_steps=num_steps, group=group, dtype=dtype)


def prepare_frozen_model(module: nn.Module, training: TrainingConfig, *, group: Group, dtype: torch.dtype) -> None:
    """Under ZeRO-3 make each layer of a module that is not trained gather its weights while it computes; else nothing to do.

    Its weights are sharded if they were not loaded so.
    """
    if not shards_weights(training):
        return
    from components.rlhf.engine.deepspeed import shard_frozen_model

    shard_frozen_model(module, training, group=group, dtype=dtype)


def free_frozen_model(module: nn.Module, training: TrainingConfig) -> None:
    """Free the weights of a prepared module that DeepSpeed has; others are free as soon as nothing refers to the module."""
    if not shards_weights(training):
        return
    from components.rlhf.engine.deepspeed import free_shards

    free_shards(module)


def frozen_weights(module: nn.Module, training: TrainingConfig) -> Iterator[tuple[str, Tensor]] | None:
    """The weights of a module that is sharded and not trained, whole and one at a time, on every rank; None unless it is sharded."""
    if not shards_weights(training):
        return None
    from components.rlhf.engine.deepspeed import whole_weights

    return whole_weights(module)


def trained_dtype(training: TrainingConfig, dtype: torch.dtype) -> torch.dtype:
    """The precision of trained weights that compute in dtype: fp32 with torch; DeepSpeed keeps fp32 copies of its own shards."""
    return torch.float32 if training.engine == "torch" else dtype


def weight_shards(training: TrainingConfig, *, group: Group, dtype: torch.dtype) -> "WeightShards | None":
    """What shards the weights of a model while it is loaded, or None unless they are sharded (ZeRO-3). dtype is their precision."""
    if not shards_weights(training):
        return None
    from components.rlhf.engine.deepspeed import WeightShards

    return WeightShards(training, group=group, dtype=dtype)


def shards_weights(training: TrainingConfig) -> bool:
    """Whether the model is sharded over the ranks (ZeRO-3), so that it must not be moved to one device as a whole."""
    return training.engine == "deepspeed" and training.zero_stage == 3


def max_over_shards(training: TrainingConfig, group: Group) -> Callable[[int], int]:
    """The largest of a number over the ranks that shard the weights of a model, or the number itself if none are sharded.

    Ranks that shard weights must use each of them equally often, because gathering one is collective.
    """
    return group.max_int if shards_weights(training) else int


def engine_name(training: TrainingConfig, group: Group) -> str:
    """Name and version of the engine that trained, for summaries."""
    name = f"torch {torch.__version__}"
    if training.engine == "deepspeed":
        name = f"deepspeed {version('deepspeed')}, ZeRO-{training.zero_stage}"
    return name if group.world_size == 1 else f"{name}, {group.world_size} processes"
