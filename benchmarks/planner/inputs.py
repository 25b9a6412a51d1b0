"""Inputs of stage programs for measurements of memory: random models of several sizes, and texts of a fixed length."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.planner.cases import JUDGE, MAX_TOKENS, PROMPT_TOKENS, config_of
from components.rlhf.artifacts.manifest import write_manifest
from components.rlhf.data.datasets import save_dataset
from components.rlhf.data.records import Demonstration, PreferencePair, Prompt, Turn, ValidationSample
from components.rlhf.models.loading import load_scalar_lm
from components.rlhf.models.saving import save_model
from components.rlhf.rewards.agreement import Agreement
from components.rlhf.rewards.judges import JudgeEntry, save_judges
from tests.support.tiny_model import make_tiny_tokenizer

AGREEMENT = Agreement(
    accuracy=0.8, low=0.7, high=0.9, num_pairs=4, num_asked=4, num_independent=4, longer_wins=0.5, consistency=1.0
)


def make_inputs(folder: Path, size: str) -> None:
    """base_model, sft_model, policy and reward_model of this size in bf16, a reward model as judge, and texts, each as an artifact."""
    folder.mkdir(parents=True)
    tokenizer = make_tiny_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(**config_of(size), max_position_embeddings=2048, **ids)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    for name, kind in (("base_model", "base_model"), ("sft_model", "sft_model"), ("policy", "policy_model")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if name == "policy":
            _write_validation(folder / name)
        write_manifest(folder / name, kind=kind)
    del model
    scalar = load_scalar_lm(folder / "sft_model", num_frozen_layers=0, dtype=torch.bfloat16, seed=0)
    scalar.config.reward_mean, scalar.config.reward_std = 0.0, 1.0
    save_model(scalar, tokenizer, folder / "reward_model", dtype=torch.bfloat16)
    write_manifest(folder / "reward_model", kind="reward_model")
    shutil.copytree(folder / "reward_model", folder / "judge" / JUDGE.title)
    (folder / "judge" / JUDGE.title / "manifest.json").unlink()
    save_judges(folder / "judge", [JudgeEntry(settings=JUDGE, agreement=AGREEMENT)])
    write_manifest(folder / "judge", kind="judge")
    _write_data(folder)


def _write_validation(folder: Path) -> None:
    prompt = Prompt(prompt="p" * PROMPT_TOKENS, id="prompt-0")
    sample = ValidationSample(
        iteration=0, num_rollouts=0, prompt=prompt, prompt_ids=[5] * PROMPT_TOKENS, response_ids=[6] * 8, response="a" * 8,
        truncated=True, score=0.0, kl=0.0,
    )  # fmt: skip
    (folder / "validation.jsonl").write_text(json.dumps(asdict(sample)) + "\n", encoding="utf-8")


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
