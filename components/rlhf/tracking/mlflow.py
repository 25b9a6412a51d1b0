"""Tracking of a stage in its MLflow run. MLflow errors never fail a stage: an outage is waited for only at its end, a refusal never."""

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.text.redaction import redact
from components.rlhf.tracking.answers import concerns_content, is_permanent, warn
from components.rlhf.tracking.machine import describe_machine
from components.rlhf.tracking.runs import ERROR_TAG, MAX_TAG_CHARS, OpenRun, open_run
from components.rlhf.tracking.tables import Cell, DataSet, add_to_table, as_inputs
from components.rlhf.tracking.texts import key_of


class Tracker(Protocol):
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_file(self, path: Path, name: str = "") -> None:
        """Log a text file or an image, under its own name or another one."""

    def log_text(self, name: str, text: str) -> None:
        """Log a text, such as a picture in SVG, as a file with this name."""

    def log_inputs(self, data_sets: Sequence[DataSet]) -> None:
        """Log the data sets that the stage reads."""

    def log_table(self, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        """Add rows to a table, NAME.json, that MLflow shows; the columns are the keys of its first row."""

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

    def log_text(self, name: str, text: str) -> None:
        return

    def log_inputs(self, data_sets: Sequence[DataSet]) -> None:
        return

    def log_table(self, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        return

    def flush(self) -> None:
        return

    def finish(self, status: str, error: str = "") -> None:
        return


class MlflowTracker:
    """A nested MLflow run. What it logs is buffered while the server is unreachable, and dropped if the server refuses it."""

    FLUSH_SECONDS = 5.0  # metrics are batched, because each request takes about 50 ms
    RETRY_SECONDS = 30.0  # between requests to a failing server, each of which may take seconds to time out
    WAIT_SECONDS = 60.0  # at the end of a stage, for a server that has responded before and is probably restarting
    UNREACHED_WAIT_SECONDS = 20.0  # at the end of a stage, for a server that has never responded
    PAUSE_SECONDS = 1.0

    def __init__(self, open_run: Callable[[], OpenRun], config: TrackingConfig | None = None) -> None:
        """open_run finds or creates the nested run; it is called immediately, and again if it fails."""
        self._open_run, self._config = open_run, config or TrackingConfig()
        self._run: OpenRun | None = None
        self._points: list[Any] = []
        self._files: list[Callable[[OpenRun], object]] = []
        self._num_system_points = 0
        self._flushed = time.monotonic()
        self._unreachable_since: float | None = None
        self._is_refused = False
        self._send(lambda run: None)

    def log(self, metrics: Mapping[str, float], step: int, milliseconds: int | None = None) -> None:
        """milliseconds is the time of the metrics since 1970, by default the current time."""
        from mlflow.entities import Metric

        at = int(time.time() * 1000) if milliseconds is None else milliseconds
        self._points += [Metric(key_of(name), float(value), at, step) for name, value in metrics.items()]
        if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            self.flush()

    def log_system(self, metrics: Mapping[str, float]) -> None:
        """Log measurements of the machine; their steps continue those of an earlier attempt."""
        if self._run is None:
            return
        first = max((step for name, step in self._run.last_steps.items() if name.startswith("system/")), default=-1) + 1
        self.log(metrics, first + self._num_system_points)
        self._num_system_points += 1

    def log_file(self, path: Path, name: str = "") -> None:
        self._files.append(lambda run: _upload(run, path, name or path.name))
        self.flush()

    def log_text(self, name: str, text: str) -> None:
        self._files.append(lambda run: run.client.log_text(run.id, redact(text), name))
        self.flush()

    def log_inputs(self, data_sets: Sequence[DataSet]) -> None:
        self._files.append(lambda run: run.client.log_inputs(run.id, as_inputs(data_sets)))
        self.flush()

    def log_table(self, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        self._files.append(lambda run: add_to_table(run, name, rows))
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
        self._send(self._send_all)

    def _send_all(self, run: OpenRun) -> None:
        # Steps that are repeated after a resume have been logged by an earlier attempt.
        self._points = [point for point in self._points if point.step > run.last_steps.get(point.key, -1)]
        while self._points:  # MLflow ignores duplicate points, which are sent if a response was lost
            batch = self._points[:1000]  # the server's limit for one request
            self._send_part(lambda batch=batch: run.client.log_batch(run.id, metrics=batch))  # type: ignore[misc]
            del self._points[: len(batch)]
        while self._files:
            self._send_part(lambda: self._files[0](run))
            del self._files[0]

    def _send_part(self, call: Callable[[], object]) -> None:
        """Send a part of the data. One whose content is refused must not block the rest."""
        try:
            call()
        except Exception as error:
            if not (is_permanent(error, has_worked=True) and concerns_content(error)):
                raise
            warn(error, self._config, has_worked=True)

    def _send(self, call: Callable[[OpenRun], object]) -> None:
        if self._is_refused:
            return
        if self._unreachable_since is not None and time.monotonic() - self._unreachable_since < self.RETRY_SECONDS:
            return
        has_worked = self._run is not None
        try:
            self._run = self._run or self._open_run()
            call(self._run)
        except Exception as error:  # MLflow must not fail a stage
            if is_permanent(error, has_worked=has_worked):
                warn(error, self._config, has_worked=has_worked)
                self._is_refused, self._unreachable_since = True, None
                return
            if self._unreachable_since is None:
                warn(error, has_worked=has_worked)
            self._unreachable_since = time.monotonic()
        else:
            self._unreachable_since = None


def _upload(run: OpenRun, path: Path, name: str) -> None:
    if not path.exists():  # a deleted file must not block the rest
        return
    if Path(name).suffix == ".png":
        with tempfile.TemporaryDirectory(prefix="rlhf-mlflow-") as folder:
            image = Path(folder) / name
            image.write_bytes(path.read_bytes())
            run.client.log_artifact(run.id, str(image))
        return
    run.client.log_text(run.id, path.read_text(encoding="utf-8"), name)


def _end(run: OpenRun, status: str, error: str) -> None:
    if error:
        run.client.set_tag(run.id, ERROR_TAG, redact(error)[:MAX_TAG_CHARS])
    run.client.set_terminated(run.id, status)


def with_environment_uri(config: TrackingConfig) -> TrackingConfig:
    """The settings with uri defaulting to MLFLOW_TRACKING_URI, which comes from a Secret on a cluster."""
    return config if config.uri else config.model_copy(update={"uri": os.environ.get("MLFLOW_TRACKING_URI") or None})


def start_tracking(config: TrackingConfig, *, run_id: str, stage: str, params: Mapping[str, Any]) -> Tracker:
    """The tracker of one stage. Its run is nested in the parent run with this run_id, which is created if necessary."""
    if not config.enabled or not config.uri:
        return NullTracker()
    return MlflowTracker(lambda: open_run(config, run_id, stage, params, describe_machine(stage)), config)
