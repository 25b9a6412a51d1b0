"""Tracking in a process of its own, so that a stage neither imports MLflow, which takes seconds, nor waits for its server.

The process reads one request per line from its standard input, and answers with the request's number when it is done. It ends
when the stage ends, however that happens, because its standard input ends too.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.text.redaction import redact_output
from components.rlhf.tracking.answers import warn
from components.rlhf.tracking.machine import SAMPLE_SECONDS, MachineSampler
from components.rlhf.tracking.mlflow import NullTracker, Tracker, start_tracking
from components.rlhf.tracking.tables import Cell, DataSet, as_json, from_json

FIRST_SAMPLE_SECONDS = 2.0  # so that a short stage has one
COMMAND = (sys.executable, "-m", "components.rlhf.tracking.process")


class ProcessTracker:
    """A tracker whose calls are made by another process, in order. Only flush and finish wait for it."""

    def __init__(self, config: TrackingConfig, *, run_id: str, stage: str, params: Mapping[str, Any]) -> None:
        """Raises OSError if the process cannot be started."""
        # A group of its own, so that a signal to the stage's group does not end it before the stage has said how it ends.
        self._process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
        self._num_requests = 0
        self._is_lost = False
        self._request("start", config=config.canonical_json(), run_id=run_id, stage=stage, params=dict(params))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._request("log", metrics=values, step=step, milliseconds=int(time.time() * 1000))

    def log_file(self, path: Path, name: str = "") -> None:
        self._request("log_file", path=str(path), name=name)

    def log_text(self, name: str, text: str) -> None:
        self._request("log_text", name=name, text=text)

    def log_inputs(self, data_sets: Sequence[DataSet]) -> None:
        self._request("log_inputs", data_sets=as_json(data_sets))

    def log_table(self, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        self._request("log_table", name=name, rows=[dict(row) for row in rows])

    def flush(self) -> None:
        self._request("flush")
        self._wait()

    def finish(self, status: str, error: str = "") -> None:
        self._request("finish", status=status, error=error)
        self._wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # what a lost process has not read
            self._process.stdin.close()
        self._process.wait()

    def _request(self, call: str, **arguments: Any) -> None:
        if self._is_lost:
            return
        self._num_requests += 1
        request = {"number": self._num_requests, "call": call, "arguments": arguments}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:  # ValueError: finish has closed it, and a signal has ended its wait
            self._lose(error)

    def _wait(self) -> None:
        """Wait until the last request is done. Answers to earlier ones are left over if a signal has ended the wait for them."""
        if self._is_lost:
            return
        assert self._process.stdout is not None
        answer = 0
        while answer < self._num_requests:
            line = self._process.stdout.readline()
            if not line:
                self._lose(ConnectionError("the process that talks to it ended"))
                return
            answer = int(line)

    def _lose(self, error: Exception) -> None:
        self._is_lost = True
        self._process.kill()
        warn(error)


def start_tracking_process(config: TrackingConfig, *, run_id: str, stage: str, params: Mapping[str, Any]) -> Tracker:
    """start_tracking() in a process of its own, or in this one if none can be started."""
    if not config.enabled or not config.uri:
        return NullTracker()
    try:
        return ProcessTracker(config, run_id=run_id, stage=stage, params=params)
    except OSError:
        return start_tracking(config, run_id=run_id, stage=stage, params=params)


def main() -> None:
    """The other process: serve requests until finish, or until the stage has ended."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        redact_output()
        requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
        _serve(requests, answers)
    sys.stderr.flush()
    os._exit(0)  # Python aborts at its end while a thread reads standard input


def _serve(requests: "queue.SimpleQueue[dict[str, Any]]", answers: Any) -> None:
    tracker: Any = None
    sampler = MachineSampler(os.getppid())
    sampled, pause = time.monotonic(), FIRST_SAMPLE_SECONDS
    call = ""
    while call != "finish":
        if time.monotonic() > sampled + pause:
            tracker.log_system(sampler.sample())
            sampled, pause = time.monotonic(), SAMPLE_SECONDS
        try:
            request = requests.get(timeout=max(0.0, sampled + pause - time.monotonic()) if tracker else None)
        except queue.Empty:
            continue
        call, arguments = request["call"], request["arguments"]
        if call == "start":
            tracker = start_tracking(TrackingConfig.from_json(arguments.pop("config")), **arguments)
        elif call == "log_file":
            tracker.log_file(Path(arguments["path"]), arguments["name"])
        elif call == "log_inputs":
            tracker.log_inputs(from_json(arguments["data_sets"]))
        else:
            getattr(tracker, call)(**arguments)
        if call in ("flush", "finish"):
            answers.write(f"{request['number']}\n")
            answers.flush()


def _read_requests(requests: "queue.SimpleQueue[dict[str, Any]]") -> None:
    """Read ahead, so that the stage does not wait while a request is being served; end when the stage has ended."""
    try:
        for line in sys.stdin.buffer:
            requests.put(json.loads(line))
    finally:  # also after half a line, which a signal may have cut
        os._exit(0)


if __name__ == "__main__":
    main()
