"""The cases of tests/dpo/test_processes.py: `torchrun -m tests.support.dpo_ranks FOLDER MODEL`."""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from components.dpo.trainer import DpoTrainer
from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.config.model import LoraConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.engine.group import SINGLE_PROCESS, join_process_group
from components.rlhf.engine.protocol import Group
from components.rlhf.storage.store import FolderStore
from tests.support.dpo_runs import config_of, train
from tests.support.training import NEVER, context_of

KILLED = 4  # the step before whose end the run is killed


@dataclass(frozen=True, kw_only=True)
class Case:
    loss: str
    engine: str = "torch"
    zero_stage: int = 2
    frozen: int = 0
    lora: bool = False
    precision: str = "fp32"
    name: str = field(init=False)

    def __post_init__(self) -> None:
        parts = [self.loss, self.engine, f"zero{self.zero_stage}", self.precision, f"frozen{self.frozen}"]
        object.__setattr__(self, "name", "-".join(parts + ["lora"] * self.lora))


CASES = [
    Case(loss="dpo", frozen=1),
    Case(loss="kto", frozen=1, lora=True),
    *(Case(loss=loss, engine="deepspeed", zero_stage=stage) for loss in ("dpo", "kto") for stage in (2, 3)),
    Case(loss="simpo", engine="deepspeed", zero_stage=3),
    Case(loss="ipo", engine="deepspeed", zero_stage=1),
    *(Case(loss=loss, engine="deepspeed", frozen=1, lora=True) for loss in ("dpo", "kto")),
    Case(loss="dpo", engine="deepspeed", zero_stage=3, precision="bf16"),
]


def trainer_of(
    case: Case, model: Path, group: Group, store: FolderStore | None = None, *, interrupt_at: int = NEVER
) -> DpoTrainer:
    """In one process with plain torch."""
    engine = "torch" if group.world_size == 1 else case.engine
    config = config_of(
        case.loss,
        frozen=case.frozen,
        lora=LoraConfig(rank=4) if case.lora else None,
        # 9 pairs or 10 answers in steps of 4: the last step of an epoch has less than there are ranks, or as many
        training={
            "engine": engine,
            "zero_stage": case.zero_stage,
            "num_processes": group.world_size,
            "learning_rate": 1e-3,
            "microbatch_tokens": 40,
        },
    )
    config = config.model_copy(update={"model": config.model.model_copy(update={"precision": case.precision})})
    checkpoints = CheckpointManager(store, f"dpo/{case.name}", CheckpointConfig(every_minutes=0.0), group)
    context = replace(context_of("dpo", checkpoints=checkpoints, interrupt_at=interrupt_at), group=group)
    return DpoTrainer(config, model, context)


def weights_of(trainer: DpoTrainer) -> dict[str, Tensor]:
    assert trainer.engine is not None
    return {name: weight.detach().clone().contiguous() for name, weight in trainer.engine.full_weights()}


def run(case: Case, model: Path, group: Group = SINGLE_PROCESS) -> tuple[DpoTrainer, dict[str, float]]:
    trainer = trainer_of(case, model, group)
    return trainer, train(trainer, model)


def main(folder: Path, model: Path) -> None:
    with join_process_group(timeout_minutes=5) as group:
        for case in CASES:
            group.watchdog(case.name)
            whole, numbers = run(case, model, group)
            weights = weights_of(whole)
            store = FolderStore(folder / "store")
            dying = trainer_of(case, model, group, store, interrupt_at=KILLED)
            try:
                train(dying, model)
            except KeyboardInterrupt:
                dying.context.checkpoints.wait()
                dying.context.checkpoints.release()
            group.barrier()
            again = trainer_of(case, model, group, store)
            assert train(again, model) == numbers and again.history == whole.history
            resumed = weights_of(again)
            again.context.checkpoints.wait()
            group.barrier()
            if group.rank == 0:
                tensors = {f"whole/{name}": w for name, w in weights.items()}
                tensors |= {f"resumed/{name}": w for name, w in resumed.items()}
                save_file(tensors, folder / f"{case.name}.safetensors")
                (folder / f"{case.name}.json").write_text(json.dumps([numbers, whole.history]))
        assert torch.distributed.is_initialized()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
