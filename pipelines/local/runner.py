"""Executing container components as processes of this machine, through the real kfp.local orchestrator.

kfp.local has no runner for container components without Docker. Its subprocess runner refuses them in one class, which it
looks up as a module attribute at call time; `container_processes` puts another class there for the length of a run. In the same
way it takes the time out of the folder that outputs go to, so that a run that goes on finds what it wrote. It is the only place
that touches kfp's inside; tests/pipelines/local/test_runner.py checks that kfp still works this way.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kfp.local import executor_input_utils, status, subprocess_task_handler, task_handler_interface

from components.rlhf.runtime.process import DIE_WITH_PARENT
from components.rlhf.text.redaction import redactor

ROOT = Path(__file__).resolve().parents[2]
SHUTDOWN_SECONDS = 35.0  # a stage saves a checkpoint first


@dataclass
class StageRecord:
    """How one task went."""

    name: str
    status: str = "running"  # running, succeeded or failed
    seconds: float = 0.0
    peak_memory_bytes: int = 0  # resident; never below this program's own, which Linux counts up to the exec
    error: str = ""
    reused: bool = False  # it had finished before the run was resumed, and what it left verifies


class StageJournal(Protocol):
    """What remembers the stages that need not run again (pipelines/local/journal.py)."""

    def finished(self, name: str, command: list[str]) -> tuple[StageRecord | None, str]: ...

    def write(self, record: StageRecord, command: list[str]) -> None: ...

    def begin(self, name: str, command: list[str]) -> None: ...


@dataclass
class LocalRun:
    """All tasks of a run, in the order they started; on_line is shown each line that a task prints."""

    folder: Path
    environment: dict[str, str]
    on_line: Callable[[StageRecord, str], None]
    journal: StageJournal | None = None
    stages: list[StageRecord] = field(default_factory=list)

    def start(self, name: str) -> StageRecord:
        again = sum(stage.name.rpartition("-")[0] == name or stage.name == name for stage in self.stages)
        record = StageRecord(name=f"{name}-{again + 1}" if again else name)
        self.stages.append(record)
        return record


@contextlib.contextmanager
def container_processes(local_run: LocalRun) -> Iterator[None]:
    """Within the block, kfp.local runs the command of every container component as a process here."""

    class ProcessHandler(task_handler_interface.ITaskHandler):
        def __init__(
            self,
            image: str,
            full_command: list[str],
            pipeline_root: str,
            runner: Any,
            env_vars: dict[str, str] | None = None,
        ) -> None:
            self.command = full_command
            self.environment = dict(env_vars or {})

        def run(self) -> status.Status:
            record = run_or_reuse(local_run, self.command, self.environment)
            return status.Status.SUCCESS if record.status == "succeeded" else status.Status.FAILURE

    original = subprocess_task_handler.SubprocessTaskHandler
    with_time = executor_input_utils.get_local_pipeline_resource_name
    subprocess_task_handler.SubprocessTaskHandler = ProcessHandler
    executor_input_utils.get_local_pipeline_resource_name = lambda pipeline_name: pipeline_name
    try:
        yield
    finally:
        subprocess_task_handler.SubprocessTaskHandler = original
        executor_input_utils.get_local_pipeline_resource_name = with_time


def run_or_reuse(local_run: LocalRun, command: list[str], environment: dict[str, str]) -> StageRecord:
    """Run a task, unless the journal says that it has been run and what it left is still that."""
    record = local_run.start(stage_name(command))
    if local_run.journal is None:
        run_process(record, command, local_run, environment)
        return record
    before, why_not = local_run.journal.finished(record.name, command)
    if before is not None:
        local_run.stages[-1] = before
        local_run.on_line(before, f"[{before.name}] finished earlier, verified")
        return before
    if why_not:
        local_run.on_line(record, f"[{record.name}] runs again: {why_not}")
    local_run.journal.begin(record.name, command)
    run_process(record, command, local_run, environment)
    if record.status == "succeeded":
        local_run.journal.write(record, command)
    return record


def stage_name(command: list[str]) -> str:
    """The stage that a container command starts: `python -m components.NAME ...`."""
    module = command[command.index("-m") + 1] if "-m" in command else command[0]
    return module.removeprefix("components.")


def run_process(record: StageRecord, command: list[str], local_run: LocalRun, environment: dict[str, str]) -> None:
    """Run one command to its end: its lines go to its log and to on_line; its time and peak memory into the record.

    The process leads a group of its own, and no process of the group outlives it or this program.
    """
    if command[0] in ("python", "python3"):
        command = [sys.executable, *command[1:]]
    local_run.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    ours = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", DIE_WITH_PARENT: str(os.getpid())}
    whole = os.environ | ours | local_run.environment | environment
    hide = redactor(whole)  # also of what no Python of ours prints
    process = subprocess.Popen(
        command,
        env=whole,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        with (local_run.folder / f"{record.name}.log").open("a", encoding="utf-8") as file:
            for line in map(hide, process.stdout):
                file.write(line)
                file.flush()
                text = line.rstrip()
                if text.startswith("error: "):
                    record.error = text.removeprefix("error: ")
                local_run.on_line(record, text)
        _, exit_status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(exit_status)
        record.peak_memory_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    finally:
        if process.returncode is None:  # interrupted: let the stage tidy up and say so in MLflow
            _signal_group(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=SHUTDOWN_SECONDS)
        _signal_group(process, signal.SIGKILL)
        process.wait()
        record.seconds = time.monotonic() - started
        record.status = "succeeded" if process.returncode == 0 else "failed"
    if record.status == "failed" and not record.error:
        record.error = _describe_exit(local_run.folder / f"{record.name}.log", process.returncode)


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _describe_exit(path: Path, code: int) -> str:
    """What to say of a process that died without a sentence of its own."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        return f"it was ended by {name}{hint}; its log is {path}"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'no output'} (exit code {code}; its log is {path})"
