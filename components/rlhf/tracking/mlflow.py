"""Tracking in MLflow: one parent run per pipeline run, one nested run per stage. MLflow errors never fail a stage.

The MLflow plugin of Kubeflow Pipelines 2.17 makes these runs itself and passes the nested one to each task in MLFLOW_RUN_ID
(backend/src/v2/common/plugins/mlflow/handler.go); such a run is joined, and no other is made.
"""

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
STAGE_TAG, ERROR_TAG, PARENT_TAG = "rlhf.stage", "rlhf.error", "mlflow.parentRunId"
SQLITE = "sqlite:///"
MANUAL_RUN_ID = "manual"  # of stages without RLHF_RUN_ID; they are unrelated to each other


class Tracker(Protocol):
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_file(self, path: Path, name: str = "") -> None:
        """Log a text file, under its own name or another one."""

    def flush(self) -> None:
        """Send buffered metrics; called before a checkpoint, so that a resumed run has no gaps in its curves."""

    def finish(self, status: str, error: str = "") -> None:
        """End the run with status FINISHED or FAILED, and the error of a failed stage."""


class NullTracker:
    """A tracker that logs nothing, for runs without tracking."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        return

    def log_file(self, path: Path, name: str = "") -> None:
        return

    def flush(self) -> None:
        return

    def finish(self, status: str, error: str = "") -> None:
        return


class MlflowTracker:
    """A nested MLflow run. Metrics are buffered while the server is unreachable."""

    FLUSH_SECONDS = 5.0  # metrics are batched, because each request takes about 50 ms
    RETRY_SECONDS = 30.0  # between requests to a failing server, each of which may take seconds to time out
    WAIT_SECONDS = 60.0  # at the end of a stage, for a server that has responded before and is probably restarting
    UNREACHED_WAIT_SECONDS = 20.0  # at the end of a stage, for a server that has never responded
    PAUSE_SECONDS = 1.0

    def __init__(self, open_run: Callable[[], "OpenRun"]) -> None:
        """open_run finds or creates the nested run; it is called immediately, and again if it fails."""
        self._open_run = open_run
        self._run: OpenRun | None = None
        self._points: list[Any] = []
        self._files: list[tuple[Path, str]] = []
        self._flushed = time.monotonic()
        self._unreachable_since: float | None = None
        self._send(lambda run: None)

    def log(self, metrics: Mapping[str, float], step: int, milliseconds: int | None = None) -> None:
        """milliseconds is the time of the metrics since 1970, by default the current time."""
        from mlflow.entities import Metric

        at = int(time.time() * 1000) if milliseconds is None else milliseconds
        self._points += [Metric(name, float(value), at, step) for name, value in metrics.items()]
        if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            self.flush()

    def log_file(self, path: Path, name: str = "") -> None:
        self._files.append((path, name or path.name))
        self.flush()

    def finish(self, status: str, error: str = "") -> None:
        """Send the rest and end the run. Waits for an unreachable server unless the stage has failed and will be retried."""
        wait = 0.0 if status != "FINISHED" else self.WAIT_SECONDS if self._run else self.UNREACHED_WAIT_SECONDS
        deadline = time.monotonic() + wait
        is_waiting = False
        while True:
            if self._unreachable_since is not None:
                self._unreachable_since = -math.inf  # retry immediately
            self.flush()
            self._send(lambda run: _end(run, status, error))
            if self._unreachable_since is None or time.monotonic() + self.PAUSE_SECONDS > deadline:
                break
            if not is_waiting:
                print(f"waiting up to {wait:.0f} s for MLflow", file=sys.stderr, flush=True)
                is_waiting = True
            time.sleep(self.PAUSE_SECONDS)
        if self._points or self._files:
            lost = f"{len(self._points)} points and {len(self._files)} files"
            print(f"warning: {lost} of this stage were not logged to MLflow", file=sys.stderr, flush=True)

    def flush(self) -> None:
        self._flushed = time.monotonic()

        def send(run: OpenRun) -> None:
            # Steps that are repeated after a resume have been logged by an earlier attempt.
            self._points = [point for point in self._points if point.step > run.last_steps.get(point.key, -1)]
            while self._points:  # MLflow ignores duplicate points, which are sent if a response was lost
                batch = self._points[:1000]  # the server's limit for one request
                run.client.log_batch(run.id, metrics=batch)
                del self._points[: len(batch)]
            while self._files:
                path, name = self._files[0]
                if path.exists():  # a deleted file must not block the rest
                    run.client.log_text(run.id, path.read_text(encoding="utf-8"), name)
                del self._files[0]

        self._send(send)

    def _send(self, call: Callable[["OpenRun"], object]) -> None:
        if self._unreachable_since is not None and time.monotonic() - self._unreachable_since < self.RETRY_SECONDS:
            return
        try:
            self._run = self._run or self._open_run()
            call(self._run)
        except Exception as error:  # MLflow must not fail a stage
            if self._unreachable_since is None:
                warn(error)
            self._unreachable_since = time.monotonic()
        else:
            self._unreachable_since = None


@dataclass(frozen=True)
class OpenRun:
    client: Any
    id: str
    last_steps: Mapping[str, int] = field(default_factory=dict)  # metric -> last step that an earlier attempt logged


@dataclass(frozen=True)
class ParentRun:
    """The parent run of a pipeline run."""

    id: str
    experiment_id: str
    plugin_run: Any = None  # the nested run that Kubeflow Pipelines made for this task, if it did


def _end(run: OpenRun, status: str, error: str) -> None:
    if error:
        run.client.set_tag(run.id, ERROR_TAG, redact(error)[:5000])  # the server's limit for a tag
    run.client.set_terminated(run.id, status)


def with_environment_uri(config: TrackingConfig) -> TrackingConfig:
    """The settings with uri defaulting to MLFLOW_TRACKING_URI, which comes from a Secret on a cluster."""
    return config if config.uri else config.model_copy(update={"uri": os.environ.get("MLFLOW_TRACKING_URI") or None})


def start_tracking(config: TrackingConfig, *, run_id: str, stage: str, params: Mapping[str, Any]) -> Tracker:
    """The tracker of one stage. Its run is nested in the parent run with this run_id, which is created if necessary."""
    if not config.enabled or not config.uri:
        return NullTracker()
    return MlflowTracker(lambda: _open_run(config, run_id, stage, params))


def _open_run(config: TrackingConfig, run_id: str, stage: str, params: Mapping[str, Any]) -> OpenRun:
    assert config.uri
    client = connect(config.uri)
    parent = find_parent_run(client, config, run_id)
    tags = {STAGE_TAG: stage, RUN_ID_TAG: f"{run_id}/{stage}"}
    if parent.plugin_run is not None:
        if parent.plugin_run.data.tags.get(RUN_ID_TAG):
            return _reopen(client, parent.plugin_run)
        for key, value in tags.items():
            client.set_tag(parent.plugin_run.info.run_id, key, value)
        id = parent.plugin_run.info.run_id
    else:
        if run_id != MANUAL_RUN_ID:  # resume the run of an earlier attempt at this stage, and with it the curves
            for earlier in _search_runs(client, parent.experiment_id, f"{run_id}/{stage}", max_results=10):
                if earlier.info.status != "FINISHED":
                    return _reopen(client, earlier)
        run = client.create_run(parent.experiment_id, run_name=stage, tags={PARENT_TAG: parent.id, **tags})
        id = run.info.run_id
    from mlflow.entities import Param

    mlflow_params = [Param(key, redact(str(value))[:6000]) for key, value in flatten(params).items()]
    for start in range(0, len(mlflow_params), 100):  # the server's limits: 100 params per request, 6000 characters each
        client.log_batch(id, params=mlflow_params[start : start + 100])
    return OpenRun(client, id)


def _reopen(client: Any, run: Any) -> OpenRun:
    """Continue the run of an earlier attempt."""
    client.update_run(run.info.run_id, status="RUNNING")
    if ERROR_TAG in run.data.tags:
        client.delete_tag(run.info.run_id, ERROR_TAG)
    return OpenRun(client, run.info.run_id, _last_steps(client, run))


def _search_runs(client: Any, experiment_id: str, run_id: str, *, max_results: int) -> Any:
    filter_string = f"tags.`{RUN_ID_TAG}` = '{run_id}'"
    return client.search_runs([experiment_id], filter_string=filter_string, max_results=max_results)


def _last_steps(client: Any, run: Any) -> dict[str, int]:
    return {
        name: max(point.step for point in client.get_metric_history(run.info.run_id, name)) for name in run.data.metrics
    }


def connect(uri: str) -> Any:
    """An MLflow client that gives up on an unreachable server in seconds instead of minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the address is internal to the cluster
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import logging

    from mlflow import MlflowClient

    # After the import, which configures these loggers.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def find_parent_run(client: Any, config: TrackingConfig, run_id: str) -> ParentRun:
    """The parent run with this run_id. The first stage creates it, unless Kubeflow Pipelines has."""
    plugin_run = _plugin_run(client)
    if plugin_run is not None:
        parent_id = plugin_run.data.tags[PARENT_TAG]
        client.set_tag(parent_id, RUN_ID_TAG, run_id)
        return ParentRun(parent_id, plugin_run.info.experiment_id, plugin_run)
    experiment_id = _experiment_id(client, config)
    for run in _search_runs(client, experiment_id, run_id, max_results=1):
        return ParentRun(str(run.info.run_id), experiment_id)
    run = client.create_run(experiment_id, run_name=run_id, tags={RUN_ID_TAG: run_id})
    return ParentRun(str(run.info.run_id), experiment_id)


def _plugin_run(client: Any) -> Any:
    """The nested run in MLFLOW_RUN_ID, or None. A run without a parent is not one of the plugin."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id:
        return None
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # a run of another server than tracking.uri
            return None
        raise
    return run if PARENT_TAG in run.data.tags else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Convert nested settings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def warn(error: Exception) -> None:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    print(f"warning: MLflow could not be used, continuing without it ({reason})", file=sys.stderr, flush=True)


def _experiment_id(client: Any, config: TrackingConfig) -> str:
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = None
    if config.uri and config.uri.startswith(SQLITE):
        # Next to the database; MLflow's default is the working directory.
        location = (Path(config.uri.removeprefix(SQLITE)).resolve().parent / "mlflow-files").as_uri()
    try:
        return str(client.create_experiment(config.experiment, artifact_location=location))
    except Exception:  # another stage has created it concurrently
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            raise
        return str(experiment.experiment_id)
