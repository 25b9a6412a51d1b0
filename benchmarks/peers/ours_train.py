"""Measured process: steps of supervised fine-tuning or of the reward model of this project."""

import sys
from importlib.metadata import version

from transformers import logging

from benchmarks.peers.inputs import BATCH, MODEL, REWARD_MODEL, SEED, read_texts
from benchmarks.peers.measure import Marks, print_result, read_job
from benchmarks.peers.ours_ppo import context_of
from components.reward_model.trainer import RewardModelTrainer
from components.rlhf.config.model import ModelConfig, SamplingConfig, TrainingConfig
from components.rlhf.config.reward_model import RewardModelConfig, RewardModelStageConfig
from components.rlhf.config.sft import SftConfig, SftStageConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.data.records import Demonstration, PreferencePair, Turn
from components.rlhf.data.tokenizer import load_tokenizer
from components.sft.trainer import SftTrainer

TRAINING = TrainingConfig(engine="torch", learning_rate=1e-5, schedule="linear", warmup_fraction=0.0)
MODEL_CONFIG = ModelConfig(precision="fp32")
MAX_TOKENS = 4096


def train_sft(steps: int, marks: Marks) -> int:
    """One step per epoch over the same batch; returns the tokens of a step."""
    texts = read_texts()["demonstrations"]
    demonstrations = [Demonstration(turns=(Turn(context=t["prompt"], answer=t["completion"]),)) for t in texts]
    config = SftStageConfig(
        model=MODEL_CONFIG,
        sft=SftConfig(num_epochs=steps, batch_size=BATCH, training=TRAINING),
        checkpoint=CheckpointConfig(),
        seed=SEED,
    )
    trainer = SftTrainer(config, MODEL, context_of(marks))
    trainer.train(load_tokenizer(MODEL), demonstrations, [], max_tokens=MAX_TOKENS)
    return sum(len(text["prompt_ids"]) + len(text["response_ids"]) for text in texts)


def train_reward_model(steps: int, marks: Marks) -> int:
    """One step per epoch over the same batch of pairs, with the loss of whole texts only; returns the tokens of a step."""
    texts = read_texts()["pairs"]
    pairs = [PreferencePair(prompt=t["prompt"], chosen=t["chosen"], rejected=t["rejected"]) for t in texts]
    config = RewardModelStageConfig(
        model=MODEL_CONFIG,
        reward_model=RewardModelConfig(
            num_epochs=steps, batch_size=BATCH, prefix_loss=0.0, num_calibration_samples=0, training=TRAINING
        ),
        sampling=SamplingConfig(),
        checkpoint=CheckpointConfig(),
        seed=SEED,
    )
    trainer = RewardModelTrainer(config, REWARD_MODEL, context_of(marks))
    trainer.train(load_tokenizer(MODEL), pairs, max_tokens=MAX_TOKENS)
    return sum(len(ids) for t in texts for name in ("chosen_ids", "rejected_ids") for ids in t[name].values())


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    job, marks = read_job(), Marks()
    train = train_sft if job["stage"] == "sft" else train_reward_model
    tokens = train(1 + job["iterations"], marks)
    found = f"torch {version('torch')}, transformers {version('transformers')}"
    print_result(marks, version=found, samples=BATCH, tokens=tokens)


if __name__ == "__main__":
    sys.exit(main())
