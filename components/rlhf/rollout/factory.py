"""Creating the rollout engine that a config names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from components.rlhf.config.model import SamplingConfig
from components.rlhf.config.rollout import EngineConfig
from components.rlhf.data.lengths import longest_prompt
from components.rlhf.data.records import Prompt
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.models.loading import load_causal_lm, load_stop_ids
from components.rlhf.models.precision import default_device
from components.rlhf.rollout.hf import HfRolloutEngine
from components.rlhf.rollout.probe import PROBE_TOKENS
from components.rlhf.rollout.protocol import RolloutEngine
from components.rlhf.rollout.stopping import require_reachable_stops


def create_rollout_engine(
    folder: Path,
    rollout: EngineConfig,
    sampling: SamplingConfig,
    prompts: Sequence[Prompt],
    *,
    dtype: torch.dtype,
    lm: Any = None,
    lora_rank: int = 0,
    adapted_modules: Sequence[str] = (),
) -> RolloutEngine:
    """The engine for these prompts with the model of a folder, or, for transformers, with lm if it is given.

    vLLM is sized for the longest prompt and its response, and for adapters of rank lora_rank on adapted_modules, which the trainer has.
    With several processes every rank calls this with the same arguments.
    """
    tokenizer, stop_ids = load_tokenizer(folder), load_stop_ids(folder)
    require_reachable_stops(sampling, tokenizer)
    if rollout.engine == "hf":
        if lm is None:
            lm = load_causal_lm(folder, num_frozen_layers=0, dtype=dtype, trainable=False, device=default_device())
        return HfRolloutEngine(lm, tokenizer, stop_ids=stop_ids)
    from components.rlhf.rollout.vllm import VllmRolloutEngine

    return VllmRolloutEngine(
        folder,
        rollout.vllm,
        stop_ids=stop_ids,
        dtype=dtype,
        max_model_len=max(longest_prompt(prompts, tokenizer), PROBE_TOKENS) + sampling.max_new_tokens,
        num_sequences=sampling.batch_size,
        lora_rank=lora_rank,
        adapted_modules=adapted_modules,
    )
