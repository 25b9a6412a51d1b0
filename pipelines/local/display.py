"""Terminal output of a local run: the progress of its stages, and a summary at the end."""

import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from components.rlhf.config.policy import TITLES
from components.rlhf.text.comparison_table import comparison_rows
from components.rlhf.text.progress import format_duration
from pipelines.local.compare import Comparison, sections
from pipelines.local.runner import StageRecord
from pipelines.run_state import RunState

MARKS = {
    "running": ("…", "cyan"), "succeeded": ("✓", "green"), "failed": ("✗", "red"), "stopped": ("■", "yellow"),
    "waiting": ("·", "dim"), "skipped": ("-", "dim"),
}  # fmt: skip


class Display:
    """A live table on a terminal; plain lines elsewhere (a log file, CI)."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.lines: dict[str, str] = {}
        self.stages: list[StageRecord] = []
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Display":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()
            self.console.print(self._table())

    def show_line(self, stage: StageRecord, line: str) -> None:
        if not re.match(r"\[\w+\] |warning: |error: ", line):
            return  # output of a library, which is only in the log of the stage
        if stage not in self.stages:
            self.stages.append(stage)
        if self.live is None:
            self.console.print(Text(line), soft_wrap=True)
            return
        self.lines[stage.name] = line.removeprefix(f"[{stage.name}] ")
        self.live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        for stage in self.stages:
            mark, color = MARKS[stage.status]
            table.add_row(
                Text(mark, style=color),
                stage.name,
                Text(format_duration(stage.seconds) if stage.seconds else "", style="dim"),
                Text(self.lines.get(stage.name, ""), overflow="ellipsis", no_wrap=True),
            )
        return table


def state_table(state: RunState) -> Table:
    """The tasks of a run, with their states, times and last lines."""
    title = Text(f"{state.run}: ").append(state.state, style=f"bold {MARKS[state.state][1]}")
    if state.reason:
        title.append(f" ({state.reason})")
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    for task in state.tasks:
        mark, color = MARKS[task.state]
        table.add_row(
            Text(mark, style=color),
            task.name,
            task.state,
            Text(format_duration(task.seconds) if task.seconds else "", style="dim"),
            Text(task.line, overflow="ellipsis", no_wrap=True),
        )
    return table


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
