"""The state of a run, on this machine or on a cluster."""

import re
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


def task_label(name: str) -> str:
    """The name that people see of a task in a pipeline: import_sft_model of import-sft-model, and evaluation-2 of evaluation-2."""
    words, number = re.fullmatch(r"(.+?)(-\d+)?", name).groups(default="")  # type: ignore[union-attr]
    return words.replace("-", "_") + number
