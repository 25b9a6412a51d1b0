"""The artifact of PPO."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.ppo.guard import SAMPLES_FILE
from components.ppo.trainer import PpoTrainer
from components.rlhf.data.datasets import save_records
from components.rlhf.models.saving import save_model


def save_policy(
    trainer: PpoTrainer, tokenizer: PreTrainedTokenizerBase, weights: Iterable[tuple[str, Tensor]], folder: Path
) -> None:
    """Write the trained actor as a Hugging Face model folder, with the history of its training.

    history.jsonl has one row of metrics per iteration, validation.jsonl every response to the validation prompts. guard.jsonl has the
    responses of the rollouts that the guard turned down, if there were any.
    """
    actor = trainer.learner.models.actor
    save_model(actor.lm, tokenizer, folder, dtype=actor.dtype, weights=weights)
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trainer.history), encoding="utf-8")
    save_records(folder, "validation", trainer.validation)
    if trainer.guard.memory.samples:
        lines = [json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in trainer.guard.memory.samples]
        (folder / SAMPLES_FILE).write_text("".join(lines), encoding="utf-8")
