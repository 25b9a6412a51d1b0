"""The cases of test_multi_process.py: `torchrun -m tests.support.engine_cases CASE FOLDER MODEL`.

Every case trains the tiny model on the same three batches; the numbers and weights of each go to FOLDER.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from components.rlhf.config.model import LoraConfig, TrainingConfig
from components.rlhf.data.batching import collate
from components.rlhf.data.microbatches import local_microbatches
from components.rlhf.engine.factory import (
    create_engine,
    prepare_frozen_model,
    shards_weights,
    trained_dtype,
    weight_shards,
)
from components.rlhf.engine.group import SINGLE_PROCESS, join_process_group
from components.rlhf.engine.protocol import Group, TrainEngine
from components.rlhf.maths.losses import aggregate, pairwise_loss
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.layers import enable_gradient_checkpointing
from components.rlhf.models.loading import load_causal_lm, load_scalar_lm
from components.rlhf.models.lora import add_adapters
from components.rlhf.models.scalar import ScalarModel

Numbers = list[dict[str, float]]
# (prompt, response) ids: of every length, and in the last batch fewer texts than there are processes.
BATCHES: list[list[tuple[list[int], list[int]]]] = [
    [([5, 6, 7], [8, 9, 10, 11]), ([12], [13, 14]), ([15, 16], [17]), ([18, 19, 20], [21, 22, 23, 24, 25, 26])],
    [([31, 32], [33, 34, 35]), ([36], [37, 38, 39, 40]), ([41], [42, 43])],
    [([51, 52], [53, 54, 55, 56])],
]
MAX_TOKENS = 14


def training_of(engine: str, **changes: Any) -> TrainingConfig:
    defaults = dict(learning_rate=1e-2, schedule="linear", warmup_fraction=0.0, weight_decay=0.1, max_grad_norm=0.5)
    return TrainingConfig(engine=engine, **(defaults | changes))


def placed(training: TrainingConfig, dtype: torch.dtype, group: Group) -> dict[str, Any]:
    """How a stage loads a model that this engine trains."""
    return {
        "dtype": dtype,
        "trained_dtype": trained_dtype(training, dtype),
        "shard": weight_shards(training, group=group, dtype=dtype),
    }


def actor_of(
    model: Path,
    training: TrainingConfig,
    dtype: torch.dtype,
    group: Group = SINGLE_PROCESS,
    *,
    with_adapters: bool = False,
    in_4_bits: bool = False,
) -> Actor:
    lm = load_causal_lm(
        model,
        num_frozen_layers=0,
        trainable=not with_adapters,
        quantization="nf4" if in_4_bits else None,
        **placed(training, dtype, group),
    )
    if with_adapters:
        add_adapters(lm, LoraConfig(rank=4), num_frozen_layers=0, seed=5)
    if training.gradient_checkpointing:
        enable_gradient_checkpointing(lm)
    return Actor(lm, num_frozen_layers=0, dtype=dtype)


def scalar_of(model: Path, training: TrainingConfig, dtype: torch.dtype, group: Group) -> ScalarModel:
    lm = load_scalar_lm(model, num_frozen_layers=0, seed=3, **placed(training, dtype, group))
    return ScalarModel(lm, num_frozen_layers=0, dtype=dtype)


def step(
    engine: TrainEngine, loss_of: Callable[[list[int]], Tensor], lengths: list[int], group: Group
) -> dict[str, float]:
    parts = local_microbatches(
        lengths, MAX_TOKENS, rank=group.rank, world_size=group.world_size, max_over_ranks=group.max_int
    )
    total = torch.zeros(())
    for number, (rows, weight) in enumerate(parts, start=1):
        loss = weight * loss_of(rows)
        total += loss.detach().float()
        engine.backward(loss, last=number == len(parts))
    info = engine.step()
    return {"loss": group.sum(total).item(), "grad_norm": info.grad_norm, "learning_rate": info.learning_rate}


def language_steps(actor: Actor, engine: TrainEngine, batches: list[Any], group: Group) -> Iterator[dict[str, float]]:
    for batch in batches:
        denominator = sum(len(response) for _, response in batch)

        def loss_of(rows: list[int], batch: Any = batch, denominator: int = denominator) -> Tensor:
            tokens = collate([batch[i][0] for i in rows], [batch[i][1] for i in rows])
            logprobs, _ = actor(tokens, SamplingDistribution())
            return aggregate(-logprobs, tokens.response_mask, "token-mean", denominator)

        yield step(engine, loss_of, [len(p) + len(r) for p, r in batch], group)


def pair_steps(model: ScalarModel, engine: TrainEngine, group: Group) -> Iterator[dict[str, float]]:
    """Each text of a batch is preferred to the first text of the next batch."""
    for number, batch in enumerate(BATCHES):
        worse = BATCHES[(number + 1) % 3][0]

        def loss_of(rows: list[int], batch: Any = batch, worse: Any = worse) -> Tensor:
            texts = [batch[i] for i in rows] + [worse] * len(rows)
            tokens = collate([p for p, _ in texts], [r for _, r in texts])
            chosen, rejected = model.scores(tokens).chunk(2)
            return pairwise_loss(chosen, rejected).sum() / len(batch)

        yield step(engine, loss_of, [len(p) + len(r) for p, r in batch], group)


def whole_weights(engine: TrainEngine) -> dict[str, Tensor]:
    return {
        name.removeprefix("lm."): weight.to("cpu", torch.float32, copy=True) for name, weight in engine.full_weights()
    }


def train(
    kind: str,
    model: Path,
    training: TrainingConfig,
    dtype: torch.dtype,
    group: Group = SINGLE_PROCESS,
    folder: Path | None = None,
) -> tuple[Numbers, dict[str, Tensor]]:
    """Three steps; with a folder, as two runs of which the second resumes from the first one's checkpoint after step 2."""
    if folder is not None:
        actor, engine = actor_and_engine(model, training, dtype, group)
        numbers = list(language_steps(actor, engine, BATCHES[:2], group))
        folder.mkdir(parents=True, exist_ok=True)
        if own := engine.snapshot():
            save_file(own, folder / f"engine-{group.rank:05d}.safetensors")
        group.barrier()
        rest, weights = resume(model, training, dtype, group, folder)
        return numbers + rest, weights
    if kind == "scalar":
        scalar = scalar_of(model, training, dtype, group)
        engine = create_engine(scalar, training, num_steps=4, group=group, dtype=dtype)
        numbers = list(pair_steps(scalar, engine, group))
    else:
        with_adapters = kind in ("adapters", "qlora")
        actor = actor_of(model, training, dtype, group, with_adapters=with_adapters, in_4_bits=kind == "qlora")
        engine = create_engine(actor, training, num_steps=4, group=group, dtype=dtype)
        numbers = list(language_steps(actor, engine, BATCHES, group))
        if with_adapters:
            return numbers, {name: weight.float() for name, weight in actor.export_weights(engine.full_weights())}
    return numbers, whole_weights(engine)


