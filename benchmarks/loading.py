"""Measure the memory of each process while a model is loaded, prepared for training and exported under ZeRO-3.

    python -m benchmarks.loading

Random Llama models in fp32 files, processes on this machine over gloo. Anonymous memory above what the process held before, of the
process with the most; the table is Markdown. --parameters is approximate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.record import describe_machine
from tests.support.loading_ranks import DTYPES, WARM_UP, make_folder

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=300, help="size of the model in millions of parameters")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(
        "| processes | precision | model | shard | largest tensor | loading | loading - shard - tensor | engine | exporting |"
    )
    print("|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        make_folder(models / "small" / "sft", torch.float32, **WARM_UP)
        make_folder(models / "large" / "sft", torch.float32, **shape_of(options.parameters * 1e6))
        for processes in options.processes:
            for dtype in DTYPES:
                runs = [measure(models, Path(folder) / "out", processes, dtype) for _ in range(options.repeats)]
                print(row(processes, dtype, runs), flush=True)
    print(f"\nMiB, median (range) of {options.repeats} runs; {describe_machine()}.")


def shape_of(parameters: float) -> dict[str, int]:
    """Sizes of a model: a third of its parameters in embeddings and head, the rest in layers."""
    hidden, vocabulary = 1024, 48_000
    layers = round((parameters - 2 * vocabulary * hidden) / (4 * hidden**2 + 3 * hidden * 2816))
    return dict(hidden_size=hidden, intermediate_size=2816, num_layers=max(layers, 1), vocab_size=vocabulary)


def measure(models: Path, out: Path, processes: int, dtype: str) -> dict[str, int]:
    """The largest value over the ranks of each number, in bytes."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run(
        [*ranks, "-m", "tests.support.loading_ranks", "model", dtype, str(models), str(out)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(processes)]
    return {key: max(numbers[key] for numbers in found) for key in found[0]}


def row(processes: int, dtype: str, runs: list[dict[str, int]]) -> str:
    first = runs[0]
    over = [run["loading"] - run["shard"] - run["largest"] for run in runs]
    cells = [f"{first[key] / MIB:.0f}" for key in ("model", "shard", "largest")]
    cells += [
        spread([run["loading"] for run in runs]),
        spread(over),
        spread([run["engine"] for run in runs]),
        spread([run["exporting"] for run in runs]),
    ]
    return f"| {processes} | {dtype} | {' | '.join(cells)} |"


def spread(values: list[int]) -> str:
    middle, low, high = (value / MIB for value in (statistics.median(values), min(values), max(values)))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


if __name__ == "__main__":
    main()
