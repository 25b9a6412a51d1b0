"""The progress of a run in a terminal, a row for each stage."""

import re
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from components.rlhf.text.progress import Step, format_duration, parse_step
from pipelines.local.runner import StageRecord
from pipelines.run_state import RunState, TaskState

MARKS = {
    "running": ("…", "cyan"), "succeeded": ("✓", "green"), "failed": ("✗", "red"), "stopped": ("■", "yellow"),
    "waiting": ("·", "dim"), "skipped": ("-", "dim"),
}  # fmt: skip
BAR_CHARS = 12
REFRESHES_PER_SECOND = 2


class Display:
    """A live table on a terminal; plain lines elsewhere (a log file, CI)."""

    def __init__(self, console: Console, stages: Sequence[StageRecord], planned: Sequence[str] = ()) -> None:
        """stages grows while the run goes on; planned are the names of all that may run, in their order."""
        self.console, self.stages, self.planned = console, stages, planned
        self.lines: dict[str, str] = {}
        self.started = time.monotonic()
        self.seen: dict[str, float] = {}  # when each stage was first in the table
        self.live: Live | None = None
        if console.is_terminal:
            self.live = Live(
                console=console,
                get_renderable=self._table,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
                vertical_overflow="crop",
            )

    def __enter__(self) -> "Display":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()
            self.planned = ()  # what has not run is of no interest any more
            self.console.print(self._table())

    def show_line(self, stage: StageRecord, line: str) -> None:
        if not re.match(r"\[\w+\] |warning: |error: ", line):
            return  # output of a library, which is only in the log of the stage
        if self.live is None:
            self.console.print(Text(line), soft_wrap=True)
            return
        if line.startswith("warning: "):  # it would be gone with the next line of the stage
            self.console.print(Text(line), soft_wrap=True)
            return
        self.lines[stage.name] = re.sub(r"^(\[\w+\]|error:) ", "", line)

    def _table(self) -> Table:
        now, records = time.monotonic(), list(self.stages)
        tasks = []
        for record in records:
            seconds = record.seconds or now - self.seen.setdefault(record.name, now)
            tasks.append(
                TaskState(name=record.name, state=record.status, seconds=seconds, line=self.lines.get(record.name, ""))
            )
        begun = {record.name for record in records}
        tasks += [TaskState(name=name, state="waiting") for name in self.planned if name not in begun]
        return task_table(tasks, seconds=now - self.started)


def task_table(tasks: Sequence[TaskState], *, seconds: float | None = None) -> Table:
    """A row for each task: state, time, and what it does. seconds is the time of all, while they run."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()  # the only one that gets narrower
    for task in tasks:
        mark, color = MARKS[task.state]
        style = "dim" if task.state in ("waiting", "skipped") else ""
        step = parse_step(task.line) if task.state == "running" else None
        doing = (
            step_text(step)
            if step
            else Text(task.line or ("" if task.state == "succeeded" else task.state), style=style)
        )
        doing.no_wrap, doing.overflow = True, "ellipsis"
        table.add_row(
            Text(mark, style=color),
            Text(task.name, style=style),
            Text(format_duration(task.seconds) if task.seconds >= 0.5 else "", style="dim"),
            doing,
        )
    if seconds is not None and any(task.state in ("running", "waiting") for task in tasks):
        done = sum(task.state == "succeeded" for task in tasks)
        table.add_row(
            "", Text(f"{done} of {len(tasks)} done", style="bold"), Text(format_duration(seconds), style="bold"), ""
        )
    return table


def step_text(step: Step) -> Text:
    """A bar, steps done of all, then time left and rates, which must not be cut off, then metrics."""
    filled = BAR_CHARS * min(step.done, step.total) // step.total
    text = Text().append("━" * filled, style="cyan").append("━" * (BAR_CHARS - filled), style="bright_black")
    text.append(f" {step.unit} {step.done}/{step.total}")

    def rank(value: str) -> int:
        return 0 if value.endswith(" left") else 1 if re.search(r"[a-z]/s$| s/", value) else 2

    for value in sorted(step.values, key=rank):
        text.append(f"  {value}", style="" if rank(value) == 0 else "dim")
    return text


def state_table(state: RunState) -> Table:
    """The tasks of a run under its name and state."""
    title = Text(f"{state.run}: ", style="default").append(state.state, style=f"bold {MARKS[state.state][1]}")
    if state.reason:
        title.append(f" ({state.reason})")
    table = task_table(state.tasks)
    table.title, table.title_justify = title, "left"
    return table
