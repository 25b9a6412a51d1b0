"""Why pods of a run do not start, as far as the kubectl context may read it."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

TIMEOUT_SECONDS = 5.0
NORMAL = {"ContainerCreating", "PodInitializing"}  # reasons of a container that is about to start


class PendingPods:
    """The reasons for which pods of one run are pending, each once. Silent without a usable context."""

    def __init__(self, namespace: str, run_id: str, context: str | None) -> None:
        self._namespace, self._run_id = namespace, run_id
        self._core: Any = None
        self._said: dict[str, str] = {}
        if context == "":
            return
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        with contextlib.suppress(Exception):  # no kubeconfig, context or certificate
            from kubernetes import client, config

            self._core = client.CoreV1Api(config.new_client_from_config(context=context))
            self._core.api_client.configuration.retries = False

    def new_reasons(self) -> list[str]:
        """Lines `STAGE: REASON` that differ from those of the last call."""
        if self._core is None:
            return []
        try:
            reasons = dict(self._reasons())
        except Exception:  # no permission, or the server is away: the state of the run is still reported
            return []
        new = [f"{name}: {reason}" for name, reason in reasons.items() if self._said.get(name) != reason]
        self._said = reasons
        return new

    def _reasons(self) -> Iterator[tuple[str, str]]:
        pods = self._core.list_namespaced_pod(
            self._namespace,
            label_selector=f"pipeline/runid={self._run_id}",
            field_selector="status.phase=Pending",
            _request_timeout=TIMEOUT_SECONDS,
        )
        for pod in pods.items:
            reason = _reason_in_status(pod.status) or self._warning(pod.metadata.name)
            if reason:
                yield (pod.metadata.labels or {}).get("kfp-rlhf/stage", pod.metadata.name), reason

    def _warning(self, pod: str) -> str:
        """The latest warning about a pod: a volume that cannot be mounted, a network that cannot be set up."""
        events = self._core.list_namespaced_event(
            self._namespace,
            field_selector=f"involvedObject.name={pod},type=Warning",
            _request_timeout=TIMEOUT_SECONDS,
        )
        return " ".join(f"{events.items[-1].reason}: {events.items[-1].message}".split()) if events.items else ""


def _reason_in_status(status: Any) -> str:
    for condition in status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return " ".join(f"{condition.reason}: {condition.message}".split())
    for container in [*(status.init_container_statuses or []), *(status.container_statuses or [])]:
        waiting = container.state.waiting if container.state else None
        if waiting and waiting.reason not in NORMAL:
            return " ".join(f"{waiting.reason}: {waiting.message or container.image}".split())
    return ""
