"""Tracking in a process of its own. What it does with requests is that of MlflowTracker, which test_mlflow.py tests."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.tracking import process as process_module
from components.rlhf.tracking.mlflow import MlflowTracker, NullTracker
from components.rlhf.tracking.process import ProcessTracker, start_tracking_process
from components.rlhf.tracking.texts import database_uri
from tests.support.mlflow_database import new_database

ROOT = Path(__file__).resolve().parents[3]
RECORDING = """
import sys, time
from pathlib import Path
from components.rlhf.tracking import process

class Recorder:
    def __init__(self, config, **arguments): self.note("start", config.experiment, arguments)
    def note(self, *what): print(*what, file=sys.stderr, flush=True)
    def log(self, *what, **more): self.note("log", *what, more)
    def log_file(self, path, name): self.note("log_file", path, name); time.sleep(DELAY)
    def log_system(self, metrics): pass
    def flush(self): print("printed by a library", flush=True); self.note("flush")
    def finish(self, *what, **more): self.note("finish", *what, more)

process.start_tracking = Recorder
process.main()
"""


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def trackers() -> Iterator[list[ProcessTracker]]:
    """Trackers whose processes are killed after the test."""
    started: list[ProcessTracker] = []
    yield started
    for tracker in started:
        tracker._process.kill()
        tracker._process.wait()


def record(monkeypatch: pytest.MonkeyPatch, trackers: list[ProcessTracker], *, delay: float = 0) -> ProcessTracker:
    """A tracker whose process prints its calls to stderr, and takes delay seconds to log a file."""
    command = (sys.executable, "-c", RECORDING.replace("DELAY", str(delay)))
    monkeypatch.setattr(process_module, "COMMAND", command)
    tracker = ProcessTracker(TrackingConfig(uri="http://x"), run_id="r", stage="sft", params={"a": {"b": None}})
    trackers.append(tracker)
    return tracker


def test_run_is_tracked(tmp_path: Path, trackers: list[ProcessTracker]) -> None:
    config = TrackingConfig(uri=database_uri(new_database(tmp_path)))
    tracker = start_tracking_process(config, run_id="r", stage="sft", params={"seed": 3})
    assert isinstance(tracker, ProcessTracker)
    trackers.append(tracker)
    before = int(time.time() * 1000)
    tracker.log({"train/loss": 0.5, "train/ratio": float("nan")}, 1)
    tracker.log_text("curves.svg", "<svg>\u00e4</svg>")
    after = int(time.time() * 1000)
    tracker.flush()
    client = MlflowClient(tracking_uri=config.uri)
    experiment = client.get_experiment_by_name(config.experiment)
    (run,) = client.search_runs([experiment.experiment_id], filter_string="tags.`rlhf.stage` = 'sft'")
    (point,) = client.get_metric_history(run.info.run_id, "train/loss")
    assert (point.value, point.step) == (0.5, 1)
    assert before <= point.timestamp <= after  # the time of the call, not of the request
    assert run.data.params == {"seed": "3"}
    (tmp_path / "summary").write_text("# x\n", encoding="utf-8")
    tracker.log_file(tmp_path / "summary", "summary.md")
    tracker.finish("FAILED", "line 3 is broken")
    run = client.get_run(run.info.run_id)
    assert (run.info.status, run.data.tags["rlhf.error"]) == ("FAILED", "line 3 is broken")
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["curves.svg", "summary.md"]
    assert tracker._process.returncode == 0


def test_requests_are_served_in_order(
    monkeypatch: pytest.MonkeyPatch, trackers: list[ProcessTracker], capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "time", lambda: 12.5)
    tracker = record(monkeypatch, trackers)
    tracker.log({"loss": 1}, 7)
    tracker.log_file(Path("x"), "x.md")
    tracker.flush()
    tracker.finish("FINISHED")
    assert capfd.readouterr().err.splitlines() == [
        "start kfp-rlhf {'run_id': 'r', 'stage': 'sft', 'params': {'a': {'b': None}}}",
        "log {'metrics': {'loss': 1.0}, 'step': 7, 'milliseconds': 12500}",
        "log_file x x.md",
        "printed by a library",
        "flush",
        "finish {'status': 'FINISHED', 'error': ''}",
    ]


def test_only_flush_and_finish_wait(monkeypatch: pytest.MonkeyPatch, trackers: list[ProcessTracker]) -> None:
    tracker = record(monkeypatch, trackers, delay=2)
    tracker.flush()
    started = time.monotonic()
    tracker.log_file(Path("x"))
    for step in range(3000):  # more than fits into a pipe
        tracker.log({f"metric_{number}": 1.0 for number in range(10)}, step)
    assert time.monotonic() - started < 1.9
    tracker.finish("FINISHED")
    assert time.monotonic() - started > 1.9


def test_answer_of_an_interrupted_wait_is_not_taken_for_the_next(
    monkeypatch: pytest.MonkeyPatch, trackers: list[ProcessTracker]
) -> None:
    tracker = record(monkeypatch, trackers, delay=1)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(tracker, "_wait", lambda: None)
        tracker.flush()
    started = time.monotonic()
    tracker.log_file(Path("x"))
    tracker.flush()
    assert time.monotonic() - started > 0.9


def test_signals_to_the_group_of_the_stage_do_not_reach_it(
    monkeypatch: pytest.MonkeyPatch, trackers: list[ProcessTracker]
) -> None:
    tracker = record(monkeypatch, trackers)  # still starting
    assert os.getpgid(tracker._process.pid) == tracker._process.pid != os.getpgrp()


def test_half_a_request_ends_it(
    monkeypatch: pytest.MonkeyPatch, trackers: list[ProcessTracker], capfd: pytest.CaptureFixture[str]
) -> None:
    """A signal may end the stage's write; the stage must not wait for an answer to what was cut."""
    tracker = record(monkeypatch, trackers)
    tracker.flush()
    assert tracker._process.stdin is not None
    tracker._process.stdin.write(b'{"number": 3, "ca')
    tracker.finish("FAILED")
    assert tracker._process.wait(timeout=20) == 0
    assert capfd.readouterr().err.count("warning: MLflow could not be used, continuing without it") == 1


