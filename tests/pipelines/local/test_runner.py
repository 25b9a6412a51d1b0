"""The runner patches kfp internals: these tests fail if kfp.local no longer looks up its task handler there."""

import resource
import subprocess
import sys
import time
from pathlib import Path

import kfp.local
import pytest
from kfp import dsl
from kfp.local import subprocess_task_handler

from pipelines.local.run import quiet_kfp
from pipelines.local.runner import LocalRun, StageRecord, container_processes, run_process


@dsl.container_component
def shell(script: str, said: dsl.OutputPath(str)):
    return dsl.ContainerSpec(
        image="any", command=["sh", "-c"], args=[f'mkdir -p "$(dirname "$1")"; {script}', "sh", said]
    )


@dsl.pipeline
def inner(word: str):
    with dsl.If(word == "yes"):
        shell(script='echo took-yes; printf x > "$1"')
    with dsl.If(word == "no"):
        shell(script='echo took-no; printf x > "$1"')


@dsl.pipeline
def outer(script: str):
    first = shell(script=script)
    inner(word=first.outputs["said"])


def execute(folder: Path, script: str) -> list[str]:
    lines: list[str] = []
    local_run = LocalRun(
        folder=folder / "logs", environment={"FROM_RUN": "42"}, on_line=lambda _stage, line: lines.append(line)
    )
    with container_processes(local_run), quiet_kfp():
        kfp.local.init(runner=kfp.local.SubprocessRunner(use_venv=False), pipeline_root=str(folder / "out"))
        outer(script=script)
    return lines


@pytest.mark.parametrize("word", ["yes", "no"])
def test_container_components_run_as_processes_and_branches_follow_their_outputs(tmp_path: Path, word: str) -> None:
    assert execute(tmp_path, f'echo run $FROM_RUN; printf {word} > "$1"') == ["run 42", f"took-{word}"]


def test_failing_command_fails_the_pipeline(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        execute(tmp_path, "exit 3")


def test_patches_of_kfp_are_undone(tmp_path: Path) -> None:
    original = subprocess_task_handler.SubprocessTaskHandler
    with pytest.raises(RuntimeError):
        execute(tmp_path, "exit 3")
    assert subprocess_task_handler.SubprocessTaskHandler is original


def run_command(tmp_path: Path, command: list[str]) -> StageRecord:
    local_run = LocalRun(folder=tmp_path, environment={}, on_line=lambda _stage, _line: None)
    record = local_run.start("stage")
    run_process(record, command, local_run, {})
    return record


def test_record_has_duration_and_peak_memory(tmp_path: Path) -> None:
    own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = own + 200_000_000
    record = run_command(tmp_path, [sys.executable, "-c", f"import time; x = bytearray({size}); time.sleep(0.3)"])
    assert record.status == "succeeded"
    assert 0.3 < record.seconds < 30
    assert size < record.peak_memory_bytes < size + 100e6


def test_error_message_of_a_failed_stage_is_recorded(tmp_path: Path) -> None:
    record = run_command(tmp_path, ["sh", "-c", "echo hello; echo 'error: the file is missing.'; exit 1"])
    assert (record.status, record.error) == ("failed", "the file is missing.")


def test_killed_stage_is_reported_with_its_signal(tmp_path: Path) -> None:
    record = run_command(tmp_path, ["sh", "-c", "kill -9 $$"])
    assert record.status == "failed"
    assert record.error.startswith("it was killed by SIGKILL; the machine may have run out of memory")


def test_no_process_outlives_its_stage(tmp_path: Path) -> None:
    record = run_command(tmp_path, ["sh", "-c", "sleep 300 >/dev/null 2>&1 & echo $!"])
    stat = Path(f"/proc/{int((tmp_path / 'stage.log').read_text())}/stat")
    assert record.status == "succeeded"
    deadline = time.monotonic() + 10  # killing takes a moment
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_stage_is_killed_when_its_runner_dies(tmp_path: Path) -> None:
    """A runner that is killed cannot clean up; the kernel kills the stage."""
    stage = "from components.rlhf.runtime.process import die_with_parent as d; d(); print('up', flush=True); import time; time.sleep(300)"
    runner = (
        "import sys; from pathlib import Path; from pipelines.local.runner import *; "
        "log = LocalRun(folder=Path(sys.argv[1]), environment={}, on_line=lambda s, l: print(l, flush=True)); "
        "run_process(log.start('stage'), ['python', '-c', 'import os; print(os.getpid(), flush=True); ' + sys.argv[2]], log, {})"
    )
    process = subprocess.Popen([sys.executable, "-c", runner, str(tmp_path), stage], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    stat = Path(f"/proc/{int(process.stdout.readline())}/stat")
    assert process.stdout.readline() == "up\n"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
