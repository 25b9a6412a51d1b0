"""Runs container components as local processes, with kfp.local as the orchestrator.

kfp.local runs container components only in Docker. The class with which its subprocess runner rejects them is looked up as a
module attribute at call time, so `container_processes` replaces it during a run. It also removes the timestamp from the output
folder, so that a resumed run finds its outputs. Nothing else patches kfp; tests/pipelines/local/test_runner.py checks that kfp
still works this way.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfp.local import executor_input_utils, status, subprocess_task_handler, task_handler_interface

from components.rlhf.runtime.process import DIE_WITH_PARENT
from components.rlhf.text.redaction import redactor
from pipelines.run_state import task_label

if TYPE_CHECKING:
    from pipelines.local.journal import Journal

ROOT = Path(__file__).resolve().parents[2]
SHUTDOWN_SECONDS = 35.0  # time for a stage to save a checkpoint


@dataclass
class StageRecord:
    """Status, duration and memory of one task."""

    name: str
    status: str = "running"  # running, succeeded or failed
    seconds: float = 0.0
    peak_memory_bytes: int = 0  # resident set; at least that of this program, which Linux counts before exec
    error: str = ""
    reused: bool = False  # it finished before the run was resumed or in another run, and its outputs verify
    shared_with: str = ""  # the name of that other run, whose outputs it has


@dataclass
class LocalRun:
    """The tasks of a run, in the order of their start. on_line is called with each line that a task prints."""

    folder: Path
    environment: dict[str, str]
    on_line: Callable[[StageRecord, str], None]
    journal: "Journal | None" = None
    stages: list[StageRecord] = field(default_factory=list)

    def start(self, name: str) -> StageRecord:
        taken = {stage.name for stage in self.stages}
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        record = StageRecord(name=next(free for free in names if free not in taken))
        self.stages.append(record)
        return record


@contextlib.contextmanager
def container_processes(local_run: LocalRun) -> Iterator[None]:
    """Within the block, kfp.local runs the command of every container component as a local process."""

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
            record = run_unless_finished(local_run, self.command, self.environment)
            return status.Status.SUCCESS if record.status == "succeeded" else status.Status.FAILURE

    original_handler = subprocess_task_handler.SubprocessTaskHandler
    original_name = executor_input_utils.get_local_pipeline_resource_name
    subprocess_task_handler.SubprocessTaskHandler = ProcessHandler
    executor_input_utils.get_local_pipeline_resource_name = lambda pipeline_name: pipeline_name
    try:
        yield
    finally:
        subprocess_task_handler.SubprocessTaskHandler = original_handler
        executor_input_utils.get_local_pipeline_resource_name = original_name


def run_unless_finished(local_run: LocalRun, command: list[str], environment: dict[str, str]) -> StageRecord:
    """Run a task, unless the journal has it as finished with unchanged inputs and outputs."""
    record = local_run.start(task_name(command))
    if local_run.journal is None:
        run_process(record, command, local_run, environment)
        return record
    finished, reason = local_run.journal.find_finished(record.name, command)
    if finished is not None:
        local_run.stages[-1] = finished
        where = f"shared with {finished.shared_with}" if finished.shared_with else "finished earlier"
        line = f"[{finished.name}] {where}, verified"
        if finished.shared_with:
            _log_once(local_run.folder / f"{finished.name}.log", line)
        local_run.on_line(finished, line)
        return finished
    if reason:
        local_run.on_line(record, f"[{record.name}] runs again: {reason}")
    local_run.journal.record_start(record.name, command)
    run_process(record, command, local_run, environment)
    if record.status == "succeeded":
        local_run.journal.record_finish(record, command)
    return record


def _log_once(path: Path, line: str) -> None:
    """Append a line to a log that does not end with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or not path.read_text(encoding="utf-8").endswith(f"{line}\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def task_name(command: list[str]) -> str:
    """The name of a task in KFP, such as import_sft_model and reward_model-2; without outputs, that of its stage.

    kfp.local chooses the order of independent tasks anew in each process, so that they are not numbered by it.
    """
    folder = output_folder(command)
    if folder is None:
        return stage_name(command)
    return task_label(folder.name)


def output_folder(command: list[str]) -> Path | None:
    """The output folder of a task, which contains its executor output; None if its command has no executor input."""
    if "--executor-input" not in command:
        return None
    executor_input = json.loads(command[command.index("--executor-input") + 1])
    return Path(executor_input["outputs"]["outputFile"]).parent


def stage_name(command: list[str]) -> str:
    """The stage in a container command `python -m components.NAME ...`."""
    module = command[command.index("-m") + 1] if "-m" in command else command[0]
    return module.removeprefix("components.")


def run_process(record: StageRecord, command: list[str], local_run: LocalRun, environment: dict[str, str]) -> None:
    """Run one command to its end; its lines go to its log and to on_line, its duration and peak memory into the record.

    The process leads a new process group, which is killed when the process or this program ends.
    """
    if command[0] in ("python", "python3"):
        command = [sys.executable, *command[1:]]
    local_run.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    settings = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", DIE_WITH_PARENT: str(os.getpid())}
    variables = os.environ | settings | local_run.environment | environment
    redact_line = redactor(variables)  # stages redact their own output, but not that of native libraries
    process = subprocess.Popen(
        command,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        with (local_run.folder / f"{record.name}.log").open("a", encoding="utf-8") as file:
            for line in map(redact_line, process.stdout):
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
        if process.returncode is None:  # interrupted: let the stage clean up and report it to MLflow
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
    """Error message for a process that failed without printing one."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        return f"it was killed by {name}{hint}; its log is {path}"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'no output'} (exit code {code}; its log is {path})"
