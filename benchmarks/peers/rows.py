"""Rows of results: one for each system and setting, saved as a list in benchmarks/results/NAME.json."""

import datetime
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, describe_machine

RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]
# cpu_seconds and wall_seconds are medians of n iterations, samples and tokens means per iteration, peak_bytes the largest of all.
FIELDS = {
    "system": str,
    "version": str,
    "setting": str,  # the same text for the same work
    "samples": float,
    "tokens": float,  # real ones, without padding
    "cpu_seconds": float,
    "cpu_seconds_min": float,
    "cpu_seconds_max": float,
    "wall_seconds": float,
    "n": int,
    "peak_bytes": int,
    "load": float,  # the largest load average of the machine before one of the processes
    "machine": str,
    "date": str,
}


def make_row(system: str, setting: str, processes: Sequence[dict[str, Any]], **more: Any) -> Row:
    """One row of all processes that measured a system; each has version, samples, tokens, intervals, peak_bytes and load."""
    phases = processes[-1].get("phases")  # share of each phase in the wall time of the last process
    if phases:
        more = more | {"phases": {name: round(share, 3) for name, share in phases.items()}}
    intervals = [interval for process in processes for interval in process["intervals"]]
    cpu = [seconds for seconds, _ in intervals]
    return {
        "system": system,
        "version": processes[0]["version"],
        "setting": setting,
        "samples": float(statistics.mean(process["samples"] for process in processes)),
        "tokens": float(statistics.mean(process["tokens"] for process in processes)),
        "cpu_seconds": round(statistics.median(cpu), 4),
        "cpu_seconds_min": round(min(cpu), 4),
        "cpu_seconds_max": round(max(cpu), 4),
        "wall_seconds": round(statistics.median(wall for _, wall in intervals), 4),
        "n": len(intervals),
        "peak_bytes": max(process["peak_bytes"] for process in processes),
        "load": max(process["load"] for process in processes),
        "machine": describe_machine(),
        "date": datetime.date.today().isoformat(),
    } | more


def load_rows(name: str, folder: Path = RESULTS) -> list[Row]:
    """The rows of a benchmark; an empty list if it was never measured."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def save_rows(name: str, rows: Sequence[Row], *, keep_others: bool, folder: Path = RESULTS) -> list[Row]:
    """Write the rows; with keep_others also those of before for other systems or settings. Returns what was written."""
    new = {(row["system"], row["setting"]): row for row in rows}
    old = load_rows(name, folder) if keep_others else []
    merged = [new.pop((row["system"], row["setting"]), row) for row in old]
    merged += new.values()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(merged, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return merged


def find_row(rows: Sequence[Row], system: str, setting: str) -> Row | None:
    return next((row for row in rows if (row["system"], row["setting"]) == (system, setting)), None)
