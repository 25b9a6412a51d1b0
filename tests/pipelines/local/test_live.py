"""What a person sees of a run while it works, in terminals of two widths and without one."""

import io
import re
from collections.abc import Sequence

import pytest
from rich.console import Console

from pipelines.local import live
from pipelines.local.live import Display, state_table, task_table
from pipelines.local.runner import StageRecord
from pipelines.run_state import RunState, TaskState

PPO = "iteration 12/40  score 0.038  kl 0.02  length 15.2  123 samples/s  1.93 s/iteration  1:03:20 left"
TASKS = (
    TaskState(name="import_reward_model", state="succeeded", seconds=3725.0, line="36,096 parameters in 3 layers, " + "x" * 200),
    TaskState(name="ppo", state="running", seconds=83.0, line=PPO),
    TaskState(name="judge", state="failed", seconds=1.0, line="judge.path is missing"),
    TaskState(name="evaluation", state="waiting"),
    TaskState(name="notify", state="skipped"),
)  # fmt: skip


def rendered(table: object, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 120])
def test_a_task_is_one_line_that_keeps_progress_and_time_left(width: int) -> None:
    imported, ppo, judge, evaluation, notify = rendered(task_table(TASKS), width)
    assert all(len(line) <= width for line in (imported, ppo, judge, evaluation, notify))
    assert imported.startswith("✓  import_reward_model  1:02:05  36,096 parameters") and imported.rstrip().endswith("…")
    assert re.match(r"…  ppo +1:23  ━{12} iteration 12/40  1:03:20 left", ppo)
    assert ("123 samples/s  1.93 s/iteration" in ppo) == (width == 120)
    assert judge.split() == ["✗", "judge", "0:01", "judge.path", "is", "missing"]
    assert evaluation.split() == ["·", "evaluation", "waiting"] and notify.split() == ["-", "notify", "skipped"]


@pytest.mark.parametrize(("done", "total", "filled"), [(0, 40, 0), (12, 40, 3), (39, 40, 11), (40, 40, 12), (3, 2, 12)])
def test_bar_is_full_at_the_end_only(done: int, total: int, filled: int) -> None:
    text = live.step_text(live.Step("step", done, total, ()))
    assert (text.plain.index(" "), sum(span.end - span.start for span in text.spans if span.style == "cyan")) == (
        12,
        filled,
    )


def test_state_has_name_state_and_reason() -> None:
    state = RunState(run="runs/it's [a] run", state="failed", reason="ppo: [nan]", tasks=list(TASKS))
    assert rendered(state_table(state), 80)[0].rstrip() == "runs/it's [a] run: failed (ppo: [nan])"


def show(console: Console, lines: Sequence[str]) -> str:
    record = StageRecord(name="sft")
    with Display(console, [record], ["sft", "ppo"]) as display:
        for line in lines:
            display.show_line(record, line)
        record.status, record.seconds = "succeeded", 4.0
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", text)  # without movements of the cursor


LINES = ["[sft] step 1/2  loss 6.7", "a library says", "warning: [half] the disk", "[sft] held-out loss 6.2"]


def test_without_a_terminal_there_are_only_the_lines() -> None:
    shown = show(Console(file=io.StringIO(), width=40), LINES)
    assert shown.splitlines() == [LINES[0], LINES[2], LINES[3]]


def test_on_a_terminal_warnings_stay_and_the_last_table_has_what_ran() -> None:
    shown = show(Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None), LINES)
    assert "a library says" not in shown
    assert "warning: [half] the disk" in [line.strip() for line in shown.splitlines()]
    assert shown.splitlines()[-1].rstrip() == "✓  sft  0:04  held-out loss 6.2"
