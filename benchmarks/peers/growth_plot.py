"""The plot of the benchmark growth."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks.peers.growth import AXES, BASE, LABELS
from benchmarks.peers.rows import RESULTS, Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATH = RESULTS / "growth.svg"
GIB = 2**30


@matplotlib.rc_context({"svg.hashsalt": "growth", "svg.fonttype": "none"})  # reproducible and small
def draw(rows: Sequence[Row], path: Path = PATH) -> None:
    """CPU seconds above and peak memory below, against each size; the line is the FLOPs of the work at the base point's rate."""
    figure, panels = plt.subplots(2, len(AXES), figsize=(3.2 * len(AXES), 5.6), squeeze=False)
    for column, axis in enumerate(AXES):
        points = sorted((row for row in rows if row["axis"] == axis), key=lambda row: row["value"])
        times, memory = panels[0][column], panels[1][column]
        for panel in (times, memory):
            panel.set_xscale("log", base=2)
            panel.grid(alpha=0.3)
        if not points:
            continue
        values = [row["value"] for row in points]
        base = next((row for row in points if row["value"] == BASE[axis]), points[0])
        seconds_per_gflop = base["cpu_seconds"] / base["gflop"]
        times.plot(values, [row["gflop"] * seconds_per_gflop for row in points], color="gray", label="FLOPs")
        low = [row["cpu_seconds"] - row["cpu_seconds_min"] for row in points]
        high = [row["cpu_seconds_max"] - row["cpu_seconds"] for row in points]
        times.errorbar(values, [row["cpu_seconds"] for row in points], yerr=[low, high], fmt="o", label="measured")
        times.set_yscale("log")
        memory.plot(values, [row["peak_bytes"] / GIB for row in points], "o-")
        memory.set_ylim(0, 1.1 * max(row["peak_bytes"] for row in points) / GIB)
        memory.set_xlabel(LABELS[axis])
    panels[0][0].set_ylabel("CPU seconds")
    panels[1][0].set_ylabel("peak memory, GiB")
    panels[0][0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
