"""The state of a run in Kubeflow Pipelines, and the logs of its pods."""

import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from components.rlhf.text.errors import InputError
from pipelines.cluster.server import Server, ServerAccess, translate_api_errors
from pipelines.run_state import RunState, TaskState

STATES = {
    "PENDING": "waiting", "RUNNING": "running", "SUCCEEDED": "succeeded", "CACHED": "succeeded", "FAILED": "failed",
    "CANCELED": "stopped", "CANCELING": "running", "PAUSED": "waiting", "SKIPPED": "skipped",
}  # fmt: skip
TIMEOUT_SECONDS = 30.0


def read_cluster_state(server: Server, access: ServerAccess, run_id: str, stages: list[str]) -> RunState:
    """The state of a run and of its tasks, which have the names of stages. Raises InputError, such as for an unknown run."""
    with translate_api_errors(access):
        run: Any = server.client.get_run(run_id)
    details = (run.run_details.task_details if run.run_details else None) or []
    tasks = [task for task in map(_task_state, details) if re.sub(r"_\d+$", "", task.name) in stages]
    message = run.error.message if run.error and run.error.message else ""
    return RunState(run=run_id, state=STATES.get(str(run.state), "waiting"), tasks=tasks, reason=message)


def _task_state(detail: Any) -> TaskState:
    """A task of the API. Kubeflow Pipelines also lists drivers, loops and conditions as tasks."""
    state = STATES.get(str(detail.state), "waiting")
    start, end = detail.start_time, detail.end_time
    if state == "running":
        end = datetime.now(UTC)
    seconds = (end - start).total_seconds() if start and end else 0.0
    message = detail.error.message if detail.error and detail.error.message else ""
    name = str(detail.display_name).replace("-", "_").replace(" ", "_").lower()
    return TaskState(name=name, state=state, seconds=max(0.0, seconds), line=" ".join(message.split()))


def pod_logs(namespace: str, run_id: str, stage: str, context: str | None) -> Iterator[str]:
    """The logs of the pods of one stage, those of earlier attempts first. Raises InputError if the kubectl context cannot read them."""
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    try:
        from kubernetes import client, config

        core = client.CoreV1Api(config.new_client_from_config(context=context))
        selector = f"pipeline/runid={run_id},kfp-rlhf/stage={stage}"
        pods = core.list_namespaced_pod(namespace, label_selector=selector, _request_timeout=TIMEOUT_SECONDS).items
        for pod in sorted(pods, key=lambda pod: pod.metadata.creation_timestamp):
            yield core.read_namespaced_pod_log(
                pod.metadata.name, namespace, container="main", _request_timeout=TIMEOUT_SECONDS
            )
    except Exception as error:
        reason = " ".join(str(getattr(error, "reason", "") or error).split())[:300]
        raise InputError(
            f"The pods of stage {stage} in namespace {namespace} cannot be read ({reason}); choose another --kube-context or --namespace."
        ) from None
    if not pods:
        raise InputError(
            f"No pod of stage {stage} of run {run_id} is left in namespace {namespace}; its log is also an artifact of the task in the UI."
        )
