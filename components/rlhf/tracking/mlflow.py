"""MLflow: one parent run a pipeline run, one nested run a stage. Tracking never fails training."""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.text.redaction import redact

RUN_ID_TAG = "rlhf.run_id"
SQLITE = "sqlite:///"
MANUAL_RUN_ID = "by-hand"  # the run id of stages that nobody gave one: they have nothing to do with each other


class Tracker(Protocol):
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_file(self, path: Path) -> None: ...

    def flush(self) -> None:
        """Send what has been logged: a checkpoint must not know of a step that the curves lack."""
        ...

    def finish(self, status: str) -> None:
        """status is FINISHED or FAILED."""
        ...


class NullTracker:
    """Tracks nothing: tracking is off, or its server could not be reached."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        return

    def log_file(self, path: Path) -> None:
        return

    def flush(self) -> None:
        return

    def finish(self, status: str) -> None:
        return


class MlflowTracker:
    """A nested MLflow run. A server that is away costs no point: they wait here, and go out when it answers again."""

    FLUSH_SECONDS = 5.0  # one request for many points; a single metric takes 50 ms
    RETRY_SECONDS = 30.0  # until a server that failed is asked again: each request may take its time to fail
    WAIT_SECONDS = 60.0  # at the end of a stage, for a server that this stage has reached: they restart in less
    UNREACHED_WAIT_SECONDS = 20.0  # for one that has never answered: it may not be there at all
    PAUSE_SECONDS = 1.0

    def __init__(self, find_run: Callable[[], "OpenRun"]) -> None:
        """find_run finds or makes the nested run, and may fail; it is asked now, and again until it has succeeded."""
        self._open_run = find_run
        self._run: OpenRun | None = None
        self._points: list[Any] = []
        self._files: list[Path] = []
        self._flushed = time.monotonic()
        self._unreachable_since: float | None = None
        self._send(lambda run: None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._points += [Metric(name, float(value), now, step) for name, value in metrics.items()]
        if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            self.flush()

    def log_file(self, path: Path) -> None:
        self._files.append(path)
        self.flush()

    def finish(self, status: str) -> None:
        """Send what is left, and wait for a server that is away; a stage that failed does not, because it is run again."""
        wait = 0.0 if status != "FINISHED" else self.WAIT_SECONDS if self._run else self.UNREACHED_WAIT_SECONDS
        deadline = time.monotonic() + wait
        said = False
        while True:
            if self._unreachable_since is not None:
                self._unreachable_since = -math.inf  # ask now
            self.flush()
            self._send(lambda run: run.client.set_terminated(run.id, status))
            if self._unreachable_since is None or time.monotonic() + self.PAUSE_SECONDS > deadline:
                break
            if not said:
                print(f"waiting up to {wait:.0f} s for MLflow", file=sys.stderr, flush=True)
                said = True
            time.sleep(self.PAUSE_SECONDS)
        if self._points or self._files:
            warn_lost(len(self._points), len(self._files))

    def flush(self) -> None:
        self._flushed = time.monotonic()

        def send(run: OpenRun) -> None:
            # A step that is made again has the same value, and one point.
            self._points = [point for point in self._points if point.step > run.logged.get(point.key, -1)]
            while self._points:  # sending one twice, when an answer was lost, makes no second point
                part = self._points[:1000]  # the server's limit for one request
                run.client.log_batch(run.id, metrics=part)
                del self._points[: len(part)]
            while self._files:
                if self._files[0].exists():  # one that is gone must not keep the rest from the server
                    run.client.log_artifact(run.id, str(self._files[0]))
                del self._files[0]

        self._send(send)

    def _send(self, call: Callable[["OpenRun"], object]) -> None:
        if self._unreachable_since is not None and time.monotonic() - self._unreachable_since < self.RETRY_SECONDS:
            return
        try:
            self._run = self._run or self._open_run()
            call(self._run)
        except Exception as error:  # tracking never fails training
            if self._unreachable_since is None:
                warn(error)
            self._unreachable_since = time.monotonic()
        else:
            self._unreachable_since = None


@dataclass(frozen=True)
class OpenRun:
    client: Any
    id: str
    # metric -> the last step that an attempt before this one logged
    logged: Mapping[str, int] = field(default_factory=dict)


def with_environment_uri(config: TrackingConfig) -> TrackingConfig:
    """The settings with MLFLOW_TRACKING_URI where they name no server: on a cluster it comes from a Secret."""
    return config if config.uri else config.model_copy(update={"uri": os.environ.get("MLFLOW_TRACKING_URI") or None})


def start_tracking(config: TrackingConfig, *, run_id: str, stage: str, params: Mapping[str, Any]) -> Tracker:
    """The tracker of one stage: nested in the parent run that carries run_id, which is made if it is not there."""
    if not config.enabled or not config.uri:
        return NullTracker()
    return MlflowTracker(lambda: _open_run(config, run_id, stage, params))


def _open_run(config: TrackingConfig, run_id: str, stage: str, params: Mapping[str, Any]) -> OpenRun:
    assert config.uri
    client = connect(config.uri)
    experiment_id = _experiment(client, config)
    parent_id = parent_run(client, experiment_id, run_id)
    tags = {"mlflow.parentRunId": parent_id, "rlhf.stage": stage, RUN_ID_TAG: f"{run_id}/{stage}"}
    if run_id != MANUAL_RUN_ID and (begun := _find_unfinished_run(client, experiment_id, f"{run_id}/{stage}")):
        client.update_run(begun, status="RUNNING")
        return OpenRun(client, begun, _last_steps(client, begun))
    run = client.create_run(experiment_id, run_name=stage, tags=tags)
    from mlflow.entities import Param

    flat = [Param(key, redact(str(value))[:6000]) for key, value in flatten(params).items()]
    for start in range(0, len(flat), 100):  # the server's limits: 100 parameters a request, 6000 characters each
        client.log_batch(run.info.run_id, params=flat[start : start + 100])
    return OpenRun(client, run.info.run_id)


def _find_unfinished_run(client: Any, experiment_id: str, run_id: str) -> str | None:
    """The run of an attempt at this stage that did not end well: its curves go on."""
    found = client.search_runs([experiment_id], filter_string=f"tags.`{RUN_ID_TAG}` = '{run_id}'", max_results=10)
    return next((str(run.info.run_id) for run in found if run.info.status != "FINISHED"), None)


def _last_steps(client: Any, mlflow_run: str) -> dict[str, int]:
    names = client.get_run(mlflow_run).data.metrics
    return {name: max(point.step for point in client.get_metric_history(mlflow_run, name)) for name in names}


def finish_parent_run(
    config: TrackingConfig, *, run_id: str, status: str, metrics: Mapping[str, float], files: list[Path]
) -> None:
    """End the parent run with its final status; metrics and files on it let people compare whole runs."""
    if not config.enabled or not config.uri:
        return
    try:
        client = connect(config.uri)
        parent_id = parent_run(client, _experiment(client, config), run_id)
        for name, value in metrics.items():
            client.log_metric(parent_id, name, value)
        for path in files:
            client.log_artifact(parent_id, str(path))
        client.set_terminated(parent_id, status)
    except Exception as error:  # tracking never fails a run
        warn(error)


def connect(uri: str) -> Any:
    """An MLflow client that gives up on a dead server in seconds, not in minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import logging

    from mlflow import MlflowClient

    # After the import, which sets up loggers of its own.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def parent_run(client: Any, experiment_id: str, run_id: str) -> str:
    """MLflow's id of the parent run tagged with our run id; the first stage that asks makes it."""
    found = client.search_runs([experiment_id], filter_string=f"tags.`{RUN_ID_TAG}` = '{run_id}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    return str(client.create_run(experiment_id, run_name=run_id, tags={RUN_ID_TAG: run_id}).info.run_id)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def warn(error: Exception) -> None:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    print(f"warning: MLflow could not be used, going on without it ({reason})", file=sys.stderr, flush=True)


def warn_lost(points: int, files: int) -> None:
    print(f"warning: MLflow lacks {points} points and {files} files of this stage", file=sys.stderr, flush=True)


def _experiment(client: Any, config: TrackingConfig) -> str:
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = None
    if config.uri and config.uri.startswith(SQLITE):
        # Files beside the database; MLflow's own default would be a folder wherever the process happens to stand.
        location = (Path(config.uri.removeprefix(SQLITE)).resolve().parent / "mlflow-files").as_uri()
    try:
        return str(client.create_experiment(config.experiment, artifact_location=location))
    except Exception:  # another stage made it in the meantime
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            raise
        return str(experiment.experiment_id)
