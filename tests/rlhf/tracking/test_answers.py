"""Permanent answers of a server are said at once, with the remedy, and never waited for; passing ones are."""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.tracking import mlflow as tracking_module
from components.rlhf.tracking.mlflow import MlflowTracker, start_tracking
from components.rlhf.tracking.parent import open_parent
from components.rlhf.tracking.registry import register_version
from components.rlhf.tracking.texts import database_uri
from tests.support.mlflow_database import new_database


class Server:
    """Answers every request with one status and body."""

    status, body = 200, "{}"
    num_requests = 0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    answers = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers.num_requests += 1
            self.send_response(answers.status)
            self.end_headers()
            self.wfile.write(answers.body.encode())

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    answers.url = f"http://127.0.0.1:{found.server_port}"  # type: ignore[attr-defined]
    yield answers
    found.shutdown()
    found.server_close()


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits of the tracker, which take no time."""
    found: list[float] = []
    start, sleep, tested = time.monotonic(), time.sleep, threading.current_thread()

    def count(seconds: float) -> None:
        if threading.current_thread() is tested:
            found.append(seconds)
        else:  # a thread of MLflow
            sleep(seconds)

    monkeypatch.setattr(tracking_module.time, "sleep", count)
    monkeypatch.setattr(tracking_module.time, "monotonic", lambda: start + sum(found))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return found


def json_of(code: str) -> str:
    return json.dumps({"error_code": code, "message": "no"})


PERMANENT = [
    (401, "<html>login</html>", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
    (401, json_of("UNAUTHENTICATED"), "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
    (403, "forbidden", "ask for permission to edit the experiment mine and the model m"),
    (403, json_of("PERMISSION_DENIED"), "ask for permission to edit the experiment mine and the model m"),
    (404, "<html>nothing here</html>", "correct tracking.uri: what answers there is no MLflow server"),
    (200, "<html>login</html>", "correct tracking.uri: what answers there is no MLflow server, or asks for a login"),
    (400, json_of("INVALID_PARAMETER_VALUE"), "correct tracking.uri, tracking.experiment or tracking.registered_model"),
]
PASSING = [
    (500, json_of("INTERNAL_ERROR")),
    (502, "<html>bad gateway</html>"),
    (503, ""),
    (429, "slow down"),
    (504, ""),
]


@pytest.mark.parametrize(("status", "body", "remedy"), PERMANENT)
def test_permanent_answer_is_said_once_and_not_waited_for(
    server: Any, sleeps: list[float], capsys: pytest.CaptureFixture[str], status: int, body: str, remedy: str
) -> None:
    server.status, server.body, server.num_requests = status, body, 0
    config = TrackingConfig(uri=server.url, experiment="mine", registered_model="m")
    tracker = start_tracking(config, run_id="r", stage="sft", params={})
    for step in range(3):
        tracker.log({"loss": 1.0}, step)
        tracker.flush()
    tracker.finish("FINISHED")
    assert sleeps == [] and server.num_requests <= 2
    err = capsys.readouterr().err
    assert err.startswith("warning: MLflow could not be used, continuing without it (") and remedy in err
    assert err.count("continuing without it") == 1 and "waiting" not in err and "3 points" in err
    version: Any = dict(folder=Path("x"), run_id="r", decision="promote", reason="", lineage={})
    assert open_parent(config, "r") is None and register_version(config, **version) == ""
    assert capsys.readouterr().err.count(remedy) == 2


@pytest.mark.parametrize(("status", "body"), PASSING)
def test_passing_answer_is_waited_for_at_the_end(
    server: Any, sleeps: list[float], capsys: pytest.CaptureFixture[str], status: int, body: str
) -> None:
    server.status, server.body = status, body
    tracker = start_tracking(TrackingConfig(uri=server.url), run_id="r", stage="sft", params={})
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("FINISHED")
    limit = MlflowTracker.UNREACHED_WAIT_SECONDS
    assert limit - 2 <= sum(sleeps) <= limit
    err = capsys.readouterr().err
    assert err.count("MLflow could not be used") == 1 and "correct" not in err and "ask for" not in err


# --- on a real store ---


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    return TrackingConfig(uri=database_uri(new_database(tmp_path_factory.mktemp("answers"))))


@pytest.fixture
def client(config: TrackingConfig) -> MlflowClient:
    return MlflowClient(tracking_uri=config.uri)


def test_deleted_experiment_is_named(
    config: TrackingConfig, client: MlflowClient, sleeps: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    config = config.model_copy(update={"experiment": "old"})
    client.delete_experiment(client.create_experiment("old"))
    start_tracking(config, run_id="r", stage="sft", params={}).finish("FINISHED")
    assert "restore what was deleted, or set tracking.experiment to another name than old" in capsys.readouterr().err
    assert sleeps == []


def test_run_that_is_deleted_meanwhile_is_given_up(
    config: TrackingConfig, client: MlflowClient, sleeps: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = start_tracking(config, run_id="deleted", stage="sft", params={})
    assert isinstance(tracker, MlflowTracker) and tracker._run
    client.delete_run(tracker._run.id)
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("FINISHED")
    err = capsys.readouterr().err
    assert "restore what was deleted" in err and "1 points and 0 files" in err and sleeps == []


def test_refused_value_does_not_block_the_rest(
    config: TrackingConfig,
    client: MlflowClient,
    sleeps: list[float],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    tracker = start_tracking(config, run_id="partly", stage="sft", params={})
    assert isinstance(tracker, MlflowTracker) and tracker._run
    (tmp_path / "report.md").write_text("# x\n", encoding="utf-8")
    (tmp_path / "latin.md").write_bytes(b"\xe4")
    tracker.log_file(tmp_path / "latin.md")  # no UTF-8
    tracker.log_file(tmp_path / "report.md")
    tracker.log({"kl": 1.0}, 1)
    tracker.finish("FINISHED")
    run = client.get_run(tracker._run.id)
    assert run.data.metrics == {"kl": 1.0} and run.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report.md"]
    assert capsys.readouterr().err.count("MLflow could not be used") == 1 and sleeps == []


@pytest.mark.parametrize("kind", ["missing folder", "a folder", "a file above"])
def test_file_that_cannot_be_a_database_costs_no_time(
    sleeps: list[float], capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    (tmp_path / "file").touch()
    file = {"missing folder": tmp_path / "none" / "db", "a folder": tmp_path, "a file above": tmp_path / "file" / "db"}[
        kind
    ]
    start_tracking(TrackingConfig(uri=f"sqlite:///{file}"), run_id="r", stage="sft", params={}).finish("FINISHED")
    err = capsys.readouterr().err
    assert "cannot be a database" in err and "correct tracking.uri" in err and sleeps == []


def test_database_of_another_version_is_named_with_its_upgrade(
    sleeps: list[float], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = new_database(tmp_path)
    with sqlite3.connect(file) as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    start_tracking(TrackingConfig(uri=database_uri(file)), run_id="r", stage="sft", params={}).finish("FINISHED")
    assert "upgrade the database with: mlflow db upgrade" in capsys.readouterr().err and sleeps == []
