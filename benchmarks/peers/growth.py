"""How the time and memory of scores and updates grow with the work, on a small random model, each point in its own process.

`python -m benchmarks.peers.growth JOB` is the measured process.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.flops import Shape, Work, ppo_flops
from benchmarks.peers.processes import Arm

SYSTEM = "ours"
BASE = {"response": 128, "batch": 8, "vocabulary": 8192, "samples": 8}
PROMPT, MICROBATCH_TOKENS = 16, 1152  # the rows of the base point in one pass
# batch is the size of a minibatch, with as many samples; samples are the responses of an iteration, in minibatches of 8.
AXES: dict[str, list[int]] = {
    "response": [32, 64, 128, 256, 512, 1024],
    "batch": [4, 8, 16, 32, 64],
    "vocabulary": [1024, 8192, 32768, 131072],
    "samples": [8, 16, 32, 64],
}
LABELS = {
    "response": "tokens of a response",
    "batch": "responses of a minibatch",
    "vocabulary": "entries of the vocabulary",
    "samples": "responses of an iteration",
}


def shape_of(vocabulary: int) -> Shape:
    return Shape(hidden=256, intermediate=768, layers=4, key_value=128, vocabulary=vocabulary)


def arms(iterations: int) -> list[Arm]:
    found = []
    for axis, values in AXES.items():
        for value in values:
            point = BASE | {axis: value}
            if axis == "batch":
                point["samples"] = value
            lengths = [[PROMPT, point["response"]]] * point["samples"]
            flop = ppo_flops(shape_of(point["vocabulary"]), lengths, Work(generates=False))
            more = {"axis": axis, "value": value, "gflop": round(flop / 1e9, 3)}
            job: dict[str, Any] = point | {"iterations": iterations}
            found.append(Arm(system=SYSTEM, setting=f"{value} {LABELS[axis]}", module="growth", job=job, more=more))
    return found


def make_model(folder: Path, vocabulary: int) -> tuple[Path, Path]:
    """A random Llama and a reward model on its layers, in folders."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from components.rlhf.models.loading import load_scalar_lm
    from components.rlhf.models.saving import save_model
    from tests.support.tiny_model import make_tiny_tokenizer

    shape, tokenizer = shape_of(vocabulary), make_tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model, reward_model = folder / "model", folder / "reward_model"
    LlamaForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    scalar = load_scalar_lm(model, num_frozen_layers=0, dtype=torch.float32, seed=0)
    save_model(scalar, tokenizer, reward_model, dtype=torch.float32)
    return model, reward_model


def main() -> None:
    import random
    from importlib.metadata import version

    from transformers import logging

    from benchmarks.peers.measure import Marks, print_result, read_job
    from benchmarks.peers.ours_ppo import measure_given

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    job, marks, generator = read_job(), Marks(), random.Random(0)
    rows = [
        (generator.choices(range(1, 1000), k=PROMPT), generator.choices(range(1, 1000), k=job["response"]))
        for _ in range(job["samples"])
    ]
    settings = {
        "iterations": job["iterations"],
        "microbatch_tokens": max(MICROBATCH_TOKENS, PROMPT + job["response"]),
        "minibatch": job["batch"],
    }
    with tempfile.TemporaryDirectory() as folder:
        model, reward_model = make_model(Path(folder), job["vocabulary"])
        samples, tokens = measure_given(settings, rows, marks, model=model, reward_model=reward_model)
    found = f"torch {version('torch')}, transformers {version('transformers')}"
    print_result(marks, version=found, samples=samples, tokens=tokens)


if __name__ == "__main__":
    sys.exit(main())
