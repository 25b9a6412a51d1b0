"""Measured process: PPO of this project, whole iterations or only the scores and updates of given responses."""

import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import logging

from benchmarks.peers import chat_lengths
from benchmarks.peers.inputs import MODEL, REWARD_MODEL, read_texts
from benchmarks.peers.measure import Marks, print_result, read_job
from components.ppo.experience import make_experience
from components.ppo.setup import create_trainer
from components.ppo.trainer import PpoTrainer
from components.ppo.update import update
from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.config.model import ModelConfig, SamplingConfig, TrainingConfig
from components.rlhf.config.ppo import CriticConfig, PpoConfig, PpoStageConfig
from components.rlhf.config.rollout import RolloutConfig
from components.rlhf.config.storage import CheckpointConfig, StorageConfig
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.runtime.training import TrainingContext
from components.rlhf.text.progress import Progress
from components.rlhf.tracking.mlflow import NullTracker

LEARNING_RATE, KL_COEF, SEED = 3e-6, 0.05, 1
WARM_UP_TOKENS = 8  # of each prompt and response of the batch that is not measured


class MarkedProgress(Progress):
    """Marks the end of every iteration or step of a trainer."""

    def __init__(self, marks: Marks) -> None:
        super().__init__("benchmark", silent=True)
        self.marks = marks

    def step(self, step: int, total: int, metrics: Mapping[str, float], unit: str = "step") -> None:
        self.marks.mark()


def context_of(marks: Marks) -> TrainingContext:
    """A run without checkpoints and tracking whose steps are marked."""
    return TrainingContext(
        checkpoints=CheckpointManager(None, "peers/none", CheckpointConfig()),
        progress=MarkedProgress(marks),
        tracker=NullTracker(),
        group=SINGLE_PROCESS,
    )


def config_of(job: Mapping[str, Any], *, num_rows: int, iterations: int) -> PpoStageConfig:
    """Settings of equal work: no clipping of gradients or rewards, no normalization, one learning rate that falls to 0."""
    response = job.get("response", 24)
    sampling = SamplingConfig(max_new_tokens=response, min_new_tokens=response, batch_size=num_rows)
    training = TrainingConfig(
        engine="torch",
        learning_rate=LEARNING_RATE,
        schedule="linear",
        warmup_fraction=0.0,
        min_learning_rate_fraction=0.0,
        max_grad_norm=0.0,
        microbatch_tokens=job["microbatch_tokens"],
    )
    ppo = PpoConfig(
        num_iterations=iterations,
        rollout=RolloutConfig(engine="hf", num_prompts=num_rows, sampling=sampling),
        num_epochs=job.get("epochs", 1),
        minibatch=job.get("minibatch", num_rows),
        training=training,
        critic=CriticConfig(trains=job.get("critic", "layers"), learning_rate=LEARNING_RATE),
        kl_coef=KL_COEF,
        old_logprobs="engine",  # as in TRL
        normalize_reward=False,
        reward_clip=None,
    )
    model = ModelConfig(precision=job.get("precision", "fp32"), num_frozen_layers=job.get("frozen", 0))
    return PpoStageConfig(model=model, ppo=ppo, checkpoint=CheckpointConfig(), seed=SEED)


def make_trainer(config: PpoStageConfig, model: Path, reward_model: Path, marks: Marks) -> PpoTrainer:
    folders = dict(sft_model=model, reward_model=reward_model, code=None, demonstrations=None)
    return create_trainer(config, context_of(marks), StorageConfig(), [], **folders)


def measure_iterations(job: Mapping[str, Any], marks: Marks) -> tuple[int, int, dict[str, float]]:
    """Whole iterations; returns samples and tokens of each, and the share of wall time of each phase."""
    given = read_texts()["prompts"][job["prompts"]]
    prompts = [Prompt(prompt=text, id=str(number)) for number, text in enumerate(given["texts"])]
    config = config_of(job, num_rows=len(prompts), iterations=1 + job["iterations"])
    history = make_trainer(config, MODEL, REWARD_MODEL, marks).train(prompts, [])[1:]
    sums = {name: sum(row[name] for row in history) for name in history[0] if name.startswith("seconds/")}
    shares = {name.removeprefix("seconds/"): seconds / sum(sums.values()) for name, seconds in sums.items()}
    return len(prompts), sum(len(ids) + job["response"] for ids in given["ids"]), shares


def completions_of(rows: list[tuple[list[int], list[int]]]) -> list[Completion]:
    """Given responses as a rollout engine would return them."""
    return [
        Completion(
            prompt=Prompt(prompt=f"prompt {number}", id=str(number)),
            prompt_ids=prompt,
            response_ids=response,
            response="",
            logprobs=torch.full((len(response),), -1.0),
            truncated=True,
        )
        for number, (prompt, response) in enumerate(rows)
    ]


def measure_given(
    job: Mapping[str, Any],
    rows: list[tuple[list[int], list[int]]],
    marks: Marks,
    *,
    model: Path = MODEL,
    reward_model: Path = REWARD_MODEL,
) -> tuple[int, int]:
    """Scores and updates of given responses, after an unmeasured batch of short ones; returns samples and tokens of each."""
    config = config_of(job, num_rows=len(rows), iterations=1 + job["iterations"])
    learner = make_trainer(config, model, reward_model, Marks()).learner
    short = [(prompt[:WARM_UP_TOKENS], response[:WARM_UP_TOKENS]) for prompt, response in rows]
    for iteration in range(1 + job["iterations"]):
        completions = completions_of(rows if iteration else short)
        experience = make_experience(learner, completions, kl_coef=KL_COEF)
        update(learner, experience, seed=SEED, iteration=1 + iteration)
        del experience
        marks.mark()
    return len(rows), sum(len(prompt) + len(response) for prompt, response in rows)


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    job, marks = read_job(), Marks()
    if job["program"] == "chat":
        rows = chat_lengths.random_ids(chat_lengths.load(job["rows"]))
        samples, tokens = measure_given(job, rows, marks)
        shares: dict[str, float] = {}
    else:
        samples, tokens, shares = measure_iterations(job, marks)
    found = f"torch {version('torch')}, transformers {version('transformers')}"
    print_result(marks, version=found, samples=samples, tokens=tokens, phases=shares)


if __name__ == "__main__":
    sys.exit(main())
