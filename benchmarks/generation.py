"""Measure tokens per CPU second of rollouts with transformers, beside transformers' own generate with the same prompts.

    OMP_NUM_THREADS=1 python -m benchmarks.generation --batch 32 --new 24 256
    OMP_NUM_THREADS=1 python -m benchmarks.generation --batch 16 --context 32 256 1024

With --context it measures one step after that many tokens instead, with a cache that has room to grow and one that copies itself.
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
from transformers.cache_utils import DynamicLayer

from benchmarks.checkpoints import SHAPE
from benchmarks.record import describe_machine
from components.rlhf.config.model import SamplingConfig
from components.rlhf.rollout.decoding import Decoding
from components.rlhf.rollout.hf import sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="number of responses that are generated at once")
    parser.add_argument("--samples", type=int, default=1, help="number of responses to each prompt")
    parser.add_argument("--prompt", type=int, nargs=2, default=(8, 40), help="shortest and longest prompt in tokens")
    parser.add_argument("--new", type=int, nargs="+", default=[24], help="tokens of each response")
    parser.add_argument("--chunks", type=int, default=1, help="number of batches in one call")
    parser.add_argument("--context", type=int, nargs="+", help="measure steps after this many tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=2048)).eval()
    model = model.to(getattr(torch, options.dtype))
    model.generation_config.eos_token_id = None
    if options.context:
        _measure_steps(model, options.batch, options.context, options.repeats)
        return
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


@torch.inference_mode()
def _measure_steps(model: Any, batch: int, contexts: list[int], repeats: int) -> None:
    print(f"{batch} responses, {model.dtype}, {torch.get_num_threads()} threads; {describe_machine()}.\n")
    print(
        "| tokens before | cache with room, CPU ms per step | cache that copies itself | ratio |\n|---:|---:|---:|---:|"
    )
    for context in contexts:
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(repeats):
            for has_room in times:
                decoding = Decoding(model, [list(range(context))] * batch)
                decoding.advance()
                if not has_room:
                    _copy_at_every_token(decoding)
                steps = [_cpu_seconds(_step, decoding, batch) for _ in range(9)]
                times[has_room] += [1000 * seconds for seconds in steps[1:]]
        ratio = statistics.median(times[False]) / statistics.median(times[True])
        print(
            f"| {context} | {_median_and_range(times[True])} | {_median_and_range(times[False])} | {ratio:.2f} |",
            flush=True,
        )


def _step(decoding: Decoding, batch: int) -> None:
    decoding.append(torch.full((batch,), 5), None)
    decoding.advance()


def _copy_at_every_token(decoding: Decoding) -> None:
    """Replace the layers of the cache by those of transformers."""
    layers = decoding.cache["past_key_values"].layers
    for index, layer in enumerate(layers):
        layers[index] = DynamicLayer()
        layers[index].update(layer.keys, layer.values)


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
