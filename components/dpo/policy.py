"""The artifact of the stage, of the same form as PPO's."""

import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.dpo.trainer import DpoTrainer
from components.rlhf.data.datasets import save_records
from components.rlhf.models.saving import save_model


def save_policy(
    trainer: DpoTrainer, tokenizer: PreTrainedTokenizerBase, weights: Iterable[tuple[str, Tensor]], folder: Path
) -> None:
    """Write the trained policy as a Hugging Face model folder, with a row of metrics per step in history.jsonl.

    validation.jsonl, PPO's responses to the validation prompts, is empty: this stage samples none.
    """
    save_model(trainer.actor.lm, tokenizer, folder, dtype=trainer.dtype, weights=weights)
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trainer.history), encoding="utf-8")
    save_records(folder, "validation", [])
