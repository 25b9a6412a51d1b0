"""The machine's own rate of matrix products in the shapes of the model, and the share of it that an iteration reaches.

`python -m benchmarks.peers.ceiling JOB` is the measured process.
"""

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.flops import Shape
from benchmarks.peers.inputs import MODEL
from benchmarks.peers.processes import Arm
from benchmarks.peers.rows import Row, find_row

SYSTEM = "matrix products"
LAYERS, HEAD = "of the layers, {}", "of the head, {}"
PRECISIONS = ("fp32", "bf16")
ROWS = 1024  # tokens of one pass: 32 x (8 + 24)
REPETITIONS = {"layers": 20, "head": 4}  # in one interval


def products(shape: Shape, part: str) -> list[tuple[int, int]]:
    """(inputs, outputs) of each matrix product of a token."""
    if part == "head":
        return [(shape.hidden, shape.vocabulary)]
    square, narrow = (shape.hidden, shape.hidden), (shape.hidden, shape.key_value)
    wide, back = (shape.hidden, shape.intermediate), (shape.intermediate, shape.hidden)
    return [square, narrow, narrow, square, wide, wide, back]


def arms(iterations: int) -> list[Arm]:
    shape = Shape.of(MODEL)
    found = []
    for precision in PRECISIONS:
        for part, setting in (("layers", LAYERS), ("head", HEAD)):
            flop = 2.0 * ROWS * sum(rows * columns for rows, columns in products(shape, part)) * REPETITIONS[part]
            job: dict[str, Any] = {"part": part, "precision": precision, "iterations": iterations}
            more = {"gflop": round(flop / 1e9, 2)}
            found.append(Arm(system=SYSTEM, setting=setting.format(precision), module="ceiling", job=job, more=more))
    return found


def rate(row: Row) -> float:
    """GFLOP per CPU second."""
    return float(row["gflop"]) / float(row["cpu_seconds"])


def share_of_ceiling(row: Row, ceiling: Sequence[Row], precision: str) -> float | None:
    """GFLOP per CPU second of a row as a fraction of the layers' rate; None if one of them was not measured."""
    best = find_row(ceiling, SYSTEM, LAYERS.format(precision))
    return None if best is None or "gflop" not in row else rate(row) / rate(best)


def main() -> None:
    from importlib.metadata import version

    import torch

    from benchmarks.peers.measure import Marks, print_result, read_job

    job, marks = read_job(), Marks()
    dtype = torch.float32 if job["precision"] == "fp32" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (
            torch.randn(ROWS, inputs, generator=generator).to(dtype),
            torch.randn(outputs, inputs, generator=generator).to(dtype),
        )
        for inputs, outputs in products(Shape.of(MODEL), job["part"])
    ]
    with torch.inference_mode():
        for _ in range(2 + job["iterations"]):
            marks.mark()
            for _ in range(REPETITIONS[job["part"]]):
                for activations, weights in pairs:
                    torch.nn.functional.linear(activations, weights)
    marks.drop_first()
    print_result(marks, version=f"torch {version('torch')}", samples=1, tokens=ROWS * REPETITIONS[job["part"]])


if __name__ == "__main__":
    sys.exit(main())
