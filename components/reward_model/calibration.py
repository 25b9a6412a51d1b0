"""The mean and standard deviation of a reward model's scores on samples of the SFT model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from components.rlhf.config.model import SamplingConfig
from components.rlhf.data.records import Completion, PreferencePair, Prompt, is_chat
from components.rlhf.data.tokenizer import decode_response, encode_text
from components.rlhf.maths.seeds import derive_seed
from components.rlhf.models.loading import load_causal_lm, load_stop_ids
from components.rlhf.models.precision import default_device
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.rewards.protocol import Scorer
from components.rlhf.rollout.hf import HfRolloutEngine
from components.rlhf.text.errors import InputError


def sample_responses(
    sft_model: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    model: ScalarModel,
    seed: int,
) -> list[Completion]:
    """One response of the SFT model to each prompt, sampled as PPO will sample."""
    lm = load_causal_lm(sft_model, num_frozen_layers=0, dtype=model.dtype, trainable=False).to(default_device())
    engine = HfRolloutEngine(lm, tokenizer, stop_ids=load_stop_ids(sft_model))
    return engine.generate(prompts, sampling, [derive_seed("calibration", seed, row) for row in range(len(prompts))])


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
