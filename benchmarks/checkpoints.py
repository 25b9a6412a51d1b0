"""What a checkpoint costs training: how long a step waits for it, and how long it takes to be written beside training.

    python -m benchmarks.checkpoints            # a model of SmolLM2-135M's shape, all of it trained, AdamW, into a folder

A step is forward, backward and update on 8 rows of 32 tokens.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record import machine
from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.config.model import TrainingConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.engine.torch import TorchEngine
from components.rlhf.storage.store import FolderStore

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where checkpoints go; a temporary folder without it")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    engine = TorchEngine(model, TrainingConfig(schedule="constant"), num_steps=1000)
    tokens = torch.randint(0, SHAPE["vocab_size"], (8, 32))

    def step() -> float:
        started = time.monotonic()
        engine.backward(model(input_ids=tokens, labels=tokens).loss, last=True)
        engine.step()
        return time.monotonic() - started

    times: dict[str, list[float]] = {"alone": [], "stall": [], "beside": [], "written": []}
    for number in range(options.repeats + 1):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            checkpoints = CheckpointManager(FolderStore(Path(folder)), "benchmark", CheckpointConfig())
            measured = _once(step, checkpoints, {"actor": engine})
        if number > 0:  # the first also makes the optimiser's moments and warms up
            for name, values in measured.items():
                times[name] += values
    size = sum(x.nbytes for x in engine.snapshot().values()) / 1e9
    print(f"{size:.2f} GB of weights and moments, {options.repeats} checkpoints; {machine()}.\n")
    print("| | seconds, median (range) |\n|---|---:|")
    print(f"| a step without a checkpoint | {_spread(times['alone'])} |")
    print(f"| what training waits for a checkpoint | {_spread(times['stall'])} |")
    print(f"| a step while one is written | {_spread(times['beside'])} |")
    print(f"| until it is complete, training beside it | {_spread(times['written'])} |")


def _once(step, checkpoints: CheckpointManager, engines) -> dict[str, list[float]]:
    alone = [step() for _ in range(4)]
    started = time.monotonic()
    checkpoints.save(1, engines, {})
    stall = time.monotonic() - started
    beside = []
    while checkpoints.latest is None:
        beside.append(step())
    written = time.monotonic() - started
    return {"alone": alone, "stall": [stall], "beside": beside, "written": [written]}


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
