"""Terminal output about runs on this machine: the summary at the end of one, and several side by side."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.rlhf.config.policy import TITLES
from components.rlhf.text.comparison_table import comparison_rows
from components.rlhf.text.progress import format_duration
from pipelines.local.compare import Comparison, sections


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print time and memory of each stage, the comparison of SFT and the policy, the gate's decision, and how to open the results."""
    stages = Table(title="Stages", title_justify="left")
    stages.add_column("stage")
    stages.add_column("status")
    stages.add_column("time", justify="right")
    stages.add_column("peak memory", justify="right")
    stages.add_column("of a process, planned", justify="right")
    for name, stage in summary["stages"].items():
        stages.add_row(
            name,
            "reused" if stage["reused"] else stage["status"],
            format_duration(stage["seconds"]),
            f"{stage['peak_memory_bytes'] / 2**30:.2f} GiB",
            f"{stage['memory']['planned_gib']:.2f} GiB" if stage.get("memory") else "",
        )
    console.print(stages)
    if summary["status"] == "failed":
        console.print(Text(f"error: {summary['reason']}", style="red"), soft_wrap=True)
        return
    title = TITLES[summary.get("method", "ppo")]
    table = Table(
        title=f"{title} against SFT on {summary['evaluation']['num_prompts']:.0f} held-out prompts",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("SFT", justify="right")
    table.add_column(title, justify="right")
    for row in comparison_rows(summary["evaluation_all"]):
        table.add_row(row["name"], row["sft"], row["policy"])
    console.print(table)
    for name, policy in summary.get("policies", {}).items():
        if name != summary.get("method", name):
            console.print(
                Text(
                    f"{TITLES[name]} does not go to the gate, which would {policy['decision']} it: {policy['reason']}."
                ),
                soft_wrap=True,
            )
    decision, color = ("Promoted", "green") if summary["promoted"] else ("Rejected", "yellow")
    console.print(
        Text(f"{decision}: ", style=f"bold {color}").append(f"{summary['reason']}.", style="default"), soft_wrap=True
    )
    for name, command in summary["open"].items():
        console.print(Text(f"{name:<9}", style="dim").append(command, style="bold"), soft_wrap=True)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print runs side by side."""
    for title, rows in sections(comparison):
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for name in comparison.runs:
            table.add_column(Text(name), overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
