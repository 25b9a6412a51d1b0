"""Bytes of the copies of a model in one process: trained by an engine, or frozen."""

from dataclasses import dataclass

from components.rlhf.config.model import TrainingConfig
from components.rlhf.planner.constants import DEEPSPEED_BUCKET, DEEPSPEED_LIVE, DEEPSPEED_PREFETCH, REDUCE_BUCKET


@dataclass(frozen=True, kw_only=True)
class Numeric:
    """How a process computes: bf16 or fp32, on a GPU or not."""

    bf16: bool
    on_gpu: bool

    @property
    def width(self) -> int:
        """Bytes of a value in the computing precision."""
        return 2 if self.bf16 else 4


@dataclass(frozen=True, kw_only=True)
class TrainedCopy:
    """Bytes that one process holds for a model that it trains."""

    weights: int
    cast: int  # bf16 copies of fp32 weights, which autocast keeps during a pass
    optimizer: int  # fp32 masters and moments
    gradients: int  # at the end of a backward pass
    buffers: int  # of the engine, all the time
    working: int  # of the engine, during forward and backward passes
    step: int  # of the engine, during the optimizer's step, when activations are gone
    snapshot: int  # the copy of a checkpoint in main memory
    gathers: bool = False  # whether the working weights are allocated and freed layer by layer


NO_COPY = TrainedCopy(weights=0, cast=0, optimizer=0, gradients=0, buffers=0, working=0, step=0, snapshot=0)


def shards_weights(training: TrainingConfig) -> bool:
    return training.engine == "deepspeed" and training.zero_stage == 3


def frozen_copy(parameters: int, training: TrainingConfig | None, numeric: Numeric) -> int:
    """Bytes of a model that is not trained; sharded over the processes under ZeRO-3."""
    share = training.num_processes if training and shards_weights(training) else 1
    return -(-parameters * numeric.width // share)


def gathered(parameters: int, largest: int, training: TrainingConfig | None, numeric: Numeric) -> int:
    """Bytes of a frozen model that are whole in a process while it computes: under ZeRO-3 a layer, and what is fetched ahead of it."""
    if training is None or not shards_weights(training):
        return 0
    return numeric.width * (min(parameters, DEEPSPEED_PREFETCH) + largest)


def trained_copy(trained: int, frozen: int, largest: int, training: TrainingConfig, numeric: Numeric) -> TrainedCopy:
    """A model with this many trained and frozen parameters; largest is the size of its largest trained tensor."""
    if training.engine == "torch":
        return _replicated(trained, frozen, largest, training, numeric)
    share = -(-trained // training.num_processes)
    if training.zero_stage == 3:
        return _sharded(trained, share, largest, training, numeric)
    return _partly_sharded(trained, frozen, share, training, numeric)


def _replicated(trained: int, frozen: int, largest: int, training: TrainingConfig, numeric: Numeric) -> TrainedCopy:
    """engine/torch.py: fp32 weights, gradients and moments in every process."""
    several = training.num_processes > 1
    bucket = 4 * max(min(trained, REDUCE_BUCKET), largest)
    return TrainedCopy(
        weights=4 * trained + numeric.width * frozen,
        cast=2 * trained if numeric.bf16 else 0,
        optimizer=8 * trained,
        gradients=4 * trained,
        buffers=0,
        working=0,
        step=2 * bucket if several else 0,  # a bucket, and its sum over the processes
        snapshot=12 * trained,  # all of it in rank 0
    )


def _adam_temporaries(share: int, numeric: Numeric) -> int:
    """torch's AdamW on one flat tensor: the square root of a moment, and without a GPU its quotient too."""
    return (4 if numeric.on_gpu else 8) * share


def _partly_sharded(trained: int, frozen: int, share: int, training: TrainingConfig, numeric: Numeric) -> TrainedCopy:
    """engine/deepspeed.py with ZeRO 1 and 2: weights in the computing precision, sharded fp32 masters and moments."""
    width, masters = numeric.width, 12 * share
    bucket = width * (DEEPSPEED_BUCKET * 2 if numeric.on_gpu else min(trained, DEEPSPEED_BUCKET))
    if training.zero_stage == 1 and numeric.bf16 and not training.offload_optimizer:  # DeepSpeed's BF16_Optimizer
        gradients, buffers, working = width * trained, 4 * trained, 0  # those of the pass, and their fp32 sums
    elif training.zero_stage == 1:
        gradients, buffers, working = width * trained + 4 * share, 0, bucket
    else:
        gradients, buffers, working = 8 * share, 0, bucket  # the sums so far, and those of the last pass
    return TrainedCopy(
        weights=width * (trained + frozen),
        cast=0,
        optimizer=masters,
        gradients=gradients,
        buffers=buffers,
        working=working,
        step=4 * share + _adam_temporaries(share, numeric),  # a flat copy of the gradients
        snapshot=masters,
    )


def _sharded(trained: int, share: int, largest: int, training: TrainingConfig, numeric: Numeric) -> TrainedCopy:
    """ZeRO-3: everything sharded; weights are gathered for a layer and stay while DeepSpeed expects to need them again."""
    width = numeric.width
    live = width * min(trained, DEEPSPEED_LIVE)
    bucket = width * (DEEPSPEED_BUCKET if numeric.on_gpu else min(trained, DEEPSPEED_BUCKET))
    # The gradients of a bucket are copied into one tensor to be scattered; gloo, which cannot scatter, copies that once more.
    reduced = bucket if numeric.on_gpu else 2 * bucket
    return TrainedCopy(
        weights=width * share,
        cast=0,
        optimizer=(12 if numeric.bf16 else 8) * share,  # fp32 weights are their own masters
        gradients=4 * share,
        buffers=bucket if numeric.on_gpu else 0,
        working=live + reduced + (0 if numeric.on_gpu else bucket) + width * largest,
        step=4 * share + _adam_temporaries(share, numeric),
        snapshot=12 * share,
        gathers=True,
    )
