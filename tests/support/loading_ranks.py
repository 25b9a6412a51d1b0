"""Memory of one rank while models are loaded and exported under ZeRO-3: `torchrun -m tests.support.loading_ranks KIND DTYPE MODELS OUT`.

KIND is "model" (a causal language model, its engine, and its export) or "ppo" (the four models of PPO). Each rank writes OUT/RANK.json:
bytes above what the process held before, with the sizes that bound them. KIND "steps" compares training with models that are loaded
whole; then MODELS is one model.
"""

import json
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from components.ppo.models import load_models
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.engine.factory import create_engine, trained_dtype, weight_shards
from components.rlhf.engine.group import join_process_group
from components.rlhf.engine.protocol import Group
from components.rlhf.models.actor import Actor
from components.rlhf.models.loading import load_causal_lm, load_scalar_lm
from components.rlhf.models.saving import save_model
from tests.support.anonymous_memory import Peak
from tests.support.engine_cases import BATCHES, actor_of, language_steps, training_of, whole_weights
from tests.support.ppo_runs import config_of
from tests.support.tiny_model import make_tiny_tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WARM_UP = dict(hidden_size=64, intermediate_size=64, num_layers=1, vocab_size=512)


def make_folder(
    folder: Path, dtype: torch.dtype, *, hidden_size: int, intermediate_size: int, num_layers: int, vocab_size: int
) -> Path:
    """A random Llama model with an untied head, and a tokenizer."""
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        vocab_size=vocab_size,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    from_config: Any = AutoModelForCausalLM.from_config
    from_config(config, dtype=dtype).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def make_reward_model(sft: Path, folder: Path, dtype: torch.dtype) -> Path:
    lm = load_scalar_lm(sft, num_frozen_layers=0, dtype=dtype, trainable=False, seed=1)
    lm.config.reward_mean, lm.config.reward_std = 0.0, 1.0
    save_model(lm, load_tokenizer(sft), folder, dtype=dtype)
    return folder


def sizes(modules: Iterable[nn.Module]) -> dict[str, int]:
    """Bytes of this rank's shards, of the largest whole weight, and of all weights."""
    parameters: list[Any] = [p for module in modules for p in module.parameters()]
    whole = [p.ds_numel * p.element_size() for p in parameters]
    return {
        "shard": sum(p.ds_tensor.nbytes for p in parameters),
        "largest": max(whole),
        "model": sum(whole),
    }


def measure_model(sft: Path, out: Path, dtype: torch.dtype, group: Group) -> dict[str, int]:
    training = training_of("deepspeed", zero_stage=3, num_processes=group.world_size)
    with Peak.watched() as loading:
        lm = load_causal_lm(
            sft,
            num_frozen_layers=0,
            dtype=dtype,
            trained_dtype=trained_dtype(training, dtype),
            shard=weight_shards(training, group=group, dtype=dtype),
        )
    found = sizes([lm]) | {"loading": loading.above}
    with Peak.watched() as starting:
        engine = create_engine(lm, training, num_steps=1, group=group, dtype=dtype)
    with Peak.watched() as exporting:
        weights = engine.full_weights()
        if group.rank == 0:
            save_model(lm, load_tokenizer(sft), out / "export", dtype=dtype, weights=weights)
        else:
            deque(weights, maxlen=0)
    return found | {"engine": starting.above, "exporting": exporting.above}


def measure_ppo(sft: Path, reward: Path, dtype: torch.dtype, group: Group) -> dict[str, int]:
    config = config_of(
        rollout={"engine": "vllm"},
        training={"engine": "deepspeed", "zero_stage": 3, "num_processes": group.world_size},
    )
    without_rollouts = mock.patch("components.ppo.models.create_rollout_engine")  # an engine has a copy of its own
    with without_rollouts, Peak.watched() as loading:
        models, _ = load_models(config, sft, reward, dtype=dtype, prompts=[], group=group)
    modules = [models.actor, models.reference, models.critic, models.reward_model]
    return sizes(modules) | {"loading": loading.above}


def compare_steps(model: Path, group: Group) -> dict[str, bool]:
    """Whether training is bitwise the same if models are first loaded whole in fp32, and cast and sharded by DeepSpeed."""
    same = {}
    for stage in (2, 3):
        for dtype in DTYPES.values():
            training = training_of("deepspeed", zero_stage=stage, num_processes=group.world_size)
            whole = Actor(load_causal_lm(model, num_frozen_layers=0, dtype=dtype), num_frozen_layers=0, dtype=dtype)
            found = []
            for actor in (whole, actor_of(model, training, dtype, group)):
                engine = create_engine(actor, training, num_steps=4, group=group, dtype=dtype)
                found.append((list(language_steps(actor, engine, BATCHES, group)), whole_weights(engine)))
            (numbers, weights), (others, theirs) = found
            equal = numbers == others and all(torch.equal(weights[name], theirs[name]) for name in weights)
            same[f"zero{stage} {dtype}"] = equal and weights.keys() == theirs.keys()
    return same


def main(kind: str, dtype: torch.dtype, models: Path, out: Path) -> None:
    with join_process_group(timeout_minutes=10) as group:
        out.mkdir(parents=True, exist_ok=True)
        if kind == "steps":
            (out / f"{group.rank}.json").write_text(json.dumps(compare_steps(models, group)))
            return
        for size in ("small", "large"):  # the first imports and allocates what does not depend on the model
            sft, reward = models / size / "sft", models / size / "reward"
            if kind == "ppo":
                found = measure_ppo(sft, reward, dtype, group)
            else:
                found = measure_model(sft, out / size, dtype, group)
        (out / f"{group.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], DTYPES[sys.argv[2]], Path(sys.argv[3]), Path(sys.argv[4]))
