"""Calibration and held-out accuracy of a trained reward model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.reward_model.calibration import calibrate, cut_to_half, sample_responses
from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.data.records import PreferencePair, Prompt
from components.rlhf.models.layers import HEAD_NAME
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.rewards.protocol import Scorer
from components.rlhf.rewards.reward_model import RewardModelScorer, pair_accuracy
from components.rlhf.rewards.text import TextScorer

MAX_HELDOUT_PAIRS = 384  # for the held-out accuracies, whose standard error is then at most 2.6%


@dataclass(frozen=True, kw_only=True)
class RewardModelResult:
    """What the stage saves: a trained or imported reward model, calibrated and measured."""

    model: ScalarModel
    tokenizer: PreTrainedTokenizerBase  # to save with it: the SFT model's, or its own if it reads text
    weights: Iterator[tuple[str, Tensor]] | None  # that an engine gathers, on every rank; None for those of the model
    numbers: dict[str, float]
    facts: dict[str, str]  # scored_as, and the training engine


def calibrate_and_measure(
    model: ScalarModel,
    config: RewardModelStageConfig,
    sft_model: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pairs: Sequence[PreferencePair],
    prompts: Sequence[Prompt],
    max_tokens: int,
    text_tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, float]:
    """Store the normalization in the model's config, then measure accuracy with the scorer that PPO uses.

    tokenizer is that of the SFT model; text_tokenizer that of a reward model that reads text, with a tokenizer of its own.
    """
    pairs = pairs[:MAX_HELDOUT_PAIRS]
    scorer: Scorer = RewardModelScorer(model, microbatch_tokens=config.reward_model.training.microbatch_tokens)
    if text_tokenizer is not None:
        scorer = TextScorer(scorer, text_tokenizer)
    calibration_prompts = prompts[: config.reward_model.num_calibration_samples]
    responses = (
        sample_responses(sft_model, tokenizer, calibration_prompts, config.sampling, model=model, seed=config.seed)
        if calibration_prompts
        else []
    )
    model.mean, model.std = calibrate(scorer, responses)
    lm_config = model.lm.config
    lm_config.reward_mean, lm_config.reward_std = model.mean, model.std
    lm_config.head_name, lm_config.padding_side = HEAD_NAME, "right"
    cut = [cut_to_half(tokenizer, pair, max_tokens=max_tokens) for pair in pairs]
    return {
        "heldout_accuracy": pair_accuracy(scorer, pairs, tokenizer, max_tokens=max_tokens),
        "heldout_accuracy_cut": pair_accuracy(scorer, cut, tokenizer, max_tokens=max_tokens, complete=False),
        "num_heldout_pairs": float(len(pairs)),
        "reward_mean": model.mean,
        "reward_std": model.std,
        "num_calibration_samples": float(len(responses)),
    }


def as_markdown(metrics: Mapping[str, float]) -> str:
    return (
        "# Reward model\n\n"
        f"Accuracy on {metrics['num_heldout_pairs']:.0f} held-out human pairs: **{metrics['heldout_accuracy']:.1%}** "
        f"(whole texts; {metrics['heldout_accuracy_cut']:.1%} with both cut to half).\n\n"
        f"Scores of {metrics['num_calibration_samples']:.0f} responses of the SFT model have mean "
        f"{metrics['reward_mean']:.3f} and standard deviation {metrics['reward_std']:.3f}; PPO normalizes by these.\n"
    )