def test_second_finish_is_no_error(monkeypatch: pytest.MonkeyPatch, trackers: list[ProcessTracker]) -> None:
    """A signal ends the wait of the first one, and the stage then says that it has failed."""
    tracker = record(monkeypatch, trackers)
    tracker.finish("FINISHED")
    tracker.finish("FAILED", "stopped by a signal")
    assert tracker._process.poll() is not None


def test_stage_goes_on_without_a_lost_process(
    monkeypatch: pytest.MonkeyPatch, trackers: list[ProcessTracker], capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = record(monkeypatch, trackers)
    tracker.flush()
    tracker._process.kill()
    tracker._process.wait()
    tracker.log({"loss": 1.0}, 1)
    tracker.flush()
    tracker.finish("FINISHED")
    assert capfd.readouterr().err.count("warning: MLflow could not be used, continuing without it") == 1


def test_process_that_ends_while_the_stage_waits_is_reported(
    monkeypatch: pytest.MonkeyPatch, trackers: list[ProcessTracker], capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process_module, "COMMAND", (sys.executable, "-c", "input()"))
    tracker = ProcessTracker(TrackingConfig(uri="http://x"), run_id="r", stage="sft", params={})
    trackers.append(tracker)
    tracker.flush()
    tracker.finish("FINISHED")
    assert capfd.readouterr().err == (
        "warning: MLflow could not be used, continuing without it (the process that talks to it ended)\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("delay", [0, 600])
def test_process_ends_with_its_stage(monkeypatch: pytest.MonkeyPatch, delay: float) -> None:
    """Also during a request, and if the stage is killed."""
    code = f"""
import os, sys
from pathlib import Path
from components.rlhf.config.storage import TrackingConfig
from components.rlhf.tracking import process
process.COMMAND = (sys.executable, "-c", {RECORDING.replace("DELAY", str(delay))!r})
tracker = process.ProcessTracker(TrackingConfig(uri="http://x"), run_id="r", stage="sft", params={{}})
tracker.flush()
tracker.log_file(Path("x"))
print(tracker._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    deadline = time.monotonic() + 20
    while is_running(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.parametrize("config", [TrackingConfig(), TrackingConfig(uri="http://x", enabled=False)])
def test_without_tracking_no_process_is_started(config: TrackingConfig) -> None:
    assert isinstance(start_tracking_process(config, run_id="r", stage="sft", params={}), NullTracker)


def test_without_a_second_process_the_stage_tracks_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    config = TrackingConfig(uri=database_uri(new_database(tmp_path)))
    tracker = start_tracking_process(config, run_id="r", stage="sft", params={})
    assert isinstance(tracker, MlflowTracker)


def test_secrets_are_redacted_in_the_other_process(
    monkeypatch: pytest.MonkeyPatch, trackers: list[ProcessTracker], capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(os.environ, "MLFLOW_TRACKING_PASSWORD", "correct-horse")
    tracker = record(monkeypatch, trackers)
    tracker.log_file(Path("correct-horse"))
    tracker.finish("FINISHED")
    err = capfd.readouterr().err
    assert "log_file ***" in err and "correct-horse" not in err
