"""Trains a reward model, then calibrates and measures it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.reward_model.evaluate import RewardModelResult, calibrate_and_measure
from components.reward_model.trainer import RewardModelTrainer
from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.data.records import PreferencePair
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.engine.factory import engine_name
from components.rlhf.runtime.training import TrainingContext


def train_and_measure(
    start: Path,
    config: RewardModelStageConfig,
    sft_model: Path,
    pairs: Sequence[PreferencePair],
    texts: dict[str, Any],
    context: TrainingContext,
    folder: Path,
) -> RewardModelResult:
    """Train from the model folder start, on pairs of the data set in folder. texts are the arguments of calibrate_and_measure."""
    tokenizer, trainer = load_tokenizer(sft_model), RewardModelTrainer(config, start, context)
    numbers = trainer.train(tokenizer, pairs, max_tokens=texts["max_tokens"], folder=folder)
    training = config.reward_model.training
    measured, margins = calibrate_and_measure(trainer.model, training, tokenizer, **texts, group=context.group)
    return RewardModelResult(
        model=trainer.model,
        tokenizer=tokenizer,
        weights=trainer.weights(),
        numbers=numbers | measured,
        facts={"scored_as": "ids", "training_engine": engine_name(training, context.group)},
        margins=margins,
    )
