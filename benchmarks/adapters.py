"""Measure what LoRA and QLoRA cost: a weight sync to vLLM with merged weights and with adapters alone, memory, a training step, and
the KL divergence that 4 bits add.

    OMP_NUM_THREADS=1 python -m benchmarks.adapters              # random weights in the shape of SmolLM2-135M
    OMP_NUM_THREADS=1 python -m benchmarks.adapters --model DIR  # the KL of a real model too (a folder with its tokenizer)
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.checkpoints import SHAPE
from benchmarks.record import describe_machine
from components.rlhf.config.model import LoraConfig
from components.rlhf.config.rollout import VllmConfig
from components.rlhf.data.batching import collate
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.loading import load_causal_lm, trainable_parameters
from components.rlhf.models.lora import adapted_modules, add_adapters
from components.rlhf.rollout.probe import SyncCheck, probe_ids
from components.rlhf.rollout.vllm import VllmRolloutEngine
from tests.support.tiny_model import make_tiny_tokenizer

TEXTS = (
    "The film begins slowly, but its second half is one of the best that I have seen this year.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there.",
    "She opened the letter, read it twice, and put it back on the table without saying a word.",
)
FP32 = torch.float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder; default random weights")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only-sync", action="store_true", help="only the weight sync")
    options = parser.parse_args()
    print(f"rank {options.rank}, fp32, {torch.get_num_threads()} threads; {describe_machine()}.\n")
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or random_model(Path(folder) / "model")
        if options.model and not options.only_sync:
            print(f"KL(4 bits || {model.name}): {kl_of_quantizing(model):.4f} nats per token\n")
        if not options.only_sync:
            print("| base weights | MiB below the adapters | load (s) | forward and backward of 512 tokens (s) |")
            print("|---|---:|---:|---:|")
        for quantization in () if options.only_sync else (None, "nf4"):
            print(training_row(model, options.rank, quantization, options.repeats))
        print("\n| weight sync | MiB | seconds, median (range) |\n|---|---:|---:|")
        for merged in (True, False):
            print(sync_row(model, options.rank, merged, options.repeats))


def random_model(folder: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=0, pad_token_id=0)).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def actor_of(model: Path, rank: int, quantization: Any) -> Actor:
    lm = load_causal_lm(model, num_frozen_layers=0, dtype=FP32, trainable=False, quantization=quantization)
    add_adapters(lm, LoraConfig(rank=rank, quantization=quantization), num_frozen_layers=0, seed=0)
    return Actor(lm, num_frozen_layers=0, dtype=FP32)


@torch.no_grad()
def kl_of_quantizing(model: Path) -> float:
    """Mean KL(quantized || original) of the next token over the tokens of TEXTS, in nats."""
    tokenizer, pieces = load_tokenizer(model), []
    lms = [
        load_causal_lm(model, num_frozen_layers=0, dtype=FP32, trainable=False, quantization=quantization)
        for quantization in ("nf4", None)
    ]
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        quantized, original = (torch.log_softmax(lm(input_ids=ids).logits[0], dim=-1) for lm in lms)
        pieces.append((quantized.exp() * (quantized - original)).sum(-1))
    return float(torch.cat(pieces).mean())


def training_row(model: Path, rank: int, quantization: Any, repeats: int) -> str:
    started = time.monotonic()
    actor = actor_of(model, rank, quantization)
    load = time.monotonic() - started
    size = sum(p.nbytes for name, p in actor.named_parameters() if ".lora_" not in name)
    batch = collate([list(range(10, 42))] * 8, [list(range(50, 82))] * 8)

    def step() -> None:
        actor(batch, SamplingDistribution())[0].sum().backward()

    name = "fp32" if quantization is None else "4 bits (embeddings and norms fp32)"
    return f"| {name} | {size / 2**20:.0f} | {load:.1f} | {spread(timed(step, repeats))} |"


def sync_row(model: Path, rank: int, merged: bool, repeats: int) -> str:
    actor, check = actor_of(model, rank, None), SyncCheck(FP32)
    engine = VllmRolloutEngine(
        model, VllmConfig(kv_cache_gib=0.2), stop_ids=(0,), dtype=FP32, max_model_len=128, num_sequences=8,
        lora_rank=rank, adapted_modules=() if merged else adapted_modules(actor.lm),
    )  # fmt: skip
    assert bool(engine.merges_because) == merged

    def named() -> Iterator[tuple[str, Tensor]]:
        return ((name, p.detach()) for name, p in actor.named_parameters())

    def stream() -> Iterator[tuple[str, Tensor]]:
        return actor.export_weights(named()) if merged else actor.export_adapters(named(), with_base=False)

    def sync() -> None:
        with torch.no_grad():
            for parameter in trainable_parameters(actor):
                parameter.add_(1e-3 * torch.randn_like(parameter))
        engine.sync(check.observe(stream()))

    size = sum(weight.nbytes for _, weight in stream())
    seconds = timed(sync, repeats)
    ids = probe_ids(engine.tokenizer)
    with torch.no_grad():
        expected, _ = actor(collate([ids[:1]], [ids[1:]]), SamplingDistribution())
    check.check(engine.weight_samples(), engine.prompt_logprobs(ids), expected[0], version=engine.version)
    engine.close()
    return f"| {'all weights, merged' if merged else 'adapters only'} | {size / 2**20:.1f} | {spread(seconds)} |"


def timed(function: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of each repetition, after one that is not counted."""
    function()
    seconds = []
    for _ in range(repeats):
        started = time.monotonic()
        function()
        seconds.append(time.monotonic() - started)
    return seconds


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
