"""Measure training, weight sync and a colocated vLLM on one GPU: `python -m benchmarks.gpu`.

The model is a randomly initialized Llama with half a billion parameters, so nothing is downloaded. The tables are printed with
the date, the device and the package versions. Without a CUDA device nothing is measured.
"""

import datetime
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from components.rlhf.config.model import SamplingConfig, TrainingConfig
from components.rlhf.config.rollout import VllmConfig
from components.rlhf.data.batching import TokenBatch, collate
from components.rlhf.data.records import Prompt
from components.rlhf.engine.factory import create_engine
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.maths.losses import aggregate
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.layers import enable_gradient_checkpointing
from components.rlhf.models.loading import load_causal_lm
from tests.support.tiny_model import make_tiny_tokenizer

GIB = 2**30
SEQUENCES, LENGTH = 8, 1024


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device found; nothing was measured")
        return
    print(f"{datetime.date.today()}, {torch.cuda.get_device_name()}, {versions()}\n")
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        training_table(model)
        sync_table(model)


def versions() -> str:
    found = []
    for package in ("torch", "transformers", "deepspeed", "vllm"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def make_model(folder: Path) -> Path:
    tokenizer = make_tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1280,
        intermediate_size=3584,
        num_hidden_layers=24,
        num_attention_heads=20,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 200, (SEQUENCES, LENGTH), generator=generator).tolist()
    return collate([row[:16] for row in ids], [row[16:] for row in ids]).to(torch.device("cuda"))


def training_table(model: Path) -> None:
    """Print memory and speed of training steps.

    With AdamW, bf16 with fp32 master weights takes about 16 bytes per parameter: gradients 4, master weights 4, moments 8,
    and the bf16 copy of the weights where there is one.
    """
    print(f"## Training steps on {SEQUENCES} x {LENGTH} tokens, bf16\n")
    print(
        "| engine | gradient checkpointing | seconds per step | peak GiB | bytes per parameter between steps | loss after 5 steps |"
    )
    print("|---|---|---:|---:|---:|---:|")
    for changes in (
        {"engine": "torch"},
        {"engine": "deepspeed", "zero_stage": 2},
        {"engine": "deepspeed", "zero_stage": 3},
    ):
        for checkpointing in (False, True):
            training = TrainingConfig(gradient_checkpointing=checkpointing, learning_rate=1e-4, **changes)
            print(training_row(model, training), flush=True)
    print()


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Measurements of a few optimizer steps on one batch."""

    losses: list[float]
    seconds: list[float]
    peak_bytes: int  # in addition to what was allocated before
    bytes_between_steps: int
    num_parameters: int


def train(model: Path, training: TrainingConfig) -> Steps:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lm = load_causal_lm(model, num_frozen_layers=0, dtype=torch.bfloat16)
    if training.gradient_checkpointing:
        enable_gradient_checkpointing(lm)
    actor = Actor(lm.to("cuda"), num_frozen_layers=0, dtype=torch.bfloat16)
    num_parameters = sum(parameter.numel() for parameter in actor.parameters())
    engine = create_engine(actor, training, num_steps=10, group=SINGLE_PROCESS, dtype=torch.bfloat16)
    batch = make_batch()
    losses, seconds = [], []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.monotonic()
        logprobs, _ = actor(batch, SamplingDistribution())
        loss = aggregate(-logprobs, batch.response_mask)
        engine.backward(loss, last=True)
        engine.step()
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
        losses.append(loss.item())
    return Steps(
        losses=losses,
        seconds=seconds,
        peak_bytes=torch.cuda.max_memory_allocated() - before,
        bytes_between_steps=torch.cuda.memory_allocated() - before,
        num_parameters=num_parameters,
    )


def training_row(model: Path, training: TrainingConfig) -> str:
    steps = train(model, training)
    name = training.engine if training.engine == "torch" else f"deepspeed, ZeRO-{training.zero_stage}"
    return (
        f"| {name} | {'yes' if training.gradient_checkpointing else 'no'} | {statistics.median(steps.seconds):.3f} "
        f"| {steps.peak_bytes / GIB:.2f} | {steps.bytes_between_steps / steps.num_parameters:.1f} | {steps.losses[-1]:.4f} |"
    )


def sync_table(model: Path) -> None:
    """Print the throughput of a colocated vLLM and of its weight sync, and the memory that it frees while asleep."""
    from components.rlhf.rollout.vllm import VllmRolloutEngine

    lm = load_causal_lm(model, num_frozen_layers=0, dtype=torch.bfloat16, trainable=False).to("cuda")
    size = sum(parameter.numel() * parameter.element_size() for parameter in lm.parameters())
    free_before = torch.cuda.mem_get_info()[0]
    engine = VllmRolloutEngine(
        model, VllmConfig(), stop_ids=(0,), dtype=torch.bfloat16, max_model_len=512, num_sequences=256
    )
    free_awake = torch.cuda.mem_get_info()[0]
    sampling = SamplingConfig(max_new_tokens=128, min_new_tokens=128, batch_size=256)
    prompts = [Prompt(prompt=f"prompt number {number} is") for number in range(256)]
    started = time.monotonic()
    completions = engine.generate(prompts, sampling, list(range(len(prompts))))
    seconds = time.monotonic() - started
    free_asleep = torch.cuda.mem_get_info()[0]
    syncs = [timed_sync(engine, lm) for _ in range(5)]
    print("## Colocated vLLM\n")
    print("| measurement | value |\n|---|---:|")
    print(
        f"| generated tokens per second, {len(prompts)} prompts | {sum(len(c.response_ids) for c in completions) / seconds:.0f} |"
    )
    print(f"| GiB allocated awake | {(free_before - free_awake) / GIB:.2f} |")
    print(f"| GiB allocated asleep | {(free_before - free_asleep) / GIB:.2f} |")
    print(f"| first sync of {size / GIB:.2f} GiB, including the wake-up of the weights, seconds | {syncs[0]:.3f} |")
    print(f"| sync while awake, median of 4, GiB per second | {size / GIB / statistics.median(syncs[1:]):.1f} |")
    engine.close()


def timed_sync(engine: Any, lm: Any) -> float:
    def weights() -> Iterator[tuple[str, Tensor]]:
        yield from ((name, parameter.detach()) for name, parameter in lm.named_parameters())

    torch.cuda.synchronize()
    started = time.monotonic()
    engine.sync(weights())
    torch.cuda.synchronize()
    return time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
