"""Waiting for a TrainJob: its states and its pods' as lines, the log of node 0, and its end as a result or a sentence."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from components.rlhf.config.trainjob import CONTAINER
from components.rlhf.text.errors import InputError, RetryableError
from components.rlhf.trainjob.api import Api, Object
from components.rlhf.trainjob.jobs import RESOURCE, condition, pods_of
from components.rlhf.trainjob.logs import LogFollower, tail
from components.rlhf.trainjob.manifest import QUEUE_LABEL
from components.rlhf.trainjob.pods import JOB_LABEL, failures, has_started, node_of, pending_reason
from components.rlhf.trainjob.watch import Change, watch

LAST_LOG_SECONDS = 15.0  # for the last lines of node 0 after the end of the job
NUM_TAIL_LINES = 20
Event = Change | Exception


@dataclass
class View:
    """What is known of a job, and what has been said of it."""

    job: Object
    pods: dict[str, Object] = field(default_factory=dict)  # by uid
    state: str = ""
    has_run: bool = False
    reasons: dict[str, str] = field(default_factory=dict)  # of pods that do not start


def wait_for(api: Api, job: Object, write: Callable[[str], None]) -> InputError | None:
    """Wait for the end of a job; return None if it is complete, else why it failed. write receives the lines of node 0.

    A suspended job is waited for without limit: Kueue admits it when its quota allows. Raises InputError if the job cannot be watched,
    and RetryableError if another attempt may watch it.
    """
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    events: queue.SimpleQueue[tuple[str, Event]] = queue.SimpleQueue()
    stop, view = threading.Event(), View(job)
    follower = LogFollower(api, lambda line: write(f"node 0: {line}"))
    watches = {
        "job": (api.jobs, RESOURCE, {"fieldSelector": f"metadata.name={name}"}),
        "pod": (api.pods, "pods", {"labelSelector": f"{JOB_LABEL}={name}"}),
    }
    for kind, (path, resource, selector) in watches.items():
        changes = watch(api, path, resource, selector, stop, [job] if kind == "job" else [])
        threading.Thread(target=_put, args=(changes, kind, events), daemon=True).start()
    try:
        _see_job(api, view)
        while not _is_over(view):
            kind, event = events.get()
            if isinstance(event, Exception):
                raise event
            if kind == "pod":
                _see_pod(api, view, event, follower)
            elif event.item["metadata"]["uid"] == uid:
                if event.deleted:
                    raise RetryableError(f"TrainJob {name} was deleted while it ran; the task starts again.")
                view.job = event.item
                _see_job(api, view)
        pods = pods_of(api, name)
        for pod in pods:
            _see_pod(api, view, Change(pod), follower)
        follower.finish(LAST_LOG_SECONDS)
    finally:
        stop.set()
    return None if condition(view.job, "Complete") else failure_of(api, view.job, pods, write)


def _put(changes: Iterator[Change], kind: str, events: "queue.SimpleQueue[tuple[str, Event]]") -> None:
    try:
        for change in changes:
            events.put((kind, change))
    except Exception as error:  # raised again by the thread that waits
        events.put((kind, error))


def _is_over(view: View) -> bool:
    return bool(condition(view.job, "Complete") or condition(view.job, "Failed"))


def _see_job(api: Api, view: View) -> None:
    state = describe(api, view)
    if state and state != view.state:
        api.say(state)
        view.state = state


def describe(api: Api, view: View) -> str:
    """The state of a job in one line; "" if it says nothing new."""
    job, name = view.job, view.job["metadata"]["name"]
    if _is_over(view):
        return ""
    if (job.get("spec") or {}).get("suspend") or condition(job, "Suspended"):
        found = condition(job, "Suspended") or {}
        queue_name = (job["metadata"].get("labels") or {}).get(QUEUE_LABEL)
        where = f"in the queue {queue_name}" if queue_name else "without a queue"
        again = "again, and will resume from its latest checkpoint" if view.has_run else "until it is admitted"
        reason = f" ({found.get('reason')}: {found.get('message')})" if found.get("reason") else ""
        return f"TrainJob {name} is suspended {where} {again}{reason}; the reason: kubectl -n {api.namespace} describe workloads"
    nodes = {status.get("name"): status for status in (job.get("status") or {}).get("jobsStatus") or []}
    if (nodes.get(CONTAINER) or {}).get("ready"):
        view.has_run = True
        return f"TrainJob {name} runs on all its nodes"
    return f"TrainJob {name} starts"


def _see_pod(api: Api, view: View, change: Change, follower: LogFollower) -> None:
    pod = change.item
    uid, node = pod["metadata"]["uid"], node_of(pod)
    if change.deleted:
        view.pods.pop(uid, None)
        return
    view.pods[uid] = pod
    if has_started(pod):
        view.has_run = True
        if node == 0:
            follower.follow(pod)
    reason = pending_reason(pod)
    if reason and view.reasons.get(uid) != reason:
        api.say(f"node {node} waits: {reason}")
    view.reasons[uid] = reason


def failure_of(api: Api, job: Object, pods: list[Object], write: Callable[[str], None]) -> InputError:
    """The sentence for a failed job, after the last lines of the node that failed first."""
    name, failed = job["metadata"]["name"], condition(job, "Failed") or {}
    if failed.get("reason") == "DeadlineExceeded":
        seconds = int((job.get("spec") or {}).get("activeDeadlineSeconds") or 0)
        return RetryableError(
            f"TrainJob {name} reached its time limit of {seconds / 3600:g} hours; raise cluster.timeout_hours. It resumes from its "
            "latest checkpoint."
        )
    causes = failures(pods)
    if not causes:
        message = f"{failed.get('reason')}: {failed.get('message')}"
        error = InputError if failed.get("reason") == "TrainingRuntimeNotSupported" else RetryableError
        return error(f"TrainJob {name} failed ({message}), and none of its pods is left to say why.")
    cause = causes[0]
    if cause.node != 0:
        for line in tail(api, cause.pod, NUM_TAIL_LINES):
            write(f"node {cause.node}: {line}")
    error = InputError if cause.is_final else RetryableError
    more = f"; {len(causes) - 1} other nodes ended after it" if len(causes) > 1 else ""
    return error(f"TrainJob {name} failed: {cause}{more}")
