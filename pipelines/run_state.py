"""The state of a run, on this machine or on a cluster."""

from dataclasses import dataclass

ENDED = {"succeeded", "failed", "stopped"}


@dataclass(frozen=True, kw_only=True)
class TaskState:
    name: str
    state: str  # waiting, running, succeeded, failed, stopped or skipped
    seconds: float = 0.0
    line: str = ""  # the last line of progress, or the error


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run on this machine or on a cluster."""

    run: str  # its directory, or its id in Kubeflow Pipelines
    state: str  # waiting, running, succeeded, failed or stopped (killed or interrupted; it can be resumed)
    tasks: list[TaskState]
    reason: str = ""  # of a failure, or of the decision at the gate
