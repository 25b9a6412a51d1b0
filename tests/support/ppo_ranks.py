"""The cases of tests/ppo/test_processes.py: `torchrun -m tests.support.ppo_ranks WHAT FOLDER SFT REWARD_MODEL`."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from components.ppo import trainer as trainer_module
from components.ppo.models import load_models
from components.ppo.trainer import PpoTrainer
from components.ppo.validation import Evaluation, validate
from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.config.model import LoraConfig
from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.data.records import Prompt
from components.rlhf.engine.group import SINGLE_PROCESS, join_process_group
from components.rlhf.engine.protocol import Group
from components.rlhf.environments.factory import open_player
from components.rlhf.storage.store import FolderStore
from components.rlhf.text.errors import NonFiniteError
from tests.support.ppo_runs import PROMPTS, VALIDATION, config_of, rewards_of
from tests.support.training import NEVER, context_of

FP32, BF16 = torch.float32, torch.bfloat16
MANY = [
    Prompt(prompt=text, id=f"validation-{i}") for i, text in enumerate(["It was", "I", "One film", "So they", "We"])
]
SCORES = (0.0, 1.0, 3.0, 2.0, 2.5)  # of the evaluations after iterations 0 to 4
BEST, SICK, KILLED = (
    2,
    3,
    4,
)  # iterations: the best evaluation, an update that fails, and the one before whose end the run is killed


@dataclass(frozen=True, kw_only=True)
class Case:
    engine: str
    zero_stage: int
    dtype: torch.dtype
    lora: bool = False
    name: str = field(init=False)

    def __post_init__(self) -> None:
        parts = [self.engine, f"zero{self.zero_stage}", str(self.dtype).removeprefix("torch."), *["lora"] * self.lora]
        object.__setattr__(self, "name", "-".join(parts))


CASES = [
    Case(engine="torch", zero_stage=2, dtype=FP32, lora=True),
    *(Case(engine="deepspeed", zero_stage=stage, dtype=FP32) for stage in (1, 2)),
    Case(engine="deepspeed", zero_stage=3, dtype=BF16),
    Case(engine="deepspeed", zero_stage=2, dtype=FP32, lora=True),
]


def evaluations(sft: Path, reward_model: Path, group: Group = SINGLE_PROCESS) -> list[dict[str, Any]]:
    """Metrics and samples of an evaluation with 1 to 5 prompts, of a policy that differs from the SFT model."""
    stage = config_of(
        minibatch=6,
        rollout={"num_prompts": 6},
        training={"num_processes": group.world_size, "microbatch_tokens": 12},
        sampling={"max_new_tokens": 8, "temperature": 2.0},
    )
    models, rollout = load_models(stage, sft, reward_model, dtype=FP32, prompts=[], group=group)
    trainer = PpoTrainer(stage, models, rewards_of(models), rollout, replace(context_of("ppo"), group=group))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in models.actor.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    rollout.stop_ids = (0, *range(1, 80))  # responses of different lengths
    distribution = replace(trainer.learner.distribution, stop_ids=rollout.stop_ids)
    learner = replace(trainer.learner, distribution=distribution)
    found = []
    for count in range(1, len(MANY) + 1):
        metrics, samples = validate(learner, rollout, MANY[:count], iteration=0)
        found.append({"metrics": metrics, "samples": [asdict(sample) for sample in samples]})
    return found


GAME = """
class Game:
    def reset(self, prompt, columns):
        self.turns = 0
        if prompt == "So":
            raise ValueError("no game")

    def step(self, text):
        self.turns += 1
        return f" [{len(text)}] ", len(text) / 8, self.turns == 3
