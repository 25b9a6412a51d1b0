"""Put the tables of a run into the documents: what it came to, what it cost, and on which machine.

    python -m benchmarks.report RUN [RUN ...]      (the newest run under runs/ without arguments)

Rewrites the parts of README.md and components/README.md between `<!-- result -->` and `<!-- /result -->`, and between
`<!-- cost -->` and `<!-- /cost -->`. Several runs of the same settings are shown as their median with the range.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, machine, rewrite
from components.rlhf.text.comparison_table import comparison_rows
from components.rlhf.text.progress import format_duration


def result_table(summary: dict[str, Any]) -> str:
    lines = ["| | SFT | PPO |", "|---|---:|---:|"]
    lines += [f"| {row['name']} | {row['sft']} | {row['ppo']} |" for row in comparison_rows(summary["evaluation_all"])]
    verdict = "Promoted" if summary["promoted"] else "Rejected"
    return "\n".join(
        [*lines, "", f"{verdict}: {summary['reason']}. Preset {summary['preset']}, seed {summary['seed']}."]
    )


def cost_table(summaries: list[dict[str, Any]]) -> str:
    lines = ["| stage | time | peak memory |", "|---|---:|---:|"]
    for stage in summaries[0]["stages"]:
        seconds = [s["stages"][stage]["seconds"] for s in summaries]
        lines.append(f"| {stage} | {spread(seconds)} | {max_memory(summaries, stage):.1f} GiB |")
    time, peak = total(summaries)
    lines.append(f"| **all** | **{time}** | **{peak}** |")
    return "\n".join([*lines, "", f"{how_often(summaries).capitalize()} on {machine()}."])


def cost_line(summaries: list[dict[str, Any]]) -> str:
    time, peak = total(summaries)
    return f"The run took {time} minutes with at most {peak} in any process ({how_often(summaries)}; {machine()})."


def total(summaries: list[dict[str, Any]]) -> tuple[str, str]:
    """Time of all stages, and the peak memory of the largest."""
    seconds = [sum(stage["seconds"] for stage in s["stages"].values()) for s in summaries]
    return spread(seconds), f"{max(max_memory(summaries, stage) for stage in summaries[0]['stages']):.1f} GiB"


def how_often(summaries: list[dict[str, Any]]) -> str:
    return "one run" if len(summaries) == 1 else f"median of {len(summaries)} runs, with the range"


def max_memory(summaries: list[dict[str, Any]], stage: str) -> float:
    """GiB."""
    return max(s["stages"][stage]["peak_memory_bytes"] for s in summaries) / 2**30


def spread(seconds: list[float]) -> str:
    middle = format_duration(statistics.median(seconds))
    return (
        middle
        if len(seconds) == 1
        else f"{middle} ({format_duration(min(seconds))} to {format_duration(max(seconds))})"
    )


def write_tables(summaries: list[dict[str, Any]]) -> None:
    """Rewrite the documents: what the first run came to, and what all of them cost."""
    rewrite(ROOT / "README.md", "result", result_table(summaries[0]))
    rewrite(ROOT / "README.md", "cost", cost_line(summaries))
    rewrite(ROOT / "components" / "README.md", "cost", cost_table(summaries))


def main() -> None:
    runs = [Path(argument) for argument in sys.argv[1:]] or sorted((ROOT / "runs").glob("*/summary.json"))[-1:]
    files = [run if run.suffix == ".json" else run / "summary.json" for run in runs]
    if not files:
        sys.exit("no run found; make run first")
    summaries = [json.loads(file.read_text()) for file in files]
    failed = [str(file) for file, summary in zip(files, summaries, strict=True) if summary["status"] != "succeeded"]
    if failed:
        sys.exit(f"not a finished run: {', '.join(failed)}")
    write_tables(summaries)
    print(result_table(summaries[0]), cost_table(summaries), sep="\n\n")


if __name__ == "__main__":
    main()
