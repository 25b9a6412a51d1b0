"""Measured process, in the environment of the newest TRL: steps of its SFT or reward trainer.

Written for trl 1.16.0.
"""

import sys
import tempfile
from importlib.metadata import version
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    logging,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.peers.inputs import BATCH, MODEL, REWARD_MODEL, SEED, read_texts
from benchmarks.peers.measure import Marks, print_result, read_job

PAD = 0


class MarkSteps(TrainerCallback):
    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.mark()


def options(folder: str, steps: int) -> dict[str, Any]:
    """What both trainers share: one step per epoch over the same batch, fp32, without anything that is not training."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": steps,
        "learning_rate": 1e-5,
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": SEED,
    }


def train_sft(job: dict[str, Any], folder: str, tokenizer: Any, marks: Marks) -> int:
    texts = read_texts()["demonstrations"]
    rows = {
        "input_ids": [t["prompt_ids"] + t["response_ids"] for t in texts],
        "completion_mask": [[0] * len(t["prompt_ids"]) + [1] * len(t["response_ids"]) for t in texts],
    }
    shared = options(folder, 1 + job["iterations"])
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, trust_remote_code=False),
        args=SFTConfig(**shared, completion_only_loss=True, padding_free=job["padding_free"]),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        callbacks=[MarkSteps(marks)],
    ).train()
    return sum(map(len, rows["input_ids"]))


def train_reward_model(job: dict[str, Any], folder: str, tokenizer: Any, marks: Marks) -> int:
    texts = read_texts()["pairs"]
    rows = {
        name: [t[name]["prompt_ids"] + t[name]["response_ids"] for t in texts]
        for name in ("chosen_ids", "rejected_ids")
    }
    model = AutoModelForSequenceClassification.from_pretrained(
        REWARD_MODEL, num_labels=1, dtype=torch.float32, trust_remote_code=False
    )
    model.config.pad_token_id = PAD
    RewardTrainer(
        model=model,
        args=RewardConfig(**options(folder, 1 + job["iterations"])),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        callbacks=[MarkSteps(marks)],
    ).train()
    return sum(len(ids) for column in rows.values() for ids in column)


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    job, marks = read_job(), Marks()
    tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD)
    train = train_sft if job["stage"] == "sft" else train_reward_model
    with tempfile.TemporaryDirectory() as folder:
        tokens = train(job, folder, tokenizer, marks)
    packages = ("trl", "torch", "transformers")
    print_result(marks, version=", ".join(f"{p} {version(p)}" for p in packages), samples=BATCH, tokens=tokens)


if __name__ == "__main__":
    sys.exit(main())