def actor_and_engine(
    model: Path, training: TrainingConfig, dtype: torch.dtype, group: Group
) -> tuple[Actor, TrainEngine]:
    actor = actor_of(model, training, dtype, group)
    return actor, create_engine(actor, training, num_steps=4, group=group, dtype=dtype)


def resume(
    model: Path, training: TrainingConfig, dtype: torch.dtype, group: Group, folder: Path
) -> tuple[Numbers, dict[str, Tensor]]:
    """The third step, from the checkpoint in folder."""
    actor, engine = actor_and_engine(model, training, dtype, group)
    engine.load(folder)
    numbers = list(language_steps(actor, engine, BATCHES[2:], group))
    return numbers, whole_weights(engine)


def frozen_logprobs(model: Path, training: TrainingConfig, group: Group) -> Tensor:
    """Outputs of an untrained model on the first batch, the same on every rank."""
    shard = weight_shards(training, group=group, dtype=FP32)
    lm = load_causal_lm(model, num_frozen_layers=0, dtype=FP32, trainable=False, shard=shard)
    actor = Actor(lm, num_frozen_layers=0, dtype=FP32)
    prepare_frozen_model(actor, training, group=group, dtype=FP32)
    assert not shards_weights(training) or all(hasattr(p, "ds_tensor") for p in actor.parameters())
    with torch.no_grad():
        logprobs, _ = actor(collate([p for p, _ in BATCHES[0]], [r for _, r in BATCHES[0]]), SamplingDistribution())
    return logprobs


def main(folder: Path, model: Path) -> None:
    with join_process_group(timeout_minutes=5) as group:
        for case in CASES if group.world_size > 1 else [case for case in CASES if has_checkpoint(*case)]:
            kind, engine, changes, dtype = case
            training = training_of(engine, num_processes=group.world_size, **changes)
            checkpoint = folder / f"{name_of(*case)}-checkpoint" if has_checkpoint(*case) else None
            if group.world_size > 1:
                numbers, weights = train(kind, model, training, dtype, group, checkpoint)
            else:
                assert checkpoint
                numbers, weights = resume(model, training, dtype, group, checkpoint)
            if group.rank == 0:
                name = name_of(*case) if group.world_size > 1 else f"{name_of(*case)}-alone"
                save_file(weights, folder / f"{name}.safetensors")
                (folder / f"{name}.json").write_text(json.dumps(numbers))
        if group.world_size > 1:
            sharded = frozen_logprobs(model, training_of("deepspeed", zero_stage=3, num_processes=2), group)
            if group.rank == 0:
                save_file({"logprobs": sharded}, folder / "frozen.safetensors")


def has_checkpoint(kind: str, engine: str, changes: dict[str, Any], dtype: torch.dtype) -> bool:
    """Cases that resume from a checkpoint after step 2, also with one process."""
    return kind == "actor" and dtype == FP32 and (engine == "torch" or list(changes) == ["zero_stage"])


FP32, BF16 = torch.float32, torch.bfloat16
CASES: list[tuple[str, str, dict[str, Any], torch.dtype]] = [
    ("actor", "torch", {}, FP32),
    *(("actor", "deepspeed", {"zero_stage": stage}, dtype) for stage in (1, 2, 3) for dtype in (FP32, BF16)),
    ("actor", "deepspeed", {"zero_stage": 2, "offload_optimizer": True}, FP32),
    ("actor", "deepspeed", {"zero_stage": 3, "offload_optimizer": True}, BF16),
    ("actor", "deepspeed", {"zero_stage": 3, "gradient_checkpointing": True}, FP32),
    ("adapters", "torch", {}, FP32),
    ("adapters", "deepspeed", {"zero_stage": 2}, FP32),
    ("qlora", "torch", {}, FP32),
    *(("qlora", "deepspeed", {"zero_stage": stage}, FP32) for stage in (1, 2)),
    ("qlora", "deepspeed", {"zero_stage": 2, "gradient_checkpointing": True}, BF16),
    ("scalar", "torch", {}, FP32),
    ("scalar", "deepspeed", {"zero_stage": 2}, FP32),
    ("scalar", "deepspeed", {"zero_stage": 3}, FP32),
    ("scalar", "deepspeed", {"zero_stage": 3}, BF16),
]


def name_of(kind: str, engine: str, changes: dict[str, Any], dtype: torch.dtype) -> str:
    settings = "-".join(f"{key}{value}" for key, value in changes.items())
    return f"{kind}-{engine}-{settings}-{str(dtype).removeprefix('torch.')}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
