"""A small run of training on preferences."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from components.dpo.examples import Examples, encode
from components.dpo.trainer import DpoTrainer
from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.config.dpo import DpoConfig, DpoStageConfig
from components.rlhf.config.model import LoraConfig, ModelConfig, TrainingConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.data.records import LabeledText, PreferencePair
from tests.support.training import NEVER, context_of

GOOD, BAD = (" good", " a good film", " very good"), (" bad", " a bad one", " very bad")
PAIRS = [PreferencePair(prompt="It is", chosen=good, rejected=bad) for good in GOOD for bad in BAD]
HELDOUT = [PreferencePair(prompt="It", chosen=good, rejected=bad) for good, bad in zip(GOOD, BAD, strict=True)]
LABELED = [
    LabeledText(prompt=prompt, completion=text, is_desirable=text in GOOD)
    for prompt in ("It is", "I")
    for text in (*GOOD, *BAD[:2])
]
# Each loss with settings that let a tiny model learn in a few steps.
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "ipo": {},
    "cdpo": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "simpo": {},
    "kto": {"desirable_weight": 1.5},
}


def config_of(loss: str = "dpo", *, frozen: int = 0, lora: LoraConfig | None = None, **settings: Any) -> DpoStageConfig:
    training = {"learning_rate": 1e-2, "schedule": "cosine", "warmup_fraction": 0.2, "microbatch_tokens": 128}
    defaults = {"num_epochs": 2, "batch_size": 4, **LOSSES[loss]}
    return DpoStageConfig(
        model=ModelConfig(num_frozen_layers=frozen, precision="fp32", lora=lora),
        dpo=DpoConfig(
            loss=loss,
            training=TrainingConfig(**(training | settings.pop("training", {}))),
            **(defaults | settings),
        ),
        checkpoint=CheckpointConfig(),
        seed=3,
    )


def trainer_of(
    folder: Path,
    loss: str = "dpo",
    *,
    checkpoints: CheckpointManager | None = None,
    interrupt_at: int = NEVER,
    **settings: Any,
) -> DpoTrainer:
    context = context_of("dpo", checkpoints=checkpoints, interrupt_at=interrupt_at)
    return DpoTrainer(config_of(loss, **settings), folder, context)


def examples_of(
    folder: Path, loss: str = "dpo", *, max_tokens: int = 64, data: Path | None = None
) -> tuple[Examples, Examples]:
    """What the loss trains on, and the held-out pairs."""
    options: dict[str, Any] = dict(
        tokenizer=AutoTokenizer.from_pretrained(folder), max_tokens=max_tokens, folder=data, log=print
    )
    train = encode(LABELED, split="labeled", **options) if loss == "kto" else encode(PAIRS, split="train", **options)
    return train, encode(HELDOUT, split="heldout", **options)


def train(trainer: DpoTrainer, folder: Path) -> dict[str, float]:
    """Train on the small data; folder is that of the model."""
    return trainer.train(*examples_of(folder, trainer.dpo.loss), max_tokens=64)
