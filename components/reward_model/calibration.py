"""The mean and standard deviation of a reward model's scores on samples of the SFT model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.data.records import Completion, PreferencePair, Prompt, is_chat
from components.rlhf.data.tokenizer import decode_response, encode_text
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.engine.protocol import Group
from components.rlhf.engine.shares import over_ranks
from components.rlhf.maths.seeds import derive_seed
from components.rlhf.models.precision import compute_dtype
from components.rlhf.rewards.protocol import Scorer
from components.rlhf.rollout.factory import create_rollout_engine
from components.rlhf.runtime.memory import release_models
from components.rlhf.text.errors import InputError


def sample_responses(
    config: RewardModelStageConfig, sft_model: Path, prompts: Sequence[Prompt], group: Group = SINGLE_PROCESS
) -> list[Completion]:
    """One response of the SFT model to each of the first prompts, sampled as PPO will sample: all of them, on every rank.

    Each rank samples a share. The engine is freed afterwards. A stage that resumes samples the same responses again.
    """
    prompts = prompts[: config.reward_model.num_calibration_samples]
    if not prompts:
        return []
    rows = [(prompt, derive_seed("calibration", config.seed, row)) for row, prompt in enumerate(prompts)]
    dtype = compute_dtype(config.model.precision)
    group.watchdog("reward model, responses of the SFT model")
    engine = create_rollout_engine(sft_model, config.rollout, config.sampling, prompts, dtype=dtype)

    def generate(own: list[tuple[Prompt, int]]) -> list[Completion]:
        return engine.generate([prompt for prompt, _ in own], config.sampling, [seed for _, seed in own])

    try:
        return over_ranks(group, rows, generate)
    finally:
        engine.close()
        release_models()


def calibrate(scorer: Scorer, responses: Sequence[Completion]) -> tuple[float, float]:
    """Mean and standard deviation of the raw scores; 0 and 1 for fewer than two responses.

    Samples are used, not the human texts that the model was trained on, so that PPO's first scores have mean 0 and standard
    deviation 1, which the score clip and the KL coefficient rely on.
    """
    if len(responses) < 2:
        return 0.0, 1.0
    scores = scorer.score(responses)
    std = float(scores.std())
    if not std > 1e-6:
        raise InputError(
            "The reward model gives every response the same score; train it longer or check the preferences."
        )
    return float(scores.mean()), std


def cut_to_half(tokenizer: PreTrainedTokenizerBase, pair: PreferencePair, *, max_tokens: int) -> PreferencePair:
    """Both texts cut to half the tokens of the shorter one, to measure the accuracy on texts without EOS."""
    texts = [
        encode_text(tokenizer, pair.prompt, text, max_tokens=max_tokens, is_chat=is_chat(pair))
        for text in (pair.chosen, pair.rejected)
    ]
    length = max(min(len(text.response_ids) for text in texts) // 2, 1)
    chosen, rejected = (decode_response(tokenizer, text.prompt_ids, text.response_ids[:length]) for text in texts)
    return replace(pair, chosen=chosen, rejected=rejected)
