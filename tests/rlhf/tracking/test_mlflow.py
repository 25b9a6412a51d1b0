import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.rlhf.artifacts.manifest import write_manifest
from components.rlhf.config.storage import TrackingConfig
from components.rlhf.tracking.machine import MachineSampler
from components.rlhf.tracking.mlflow import MlflowTracker, NullTracker, Tracker, start_tracking
from components.rlhf.tracking.parent import open_parent
from components.rlhf.tracking.runs import OpenRun, flatten
from components.rlhf.tracking.tables import DataSet, data_sets_of
from tests.support.mlflow_database import default_database, new_database

EXPERIMENT = "tests"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one database for all tests."""
    folder = tmp_path_factory.mktemp("mlflow")
    new_database(folder)
    return folder


@pytest.fixture
def tracking(folder: Path) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{folder / 'mlflow.db'}", experiment=EXPERIMENT)


@pytest.fixture
def client(tracking: TrackingConfig) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking.uri)


def runs_of(client: MlflowClient, run_id: str) -> tuple[list[Any], list[Any]]:
    """Parent runs with this run id, and their nested runs."""
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    parents = client.search_runs([experiment], filter_string=f"tags.`rlhf.run_id` = '{run_id}'")
    nested = [
        run
        for parent in parents
        for run in client.search_runs([experiment], filter_string=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    ]
    return parents, nested


def test_each_stage_has_a_nested_run(tracking: TrackingConfig, client: MlflowClient, folder: Path) -> None:
    for stage, status in (("sft", "FINISHED"), ("ppo", "FAILED")):
        tracker = start_tracking(tracking, run_id="run-1", stage=stage, params={"seed": 3, "sft": {"use": None}})
        assert isinstance(tracker, MlflowTracker)
        tracker.finish(status)
    start_tracking(tracking, run_id="run-10", stage="sft", params={}).finish("FINISHED")

    parents, nested = runs_of(client, "run-1")
    assert [parent.info.run_name for parent in parents] == ["run-1"]
    assert {run.info.run_name: run.info.status for run in nested} == {"sft": "FINISHED", "ppo": "FAILED"}
    assert {run.data.tags["rlhf.stage"] for run in nested} == {"sft", "ppo"}
    assert nested[0].data.params == {"seed": "3", "sft.use": "None"}
    assert parents[0].info.status == "RUNNING"
    start_tracking(tracking, run_id="run-1", stage="report", params={}).log_file(Path(__file__), "report.md")
    assert (folder / "mlflow-files").is_dir()  # next to the database, not in the working directory


def test_many_params_are_logged_in_batches(tracking: TrackingConfig, client: MlflowClient) -> None:
    params = {f"p{number}": number for number in range(205)} | {"long": "x" * 9000}
    start_tracking(tracking, run_id="params", stage="sft", params=params).finish("FINISHED")
    (run,) = runs_of(client, "params")[1]
    assert len(run.data.params) == 206
    assert run.data.params["p204"] == "204"
    assert run.data.params["long"] == "x" * 6000


def test_metrics_are_buffered_and_sent_at_the_end(tracking: TrackingConfig, client: MlflowClient) -> None:
    tracker = start_tracking(tracking, run_id="metrics", stage="sft", params={})
    for step in range(1, 4):
        tracker.log({"train/loss": 1 / step, "train/n": step}, step)
    (run,) = runs_of(client, "metrics")[1]
    assert run.data.metrics == {}
    tracker.finish("FINISHED")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert client.get_run(run.info.run_id).data.metrics["train/n"] == 3


def test_files_are_logged(tracking: TrackingConfig, client: MlflowClient, tmp_path: Path) -> None:
    tracker = start_tracking(tracking, run_id="files", stage="sft", params={})
    (tmp_path / "summary.md").write_text("# x\n", encoding="utf-8")
    tracker.log_file(tmp_path / "summary.md")
    tracker.log_file(tmp_path / "summary.md", "report.html")
    tracker.finish("FINISHED")
    (run,) = runs_of(client, "files")[1]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report.html", "summary.md"]


# --- MLflow errors never fail a stage ---


class FakeClient:
    """Records its calls; raises if is_broken."""

    def __init__(self) -> None:
        self.is_broken = False
        self.batches: list[int] = []
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.is_broken:
            raise ConnectionError("the server is gone\nand more lines of detail")

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self._call("log_batch")
        self.batches.append(len(metrics))

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self._call("log_text")

    def set_terminated(self, run_id: str, status: str) -> None:
        self._call(f"set_terminated {status}")


def test_metrics_are_sent_in_batches_of_1000() -> None:
    client = FakeClient()
    tracker = MlflowTracker(lambda: OpenRun(client, "x"))
    tracker.log({f"m{number}": 0.0 for number in range(2500)}, 1)
    assert client.calls == []
    tracker.finish("FINISHED")
    assert client.batches == [1000, 1000, 500]
    assert client.calls[-1] == "set_terminated FINISHED"


def test_metrics_are_sent_at_the_flush_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient()
    tracker = MlflowTracker(lambda: OpenRun(client, "x"))
    now = time.monotonic()
    for seconds, sent in ((1, []), (4, []), (6, [3]), (7, [3]), (12, [3, 2])):
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: now + seconds)
        tracker.log({"loss": 1.0}, seconds)
        assert client.batches == sent
    tracker.finish("FINISHED")
    assert sum(client.batches) == 5


def test_server_failure_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = FakeClient()
    tracker = MlflowTracker(lambda: OpenRun(client, "x"))
    tracker.FLUSH_SECONDS = -1.0
    tracker.log({"loss": 1.0}, 1)
    client.is_broken = True
    for step in range(2, 5):
        tracker.log({"loss": 1.0}, step)
    tracker.log_file(tmp_path / "deleted")
    tracker.finish("FAILED")
    # Only one retry, at the end, because each request may take seconds to fail.
    assert client.calls == ["log_batch", "log_batch", "log_batch"]
    assert capsys.readouterr().err == (
        "warning: MLflow could not be used, continuing without it (the server is gone)\n"
        "warning: 3 points and 1 files of this stage were not logged to MLflow\n"
    )


def test_buffered_metrics_are_sent_when_server_is_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    client = FakeClient()
    tracker = MlflowTracker(lambda: OpenRun(client, "x", {"loss": 1}))
    tracker.FLUSH_SECONDS = -1.0
    client.is_broken = True
    tracker.log({"loss": 1.0}, 1)  # logged by an earlier attempt
    tracker.log({"loss": 1.0, "kl": 0.5}, 2)
    (tmp_path / "x").touch()
    tracker.log_file(tmp_path / "x")
    client.is_broken = False
    tracker.log({"loss": 1.0}, 3)  # too early for a retry
    assert client.batches == []
    tracker.RETRY_SECONDS = 0.0
    tracker.log({"loss": 1.0}, 4)
    assert client.batches == [4]
    assert client.calls[-1] == "log_text"
    tracker.finish("FINISHED")
    assert client.calls[-1] == "set_terminated FINISHED"
    assert "not logged" not in capsys.readouterr().err


def fake_clock(monkeypatch: pytest.MonkeyPatch, client: FakeClient, *, back_after: float) -> list[float]:
    """Replace the clock by one that only sleep() advances; client is broken for back_after seconds. Returns the sleeps."""
    start, sleeps = time.monotonic(), list[float]()

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        client.is_broken = sum(sleeps) < back_after

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: start + sum(sleeps))
    client.is_broken = True
    return sleeps


def test_finish_waits_for_a_restarting_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = FakeClient()
    tracker = MlflowTracker(lambda: OpenRun(client, "x"))
    sleeps = fake_clock(monkeypatch, client, back_after=45)
    (tmp_path / "x").touch()
    tracker.log_file(tmp_path / "x")
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("FINISHED")
    assert 45 <= sum(sleeps) < 47
    assert client.batches == [1]
    assert client.calls[-2:] == ["log_text", "set_terminated FINISHED"]
    assert "not logged" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "is_reachable", "limit"), [("FINISHED", True, 60), ("FINISHED", False, 20), ("FAILED", True, 0)]
)
def test_finish_stops_waiting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: str, is_reachable: bool, limit: int
) -> None:
    client = FakeClient()

    def open_run() -> OpenRun:
        if not is_reachable:
            raise ConnectionError("unreachable")
        return OpenRun(client, "x")

    tracker = MlflowTracker(open_run)
    sleeps = fake_clock(monkeypatch, client, back_after=1000)
    tracker.log({"loss": 1.0}, 1)
    tracker.finish(status)
    assert limit - 2 <= sum(sleeps) <= limit
    err = capsys.readouterr().err
    assert "1 points and 0 files of this stage were not logged" in err
    assert err.count("waiting up to") == err.count(f"waiting up to {limit} s for MLflow\n") == (limit > 0)


def test_deleted_file_does_not_block_other_data(tmp_path: Path) -> None:
    client = FakeClient()
    tracker = MlflowTracker(lambda: OpenRun(client, "x"))
    (tmp_path / "existing").touch()
    tracker.log_file(tmp_path / "deleted")
    tracker.log_file(tmp_path / "existing")
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("FINISHED")
    assert client.calls == ["log_text", "log_batch", "set_terminated FINISHED"]


def test_server_may_become_reachable_after_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    client, calls = FakeClient(), []

    def open_run() -> OpenRun:
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("not yet")
        return OpenRun(client, "x")

    tracker = MlflowTracker(open_run)
    tracker.RETRY_SECONDS = tracker.FLUSH_SECONDS = -1.0
    for step in (1, 2, 3):
        tracker.log({"loss": 1.0}, step)
    assert len(calls) == 3 and client.batches == [2, 1]
    assert capsys.readouterr().err.count("not yet") == 1


def use(tracker: Tracker) -> None:
    tracker.log({"loss": 1.0}, 1)
    tracker.log_file(Path("/no/such/file"))
    tracker.finish("FINISHED")


def test_unreachable_server_costs_only_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MlflowTracker, "UNREACHED_WAIT_SECONDS", 0.0)
    started = time.monotonic()
    tracker = start_tracking(TrackingConfig(uri="http://127.0.0.1:9"), run_id="x", stage="sft", params={"a": 1})
    assert time.monotonic() - started < 20
    use(tracker)
    assert time.monotonic() - started < 40
    err = capsys.readouterr().err
    assert err.startswith("warning: MLflow could not be used, continuing without it (")
    assert "127.0.0.1:9" in err and "1 points and 1 files of this stage were not logged" in err and err.count("\n") == 2


@pytest.mark.parametrize("uri", ["nonsense://x", "sqlite:///{file}/mlflow.db"])
def test_invalid_uri_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MlflowTracker, "UNREACHED_WAIT_SECONDS", 0.0)
    (tmp_path / "file").touch()
    config = TrackingConfig(uri=uri.format(file=tmp_path / "file"))
    use(start_tracking(config, run_id="x", stage="sft", params={}))
    assert open_parent(config, "x") is None
    assert capsys.readouterr().err.count("warning: MLflow could not be used") == 2


@pytest.mark.parametrize("config", [TrackingConfig(), TrackingConfig(uri="http://127.0.0.1:9", enabled=False)])
def test_tracking_can_be_disabled(config: TrackingConfig, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = start_tracking(config, run_id="x", stage="sft", params={})
    assert isinstance(tracker, NullTracker)
    use(tracker)
    assert open_parent(config, "x") is None
    assert capsys.readouterr().err == ""


def test_flatten_joins_keys_with_dots() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": [1], "f": {}}) == {"a.b.c": 1, "a.d": None, "e": [1]}


def test_second_attempt_resumes_curves_of_the_first(tracking: TrackingConfig, client: MlflowClient) -> None:
    first = start_tracking(tracking, run_id="resumed", stage="ppo", params={"processes": 1})
    for step in (1, 2, 3):
        first.log({"score": step / 4}, step)
    first.flush()  # then the stage is killed; its checkpoint is of step 2
    second = start_tracking(tracking, run_id="resumed", stage="ppo", params={"processes": 2})
    for step in (3, 4):
        second.log({"score": step / 4}, step)
    second.log({"final/score": 1.0}, 0)
    second.finish("FINISHED")

    _, nested = runs_of(client, "resumed")
    assert [(run.info.run_name, run.info.status) for run in nested] == [("ppo", "FINISHED")]
    history = client.get_metric_history(nested[0].info.run_id, "score")
    assert [(point.step, point.value) for point in history] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    assert nested[0].data.metrics["final/score"] == 1.0
    third = start_tracking(tracking, run_id="resumed", stage="ppo", params={})
    third.finish("FINISHED")
    assert len(runs_of(client, "resumed")[1]) == 2  # a finished run is not resumed


# --- data sets, tables and the machine ---


def test_tables_grow_and_repeat_no_row(tracking: TrackingConfig, client: MlflowClient, tmp_path: Path) -> None:
    """By two attempts, the second of which repeats an evaluation."""
    rows = [{"iteration": step, "response": f"it's {step}", "score": step / 2, "none": None} for step in range(3)]
    for part in (rows[:2], rows[1:]):
        tracker = start_tracking(tracking, run_id="table", stage="ppo", params={})
        tracker.log({"loss": 1.0}, 1)
        tracker.log_table("samples", part)
        tracker.log_table("others", [{"x": 1.0}])
        tracker.flush()
    (run,) = runs_of(client, "table")[1]
    path = Path(client.download_artifacts(run.info.run_id, "samples.json", str(tmp_path)))
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "columns": ["iteration", "response", "score", "none"],
        "data": [[0, "it's 0", 0.0, None], [1, "it's 1", 0.5, None], [2, "it's 2", 1.0, None]],
    }
    tables = [{"path": "samples.json", "type": "table"}, {"path": "others.json", "type": "table"}]
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == tables
    with default_database(str(tracking.uri)):
        table = client.load_table(run.info.experiment_id, "samples.json", run_ids=[run.info.run_id])
    assert list(table["score"]) == [0.0, 0.5, 1.0]


def test_images_are_logged_as_they_are(tracking: TrackingConfig, client: MlflowClient, tmp_path: Path) -> None:
    image = bytes(range(256))
    (tmp_path / "curves").write_bytes(image)
    tracker = start_tracking(tracking, run_id="image", stage="ppo", params={})
    tracker.log_file(tmp_path / "curves", "curves.png")
    tracker.finish("FINISHED")
    (run,) = runs_of(client, "image")[1]
    assert Path(client.download_artifacts(run.info.run_id, "curves.png", str(tmp_path))).read_bytes() == image


def test_only_data_sets_among_the_inputs_are_logged(tmp_path: Path) -> None:
    for name, kind in (("model", "sft_model"), ("data", "preferences")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("{}\n", encoding="utf-8")
        write_manifest(tmp_path / name, kind=kind, facts={"num_train": 1, "num_heldout": 2, "loss": 0.5})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{", encoding="utf-8")
    paths = {name: tmp_path / name for name in ("model", "data", "broken", "missing")}
    (found,) = data_sets_of(paths, {"data": "s3://bucket/data"})
    digest = hashlib.sha256(b"{}\n").hexdigest()
    assert found == DataSet("data", "train", digest, 1, "s3://bucket/data/train.jsonl")


def test_stage_run_says_what_it_runs_on(tracking: TrackingConfig, client: MlflowClient) -> None:
    start_tracking(tracking, run_id="machine", stage="ppo", params={}).finish("FINISHED")
    (run,) = runs_of(client, "machine")[1]
    tags = run.data.tags
    assert f"torch {importlib.metadata.version('torch')}" in tags["rlhf.packages"]
    assert tags["rlhf.cpu"].endswith(f"{os.cpu_count()} cores") and tags["rlhf.memory"].endswith("GiB")
    assert tags["rlhf.code_revision"].startswith(tags["mlflow.source.git.commit"])
    assert "PPO" in tags["mlflow.note.content"] or "README" in tags["mlflow.note.content"]


def test_system_metrics_continue_those_of_an_earlier_attempt(tracking: TrackingConfig, client: MlflowClient) -> None:
    for values in ((1.0, 2.0), (3.0,)):
        tracker = start_tracking(tracking, run_id="system", stage="ppo", params={})
        assert isinstance(tracker, MlflowTracker)
        for value in values:
            tracker.log_system({"system/cpu_utilization_percentage": value})
        tracker.flush()
    (run,) = runs_of(client, "system")[1]
    history = client.get_metric_history(run.info.run_id, "system/cpu_utilization_percentage")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 2.0), (2, 3.0)]


def test_machine_is_sampled_with_the_processes_of_the_stage() -> None:
    psutil = pytest.importorskip("psutil")
    size = 200 * 2**20
    code = f"data = b'x' * {size}; input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
        deadline = time.monotonic() + 20
        while psutil.Process(child.pid).memory_info().rss < size and time.monotonic() < deadline:
            time.sleep(0.02)
        found = MachineSampler(child.pid).sample()
        child.kill()
    assert 200 < found["system/stage_memory_megabytes"] < 300
    assert 0 <= found["system/cpu_utilization_percentage"] <= 100
    assert not any("gpu" in name for name in found) or Path("/proc/driver/nvidia").exists()
