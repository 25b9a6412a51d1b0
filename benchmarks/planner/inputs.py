"""Inputs of stage programs for measurements of memory: random models of several sizes, and texts of a fixed length."""

from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.planner.cases import MAX_TOKENS, PROMPT_TOKENS, config_of
from components.rlhf.artifacts.manifest import write_manifest
from components.rlhf.data.datasets import save_dataset
from components.rlhf.data.records import Demonstration, PreferencePair, Prompt, Turn
from components.rlhf.models.loading import load_scalar_lm
from components.rlhf.models.saving import save_model
from tests.support.tiny_model import make_tiny_tokenizer


def make_inputs(folder: Path, size: str) -> None:
    """base_model, sft_model and reward_model of this size in bf16, demonstrations, preferences and prompts, each as an artifact."""
    folder.mkdir(parents=True)
    tokenizer = make_tiny_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(**config_of(size), max_position_embeddings=2048, **ids)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    for kind in ("base_model", "sft_model"):
        model.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
        write_manifest(folder / kind, kind=kind)
    del model
    scalar = load_scalar_lm(folder / "sft_model", num_frozen_layers=0, dtype=torch.bfloat16, seed=0)
    scalar.config.reward_mean, scalar.config.reward_std = 0.0, 1.0
    save_model(scalar, tokenizer, folder / "reward_model", dtype=torch.bfloat16)
    write_manifest(folder / "reward_model", kind="reward_model")
    _write_data(folder)


def _write_data(folder: Path) -> None:
    prompt = "p" * PROMPT_TOKENS
    answers = ["ab" * ((MAX_TOKENS - PROMPT_TOKENS) // 2 - 1), "cd" * ((MAX_TOKENS - PROMPT_TOKENS) // 2 - 1)]
    demonstrations = [
        Demonstration(turns=(Turn(context=prompt + "x" * (i % 3), answer=answers[i % 2]),)) for i in range(64)
    ]
    pairs = [PreferencePair(prompt=prompt, chosen=answers[i % 2], rejected=answers[1 - i % 2]) for i in range(64)]
    prompts = [Prompt(prompt=prompt[i % 8 :], id=f"prompt-{i}") for i in range(64)]
    for kind, splits in (
        ("demonstrations", {"train": demonstrations, "heldout": demonstrations[:4]}),
        ("preferences", {"train": pairs, "heldout": pairs[:4]}),
        ("prompts", {"train": prompts, "validation": prompts[:8], "heldout": prompts[:8]}),
    ):
        (folder / kind).mkdir()
        save_dataset(folder / kind, splits, max_tokens=MAX_TOKENS, counts={})
        write_manifest(folder / kind, kind=kind)