"""
ENVIRONMENT = {"kind": "function", "function": "mine:Game", "source": GAME, "max_turns": 3, "stop": ["e", "t"]}


def turns(sft: Path, reward_model: Path, group: Group = SINGLE_PROCESS) -> dict[str, Any]:
    """The metrics of a run with an environment that fails for one of the prompts, and its samples of the validation prompts."""
    stage = config_of(
        eval_every=1,
        keep="last",
        environment=ENVIRONMENT,
        training={"num_processes": group.world_size},
        sampling={"max_new_tokens": 12, "temperature": 2.0},
    )
    models, rollout = load_models(stage, sft, reward_model, dtype=FP32, prompts=[], group=group)
    rollout.stop_ids = (0, *range(1, 20))
    context = replace(context_of("ppo"), group=group)
    player = open_player(rollout, stage.ppo.environment, log=context.progress.log)
    trainer = PpoTrainer(stage, models, rewards_of(models), rollout, context, player=player)
    history = trainer.train(PROMPTS, VALIDATION)
    trainer.close()
    return {"history": history, "samples": [asdict(sample) for sample in trainer.validation]}


def stage_of(case: Case, world_size: int) -> PpoStageConfig:
    return config_of(
        frozen=0 if case.zero_stage == 3 else 1,
        lora=LoraConfig(rank=4) if case.lora else None,
        num_iterations=4,
        eval_every=1,
        kl_coef=0.0,
        guard={"action": "rollback", "keep_every": 1},
        training={"engine": case.engine, "zero_stage": case.zero_stage, "num_processes": world_size},
    )


def trainer_of(
    case: Case, sft: Path, reward_model: Path, group: Group, store: FolderStore | None, *, interrupt_at: int = NEVER
) -> PpoTrainer:
    stage = stage_of(case, group.world_size)
    models, rollout = load_models(stage, sft, reward_model, dtype=case.dtype, prompts=[], group=group)
    checkpoints = CheckpointManager(store, f"ppo/{case.name}", CheckpointConfig(every_minutes=0.0), group)
    context = replace(context_of("ppo", checkpoints=checkpoints, interrupt_at=interrupt_at), group=group)
    return PpoTrainer(stage, models, rewards_of(models), rollout, context)


def weights_of(trainer: PpoTrainer) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.learner.engines["actor"].full_weights()}


def watch(trainer: PpoTrainer, scores: tuple[float, ...]) -> dict[int, dict[str, Tensor]]:
    """Give the evaluations these objectives; returns the actor's weights at each of them, by iteration, as the run goes on."""
    seen: dict[int, dict[str, Tensor]] = {}
    plain, remaining = trainer.keeper.add, iter(scores)

    def add(new: Evaluation) -> None:
        seen[new.iteration] = weights_of(trainer)
        plain(replace(new, objective=next(remaining)))

    trainer.keeper.add = add  # type: ignore[method-assign]
    return seen


@contextmanager
def sick_update() -> Iterator[None]:
    """The update of iteration SICK fails after it has changed the weights."""
    plain = trainer_module.update

    def update(learner: Any, experience: Any, *, seed: int, iteration: int) -> dict[str, float]:
        found = plain(learner, experience, seed=seed, iteration=iteration)
        if iteration == SICK:
            raise NonFiniteError("loss/policy is nan")
        return found

    with mock.patch.object(trainer_module, "update", update):
        yield


def keep(case: Case, sft: Path, reward_model: Path, group: Group, folder: Path) -> dict[str, dict[str, Tensor]]:
    """A whole run, and one that is killed and resumed: weights that they export, at evaluations, and after the rollback."""
    with sick_update():
        whole = trainer_of(case, sft, reward_model, group, None)
        seen = watch(whole, SCORES)
        whole.train(PROMPTS, VALIDATION)
        assert [event.iteration for event in whole.guard.events] == [SICK] and whole.outcome.iteration == BEST
        exported = dict(weights_of(whole))
        whole.checkpoints.release()
        store = FolderStore(folder / "store")
        dying = trainer_of(case, sft, reward_model, group, store, interrupt_at=KILLED)
        watch(dying, SCORES)
        try:
            dying.train(PROMPTS, VALIDATION)
        except KeyboardInterrupt:
            dying.checkpoints.wait()
            dying.checkpoints.release()
        group.barrier()
        again = trainer_of(case, sft, reward_model, group, store)
        watch(again, SCORES[KILLED:])
        again.train(PROMPTS, VALIDATION)
        assert again.outcome == whole.outcome, (again.outcome, whole.outcome)
        resumed = weights_of(again)
        again.checkpoints.wait()
        group.barrier()
    return {
        "exported": exported,
        "resumed": resumed,
        **{f"evaluation-{number}": found for number, found in seen.items()},
    }


def main(what: str, folder: Path, sft: Path, reward_model: Path) -> None:
    with join_process_group(timeout_minutes=5) as group:
        if what in ("validation", "turns"):
            found: Any = (turns if what == "turns" else evaluations)(sft, reward_model, group)
            (folder / f"{group.world_size}-{group.rank}.json").write_text(json.dumps(found))
            return
        for case in CASES:
            group.watchdog(case.name)
            states = keep(case, sft, reward_model, group, folder)
            if group.rank == 0:
                tensors = {
                    f"{state}/{name}": w.contiguous() for state, found in states.items() for name, w in found.items()
                }
                save_file(tensors, folder / f"{case.name}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
