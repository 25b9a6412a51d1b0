"""What the pods of a TrainJob say: why they do not start, and why they failed."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from components.rlhf.config.trainjob import CONTAINER
from components.rlhf.trainjob.api import Object

JOB_LABEL = "jobset.sigs.k8s.io/jobset-name"  # a TrainJob's JobSet has its name
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
STARTING = {"ContainerCreating", "PodInitializing"}
MAX_MESSAGE_CHARS = 1000
KILLED = {130, 137, 143}  # by a signal: often because another node has failed
FINAL_PREFIX = "error: "  # of a termination message: another attempt would fail as well


@dataclass(frozen=True)
class Failure:
    """The end of a failed pod."""

    node: int
    pod: str
    exit_code: int | None
    reason: str  # such as OOMKilled or Evicted, or ""
    message: str  # the termination message
    finished_at: str

    @property
    def is_final(self) -> bool:
        return self.message.startswith(FINAL_PREFIX)

    def __str__(self) -> str:
        code = "" if self.exit_code is None else f" with exit code {self.exit_code}"
        reason = f" ({self.reason})" if self.reason not in ("", "Error") else ""
        text = " ".join(self.message.removeprefix(FINAL_PREFIX).split())
        text = text if len(text) <= MAX_MESSAGE_CHARS else f"...{text[-MAX_MESSAGE_CHARS:]}"  # the end of the log
        hint = "; the node's memory limit is too small for the stage" if self.reason == "OOMKilled" and not text else ""
        return f"node {self.node} (pod {self.pod}) ended{code}{reason}{hint}" + (f": {text}" if text else "")


def node_of(pod: Object) -> int:
    """The rank of a pod's node; -1 without the label."""
    metadata = pod["metadata"]
    text = str({**(metadata.get("annotations") or {}), **(metadata.get("labels") or {})}.get(INDEX_LABEL, ""))
    return int(text) if re.fullmatch("[0-9]{1,6}", text) else -1


def has_started(pod: Object) -> bool:
    """Whether the container runs or has run, so that it has a log."""
    state = _container(pod).get("state") or {}
    return "running" in state or "terminated" in state


def pending_reason(pod: Object) -> str:
    """Why a pod does not start: Unschedulable, ImagePullBackOff...; "" if it starts or runs."""
    status = pod.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return _line(condition.get("reason"), condition.get("message"))
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting and waiting.get("reason") not in STARTING:
            return _line(waiting.get("reason"), waiting.get("message") or container.get("image"))
    return ""


def failures(pods: Iterable[Object]) -> list[Failure]:
    """The failed pods, the likely cause first: not killed by a signal, then an error that would occur again, then the first to end."""
    found = [failure for pod in pods if (failure := _failure(pod))]
    return sorted(found, key=lambda f: (_is_killed(f), not f.is_final, f.finished_at, f.node))


def _is_killed(failure: Failure) -> bool:
    return failure.exit_code in KILLED and failure.reason != "OOMKilled"


def _failure(pod: Object) -> Failure | None:
    status = pod.get("status") or {}
    terminated: Mapping[str, Any] = (_container(pod).get("state") or {}).get("terminated") or {}
    code = terminated.get("exitCode")
    if status.get("phase") != "Failed" and not code:
        return None
    reason = str(status.get("reason") or terminated.get("reason") or "")
    message = str(terminated.get("message") or status.get("message") or "")
    return Failure(
        node_of(pod), pod["metadata"]["name"], code, reason, message, str(terminated.get("finishedAt") or "9999")
    )


def _container(pod: Object) -> Mapping[str, Any]:
    containers = (pod.get("status") or {}).get("containerStatuses") or []
    return next((container for container in containers if container.get("name") == CONTAINER), {})


def _line(reason: object, message: object) -> str:
    return " ".join(f"{reason or 'waiting'}: {message or ''}".split()).rstrip(":")
