"""Calibration and held-out accuracy of a trained reward model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.reward_model.calibration import calibrate, cut_to_half
from components.reward_model.roc import roc_curve
from components.rlhf.config.model import TrainingConfig
from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.data.records import Completion, PreferencePair
from components.rlhf.engine.factory import max_over_shards
from components.rlhf.engine.protocol import Group
from components.rlhf.engine.shares import over_ranks
from components.rlhf.models.layers import HEAD_NAME
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.rewards.protocol import Scorer
from components.rlhf.rewards.reward_model import RewardModelScorer, pair_accuracy, pair_scores
from components.rlhf.rewards.shared import SharedScorer
from components.rlhf.rewards.text import TextScorer
from components.rlhf.runtime.stage import StageRun

MAX_HELDOUT_PAIRS = 384  # for the held-out accuracies, whose standard error is then at most 2.6%


@dataclass(frozen=True, kw_only=True)
class RewardModelResult:
    """What the stage saves: a trained or imported reward model, calibrated and measured."""

    model: ScalarModel
    tokenizer: PreTrainedTokenizerBase  # to save with it: the SFT model's, or its own if it reads text
    weights: Iterator[tuple[str, Tensor]] | None  # that an engine gathers, on every rank; None for those of the model
    numbers: dict[str, float]
    facts: dict[str, str]  # scored_as, and the training engine
    margins: list[float]  # of the held-out pairs: score of the chosen minus that of the rejected text


def calibrate_and_measure(
    model: ScalarModel,
    training: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pairs: Sequence[PreferencePair],
    responses: Sequence[Completion],
    max_tokens: int,
    group: Group,
    text_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[dict[str, float], list[float]]:
    """Store the normalization in the model's config, then measure accuracy with the scorer that PPO uses; each rank scores a share.

    Returns the numbers and the margins of the held-out pairs.
    responses are those of the SFT model, of which tokenizer is; text_tokenizer is that of a reward model that reads text, with a
    tokenizer of its own.
    """
    pairs = pairs[:MAX_HELDOUT_PAIRS]
    scorer: Scorer = RewardModelScorer(
        model, microbatch_tokens=training.microbatch_tokens, max_over_ranks=max_over_shards(training, group)
    )
    if text_tokenizer is not None:
        scorer = TextScorer(scorer, text_tokenizer)
    scorer = SharedScorer(scorer, partial(over_ranks, group))
    model.mean, model.std = calibrate(scorer, responses)
    lm_config = model.lm.config
    lm_config.reward_mean, lm_config.reward_std = model.mean, model.std
    lm_config.head_name, lm_config.padding_side = HEAD_NAME, "right"
    cut = [cut_to_half(tokenizer, pair, max_tokens=max_tokens) for pair in pairs]
    chosen, rejected = pair_scores(scorer, pairs, tokenizer, max_tokens=max_tokens)
    of_cut = pair_scores(scorer, cut, tokenizer, max_tokens=max_tokens, complete=False)
    numbers = {
        "heldout_accuracy": pair_accuracy(chosen, rejected),
        "heldout_accuracy_cut": pair_accuracy(*of_cut),
        "num_heldout_pairs": float(len(pairs)),
        "reward_mean": model.mean,
        "reward_std": model.std,
        "num_calibration_samples": float(len(responses)),
    }
    return numbers, (chosen - rejected).tolist()


def write_measurements(run: StageRun[RewardModelStageConfig], result: RewardModelResult, **writes: Path) -> None:
    """Write summary, ROC curve and metrics to the paths in writes."""
    run.progress.log(f"accuracy on held-out human pairs: {result.numbers['heldout_accuracy']:.1%}")
    run.write_report("summary", writes["summary"], as_markdown(result.numbers))
    run.write_roc("roc", writes["roc"], roc_curve(result.margins))
    run.write_metrics(writes["metrics"], result.numbers)


def as_markdown(metrics: Mapping[str, float]) -> str:
    return (
        "# Reward model\n\n"
        f"Accuracy on {metrics['num_heldout_pairs']:.0f} held-out human pairs: **{metrics['heldout_accuracy']:.1%}** "
        f"(whole texts; {metrics['heldout_accuracy_cut']:.1%} with both cut to half).\n\n"
        f"Scores of {metrics['num_calibration_samples']:.0f} responses of the SFT model have mean "
        f"{metrics['reward_mean']:.3f} and standard deviation {metrics['reward_std']:.3f}; PPO normalizes by these.\n"
    )
