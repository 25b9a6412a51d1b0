"""Measure tokens per CPU second of rollouts with transformers, beside transformers' own generate with the same prompts.

    OMP_NUM_THREADS=1 python -m benchmarks.generation --batch 32 --new 24 256 1024

The model has the shape of SmolLM2-135M with random weights, and no response stops early. CPU seconds are those of the process, so
other work on the machine disturbs them less than the time on the clock; the two ways take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.checkpoints import SHAPE
from benchmarks.record import describe_machine
from components.rlhf.config.model import SamplingConfig
from components.rlhf.rollout.hf import sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="number of responses that are generated at once")
    parser.add_argument("--samples", type=int, default=1, help="number of responses to each prompt")
    parser.add_argument("--prompt", type=int, nargs=2, default=(8, 40), help="shortest and longest prompt in tokens")
    parser.add_argument("--new", type=int, nargs="+", default=[24], help="tokens of each response")
    parser.add_argument("--chunks", type=int, default=1, help="number of batches in one call")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=2048)).eval()
    model = model.to(getattr(torch, options.dtype))
    model.generation_config.eos_token_id = None
    total = options.batch * options.chunks
    prompts = _prompts(total, options.samples, options.prompt)
    print(
        f"{total} responses in batches of {options.batch}, {options.samples} per prompt, prompts of {options.prompt[0]} to "
        f"{options.prompt[1]} tokens, {options.dtype}, {torch.get_num_threads()} threads; {describe_machine()}.\n"
    )
    warm_up = SamplingConfig(max_new_tokens=2, batch_size=options.batch)
    for way in (_sample, _generate):
        way(model, prompts, warm_up)
    print("| new tokens | this engine, tokens per CPU second | transformers' generate | ratio |\n|---:|---:|---:|---:|")
    for new in options.new:
        sampling = SamplingConfig(max_new_tokens=new, batch_size=options.batch)
        own, theirs = [], []
        for _ in range(options.repeats):
            own.append(total * new / _cpu_seconds(_sample, model, prompts, sampling))
            theirs.append(total * new / _cpu_seconds(_generate, model, prompts, sampling))
        ratio = statistics.median(own) / statistics.median(theirs)
        print(f"| {new} | {_median_and_range(own)} | {_median_and_range(theirs)} | {ratio:.2f} |", flush=True)


def _prompts(total: int, samples: int, lengths: tuple[int, int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    shortest, longest = lengths
    sizes = torch.randint(shortest, longest + 1, (-(-total // samples),), generator=generator).tolist()
    prompts = [torch.randint(3, SHAPE["vocab_size"], (size,), generator=generator).tolist() for size in sizes]
    return [prompt for prompt in prompts for _ in range(samples)][:total]


def _sample(model: Any, prompts: list[list[int]], sampling: SamplingConfig) -> None:
    sample(model, prompts, sampling, range(len(prompts)), stop_ids=())


@torch.inference_mode()
def _generate(model: Any, prompts: list[list[int]], sampling: SamplingConfig) -> None:
    for start in range(0, len(prompts), sampling.batch_size):
        batch = prompts[start : start + sampling.batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=0,
        )


def _cpu_seconds(run: Callable[..., Any], *arguments: Any) -> float:
    started = time.process_time()
    run(*arguments)
    return time.process_time() - started


def _median_and_range(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
