"""Write the results and costs of finished runs into the documents.

    python -m benchmarks.report [RUN ...]       # default: the newest run under runs/

Replaces the sections `result` of docs/results.md and `cost` of README.md and components/README.md. Several runs of the
same settings are reported as their median and range.
"""

import json
import statistics
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, describe_machine, replace_section
from components.rlhf.text.comparison_table import comparison_rows
from components.rlhf.text.progress import format_duration

Run = dict[str, Any]  # the content of summary.json, or one row of movie_study.jsonl
HEADLINE_ROWS = ("win rate (judge)", "win rate, both cut", "judge score", "KL to SFT", "EOS rate")


def write_tables(runs: Sequence[Run], root: Path = ROOT) -> None:
    """Write the result of the first run and the cost of all runs."""
    replace_section(root / "docs" / "results.md", "result", result_table(runs[0]))
    replace_section(root / "README.md", "cost", cost_sentence(runs))
    replace_section(root / "components" / "README.md", "cost", cost_table(runs))


def result_table(run: Run, *, headline: bool = False) -> str:
    """SFT against PPO, as the run itself prints it; with `headline` only the rows that the README shows."""
    rows = comparison_rows(run["evaluation_all"])
    if headline:
        rows = [row for row in rows if row["name"].startswith(HEADLINE_ROWS)]
    lines = ["| | SFT | PPO |", "|---|---:|---:|"]
    lines += [f"| {row['name']} | {row['sft']} | {row['policy']} |" for row in rows]
    decision = "promoted" if run["promoted"] else "rejected"
    return "\n".join([*lines, "", f"The gate {decision} this model. Preset {run['preset']}, seed {run['seed']}."])


def cost_table(runs: Sequence[Run]) -> str:
    """Time and peak memory of each stage."""
    lines = ["| stage | time | peak memory |", "|---|---:|---:|"]
    for stage in runs[0]["stages"]:
        seconds = [run["stages"][stage]["seconds"] for run in runs]
        lines.append(f"| {stage} | {median_duration(seconds)} | {peak_gib(runs, [stage]):.1f} GiB |")
    time, peak = total_cost(runs)
    lines.append(f"| **all** | **{time}** | **{peak}** |")
    return "\n".join([*lines, "", f"{describe_statistic(runs).capitalize()}; {machine_of(runs[0])}."])


def cost_sentence(runs: Sequence[Run]) -> str:
    time, peak = total_cost(runs)
    return (
        f"The stages of `make run` take {time} minutes and at most {peak} of memory in one process "
        f"({describe_statistic(runs)}; {machine_of(runs[0])})."
    )


def total_cost(runs: Sequence[Run]) -> tuple[str, str]:
    """The time of all stages together, and the peak memory of the largest."""
    seconds = [sum(stage["seconds"] for stage in run["stages"].values()) for run in runs]
    return median_duration(seconds), f"{peak_gib(runs, runs[0]['stages']):.1f} GiB"


def describe_statistic(runs: Sequence[Run]) -> str:
    return "one run" if len(runs) == 1 else f"median of {len(runs)} runs, with the range"


def machine_of(run: Run) -> str:
    """The machine that a row was measured on; summary.json does not name it, so a run is taken to be from this machine."""
    return str(run.get("machine") or describe_machine())


def peak_gib(runs: Sequence[Run], stages: Collection[str]) -> float:
    return max(run["stages"][stage]["peak_memory_bytes"] for run in runs for stage in stages) / 2**30


def median_duration(seconds: Sequence[float]) -> str:
    """The median as M:SS, with the range if there are several values."""
    median = format_duration(statistics.median(seconds))
    if len(seconds) == 1:
        return median
    return f"{median} ({format_duration(min(seconds))} to {format_duration(max(seconds))})"


def main() -> None:
    paths = [Path(argument) for argument in sys.argv[1:]] or sorted((ROOT / "runs").glob("*/summary.json"))[-1:]
    files = [path if path.suffix == ".json" else path / "summary.json" for path in paths]
    if not files:
        sys.exit("runs/ has no finished run; start one with make run")
    runs = [json.loads(file.read_text()) for file in files]
    failed = [str(file) for file, run in zip(files, runs, strict=True) if run["status"] != "succeeded"]
    if failed:
        sys.exit(f"expected runs that succeeded; these did not: {', '.join(failed)}")
    write_tables(runs)
    print(result_table(runs[0]), cost_table(runs), sep="\n\n")


if __name__ == "__main__":
    main()
