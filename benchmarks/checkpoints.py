"""Measure how long training waits for a checkpoint, and how long writing it in the background takes.

    python -m benchmarks.checkpoints

The model has the shape of SmolLM2-135M; all layers are trained with AdamW, and checkpoints go to a folder. A step is forward,
backward and update on 8 sequences of 32 tokens.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record import describe_machine
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
    parser.add_argument("--repeats", type=int, default=5, help="number of checkpoints to measure")
    parser.add_argument("--folder", type=Path, help="folder for the checkpoints; default a temporary folder")
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

    times: dict[str, list[float]] = {"alone": [], "stall": [], "during": [], "written": []}
    for number in range(options.repeats + 1):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            checkpoints = CheckpointManager(FolderStore(Path(folder)), "benchmark", CheckpointConfig())
            measured = _measure(step, checkpoints, {"actor": engine})
        if number > 0:  # the first one also allocates the optimizer state and warms up
            for name, values in measured.items():
                times[name] += values
    size = sum(x.nbytes for x in engine.snapshot().values()) / 1e9
    print(f"{size:.2f} GB of weights and optimizer state, {options.repeats} checkpoints; {describe_machine()}.\n")
    print("| | seconds, median (range) |\n|---|---:|")
    print(f"| a step without a checkpoint | {_median_and_range(times['alone'])} |")
    print(f"| training blocked by a checkpoint | {_median_and_range(times['stall'])} |")
    print(f"| a step while a checkpoint is written | {_median_and_range(times['during'])} |")
    print(f"| until the checkpoint is complete, with training in parallel | {_median_and_range(times['written'])} |")


def _measure(step, checkpoints: CheckpointManager, engines) -> dict[str, list[float]]:
    alone = [step() for _ in range(4)]
    started = time.monotonic()
    checkpoints.save(1, engines, {})
    stall = time.monotonic() - started
    during = []
    while checkpoints.latest is None:
        during.append(step())
    written = time.monotonic() - started
    return {"alone": alone, "stall": [stall], "during": during, "written": [written]}


def _median_and_range(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
