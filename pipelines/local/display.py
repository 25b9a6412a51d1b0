"""What a person sees of a run: stages with their progress while it works, a table at the end."""

import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from components.rlhf.text.comparison_table import comparison_rows
from components.rlhf.text.progress import format_duration
from pipelines.local.runner import StageRecord

MARKS = {"running": ("…", "cyan"), "succeeded": ("✓", "green"), "failed": ("✗", "red")}


class Display:
    """On a terminal a table that stays in place; elsewhere (a log, CI) plain lines."""

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
            self.console.print(self._read_table())

    def on_line(self, stage: StageRecord, line: str) -> None:
        if not re.match(r"\[\w+\] |warning: |error: ", line):
            return  # libraries talk, too; all of it is in the stage's log
        if stage not in self.stages:
            self.stages.append(stage)
        if self.live is None:
            self.console.print(Text(line), soft_wrap=True)
            return
        self.lines[stage.name] = line.removeprefix(f"[{stage.name}] ")
        self.live.update(self._read_table(), refresh=True)

    def _read_table(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        for stage in self.stages:
            mark, colour = MARKS[stage.status]
            spent = format_duration(stage.seconds) if stage.seconds else ""
            said = self.lines.get(stage.name, "")
            table.add_row(
                Text(mark, style=colour),
                stage.name,
                Text(spent, style="dim"),
                Text(said, overflow="ellipsis", no_wrap=True),
            )
        return table


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """The end of a run: what each stage cost, SFT against PPO, the verdict, and how to open what was made."""
    stages = Table(title="Stages", title_justify="left")
    stages.add_column("stage")
    stages.add_column("status")
    stages.add_column("time", justify="right")
    stages.add_column("peak memory", justify="right")
    for name, stage in summary["stages"].items():
        stages.add_row(
            name,
            "reused" if stage["reused"] else stage["status"],
            format_duration(stage["seconds"]),
            f"{stage['peak_memory_bytes'] / 2**30:.2f} GiB",
        )
    console.print(stages)
    if summary["status"] == "failed":
        console.print(Text(f"error: {summary['reason']}", style="red"), soft_wrap=True)
        return
    table = Table(
        title=f"PPO against SFT on {summary['evaluation']['num_prompts']:.0f} held-out prompts", title_justify="left"
    )
    table.add_column("")
    table.add_column("SFT", justify="right")
    table.add_column("PPO", justify="right")
    for row in comparison_rows(summary["evaluation_all"]):
        table.add_row(row["name"], row["sft"], row["ppo"])
    console.print(table)
    word, colour = ("Promoted", "green") if summary["promoted"] else ("Rejected", "yellow")
    console.print(
        Text(f"{word}: ", style=f"bold {colour}").append(f"{summary['reason']}.", style="default"), soft_wrap=True
    )
    for name, command in summary["open"].items():
        console.print(Text(f"{name:<9}", style="dim").append(command, style="bold"), soft_wrap=True)
