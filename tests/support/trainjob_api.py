"""A server with the part of the Kubernetes API that TrainJobs need: TrainJobs, pods, their logs, and watches of both.

Objects are validated strictly against the published schema of Kubeflow Trainer (tests/manifests/trainer_schema.yaml) and by the rules of
its webhook. State is in memory; tests play the controllers, and change what goes wrong.
"""

import json
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import jsonschema
import yaml
from jsonschema.validators import validator_for

Json = dict[str, Any]
SCHEMA = yaml.safe_load((Path(__file__).parents[1] / "manifests" / "trainer_schema.yaml").read_text())
TRAINJOB = validator_for(SCHEMA["TrainJob"])(
    SCHEMA["TrainJob"]
)  # jsonschema.validate checks the schema itself every time
NAMESPACE = "team"
JOBS = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
RESERVED = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
LAUNCHER_POD, WORKFLOW_UID = "run-launcher-pod", "11111111-2222-3333-4444-555555555555"


class HttpError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class Faults:
    """What goes wrong until a test changes it."""

    refuse: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)  # (verb, trainjobs|pods) -> answer
    answer: tuple[int, str] | None = None  # to every request
    drop: bool = False  # every connection, without an answer
    lose_next_create: bool = False  # the object is created, and the answer is lost


class TrainJobApi:
    """State of the server. The lock guards all of it; `changed` is notified of every change."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.version, self.oldest = 100, 0
        self.objects: dict[str, dict[str, Json]] = {"trainjobs": {}, "pods": {}}
        self.events: list[tuple[int, str, str, Json]] = []  # version, resource, type, object
        self.logs: dict[str, list[tuple[str, str]]] = {}  # pod -> stamp and text
        self.runtimes = {"rlhf"}
        self.faults = Faults()
        self.requests: list[str] = []
        self.epoch = 0  # a stream ends when it changes
        self.pods_outlive_job_seconds = 0.0
        self.closed = False
        owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run", "uid": WORKFLOW_UID,
                 "controller": True, "blockOwnerDeletion": True}  # fmt: skip
        self.put("pods", {"metadata": {"name": LAUNCHER_POD, "labels": {}, "ownerReferences": [owner]}, "status": {}})

    # --- state, as controllers change it

    def put(self, resource: str, item: Json, kind: str = "") -> Json:
        """Create or replace an object."""
        with self.changed:
            name = item["metadata"]["name"]
            exists = name in self.objects[resource]
            self.version += 1
            item = deepcopy(item)
            item["metadata"] |= {"resourceVersion": str(self.version), "namespace": NAMESPACE}
            item["metadata"].setdefault("uid", str(uuid.uuid4()))
            item["metadata"].setdefault("creationTimestamp", now())
            self.objects[resource][name] = item
            self.events.append((self.version, resource, kind or ("MODIFIED" if exists else "ADDED"), deepcopy(item)))
            self.changed.notify_all()
            return item

    def remove(self, resource: str, name: str) -> None:
        with self.changed:
            item = self.objects[resource].pop(name, None)
            if item:
                self.version += 1
                item["metadata"]["resourceVersion"] = str(self.version)
                self.events.append((self.version, resource, "DELETED", item))
                self.changed.notify_all()

    def update(self, resource: str, name: str, **changes: Any) -> Json:
        """Set dotted fields, such as status__phase="Running"."""
        with self.changed:
            item = deepcopy(self.objects[resource][name])
            for key, value in changes.items():
                target = item
                *parents, last = key.split("__")
                for parent in parents:
                    target = target.setdefault(parent, {})
                target[last] = value
            return self.put(resource, item)

    @property
    def job(self) -> Json:
        """The only TrainJob."""
        with self.changed:
            (job,) = self.objects["trainjobs"].values()
            return deepcopy(job)

    def wait_for_job(self, seconds: float = 10) -> str:
        self.until(lambda: bool(self.objects["trainjobs"]), seconds)
        return str(self.job["metadata"]["name"])

    def until(self, condition: Any, seconds: float = 10) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, seconds), "it did not happen"

    def set_condition(self, name: str, kind: str, status: str, reason: str, message: str) -> None:
        with self.changed:
            conditions = (self.objects["trainjobs"][name].get("status") or {}).get("conditions") or []
            entry = {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": now()}
            rest = [c for c in conditions if c["type"] != kind]
            job = self.update("trainjobs", name, status__conditions=[*rest, entry])
            TRAINJOB.validate(job)

    def suspend(self, name: str) -> None:
        """What Kueue and the controller do to a job that is not admitted, or is preempted."""
        self.update("trainjobs", name, spec__suspend=True)
        self.set_condition(name, "Suspended", "True", "Suspended", "TrainJob is suspended")
        for pod in [p for p in self.objects["pods"] if p.startswith(f"{name}-node")]:
            self.remove("pods", pod)

    def admit(self, name: str) -> None:
        self.update("trainjobs", name, spec__suspend=False)
        self.set_condition(name, "Suspended", "False", "Resumed", "TrainJob is resumed")

    def add_pods(self, name: str, num: int, **status: Any) -> list[str]:
        """Pods of a job's nodes, as JobSet and the Job controller name and label them."""
        pods = []
        for index in range(num):
            pod = f"{name}-node-0-{index}-{uuid.uuid4().hex[:5]}"
            labels = {"jobset.sigs.k8s.io/jobset-name": name, "batch.kubernetes.io/job-completion-index": str(index)}
            self.put("pods", {"metadata": {"name": pod, "labels": labels}, "status": {"phase": "Pending", **status}})
            self.logs[pod] = []
            pods.append(pod)
        return pods

    def run_pods(self, name: str, num: int) -> list[str]:
        pods = self.add_pods(name, num)
        for pod in pods:
            self.set_state(pod, "Running", {"running": {"startedAt": now()}})
        entry = {"name": "node", "ready": 1, "succeeded": 0, "failed": 0, "active": 1, "suspended": 0}
        self.update("trainjobs", name, status__jobsStatus=[entry])
        return pods

    def set_state(self, pod: str, phase: str, state: Json) -> None:
        statuses = [{"name": "node", "image": "trainer", "state": state}]
        self.update("pods", pod, status__phase=phase, status__containerStatuses=statuses)

    def end_pod(self, pod: str, code: int, *, reason: str = "", message: str = "") -> None:
        terminated = {"exitCode": code, "reason": reason or ("Error" if code else "Completed"), "message": message,
                      "finishedAt": now()}  # fmt: skip
        self.set_state(pod, "Failed" if code else "Succeeded", {"terminated": terminated})

    def complete(self, name: str) -> None:
        self.set_condition(name, "Complete", "True", "AllJobsCompleted", "jobset completed successfully")

    def fail(
        self, name: str, reason: str = "FailedJobs", message: str = "jobset failed due to one or more job failures"
    ) -> None:
        self.set_condition(name, "Failed", "True", reason, message)

    def say(self, pod: str, *lines: str) -> None:
        """Add lines to the log of a pod."""
        with self.changed:
            self.logs[pod] += [(stamp(), line) for line in lines]
            self.changed.notify_all()

    def drop_streams(self, *, forget_history: bool = False) -> None:
        """End every watch and log; forget_history makes their versions too old to continue."""
        with self.changed:
            self.epoch += 1
            self.oldest = self.version + 1 if forget_history else self.oldest
            self.version += forget_history
            self.changed.notify_all()

    # --- requests

    def create(self, body: Json, query: Json) -> Json:
        assert query.get("fieldValidation") == "Strict"
        try:
            TRAINJOB.validate(body)
        except jsonschema.ValidationError as error:
            raise HttpError(400, f"strict decoding error: unknown field or value: {error.message[:300]}") from None
        names = [entry["name"] for entry in body["spec"]["trainer"]["env"]]
        if len(set(names)) < len(names):  # x-kubernetes-list-map-keys
            raise HttpError(422, "spec.trainer.env: Duplicate value")
        self._webhook(body)
        with self.changed:
            name = body["metadata"]["name"]
            if name in self.objects["trainjobs"]:
                raise HttpError(409, f'trainjobs.trainer.kubeflow.org "{name}" already exists')
            body["spec"].setdefault("managedBy", "trainer.kubeflow.org/trainjob-controller")
            if "kueue.x-k8s.io/queue-name" in body["metadata"].get("labels", {}):
                body["spec"]["suspend"] = True  # Kueue's webhook
            return self.put("trainjobs", body)

    def _webhook(self, job: Json) -> None:
        def deny(reason: str) -> None:
            raise HttpError(
                403, f'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: {reason}'
            )

        spec = job["spec"]
        if spec["runtimeRef"]["kind"] == "TrainingRuntime" and spec["runtimeRef"]["name"] not in self.runtimes:
            deny("spec.runtimeRef: specified trainingRuntime must be created before the TrainJob is created")
        if RESERVED & {env["name"] for env in spec["trainer"].get("env", [])}:
            deny("spec.trainer.env: must not have reserved envs")
        for patch in spec["runtimePatches"]:
            if not re.fullmatch(r"[a-z0-9.-]+/[A-Za-z0-9._-]+", patch["manager"]):
                deny("spec.runtimePatches.manager: must be a domain-prefixed path")
            for replicated in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
                if replicated["name"] != "node":
                    deny("must not have replicated job that doesn't exist in the runtime job template")
                for container in replicated["template"]["spec"]["template"]["spec"].get("containers", []):
                    if container["name"] != "node" or container.get("env"):
                        deny("must not have envs for the node containers")

    def delete(self, name: str, body: Json) -> Json:
        with self.changed:
            job = self._get("trainjobs", name)
            if body.get("preconditions", {}).get("uid", job["metadata"]["uid"]) != job["metadata"]["uid"]:
                raise HttpError(409, "the UID in the precondition does not match the UID in record")
            assert body["propagationPolicy"] == "Foreground"
            self.update("trainjobs", name, metadata__deletionTimestamp=now())
            threading.Timer(self.pods_outlive_job_seconds, self._remove_job, [name]).start()
            return {"kind": "Status", "status": "Success"}

    def _remove_job(self, name: str) -> None:
        for pod in [p for p in self.objects["pods"] if p.startswith(f"{name}-node")]:
            self.remove("pods", pod)
        self.remove("trainjobs", name)

    def _get(self, resource: str, name: str) -> Json:
        if name not in self.objects[resource]:
            raise HttpError(404, f'{resource} "{name}" not found')
        return self.objects[resource][name]

    def matches(self, item: Json, query: Json) -> bool:
        labels = item["metadata"].get("labels") or {}
        wanted = dict(pair.split("=", 1) for pair in query.get("labelSelector", "").split(",") if pair)
        fields = dict(pair.split("=", 1) for pair in query.get("fieldSelector", "").split(",") if pair)
        return all(labels.get(k) == v for k, v in wanted.items()) and item["metadata"]["name"] == fields.get(
            "metadata.name", item["metadata"]["name"]
        )

    def answer(self, verb: str, resource: str, name: str, query: Json, body: Json) -> Json:
        with self.changed:
            if verb == "list":
                items = [item for item in self.objects[resource].values() if self.matches(item, query)]
                return {"items": deepcopy(items), "metadata": {"resourceVersion": str(self.version)}}
            if verb == "create":
                return self.create(body, query)
            return self.delete(name, body) if verb == "delete" else deepcopy(self._get(resource, name))

    def watch(self, resource: str, query: Json) -> Iterator[bytes]:
        """Events after a version; a bookmark where nothing matched."""
        version, epoch = int(query["resourceVersion"]), self.epoch
        if version < self.oldest:
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            yield line({"type": "ERROR", "object": gone})
            return
        deadline = time.monotonic() + float(query["timeoutSeconds"])
        while time.monotonic() < deadline:
            with self.changed:
                new = [e for e in self.events if e[0] > version and e[1] == resource and self.matches(e[3], query)]
                latest = self.version
                if not new:
                    self.changed.wait(0.2)
                if self.epoch != epoch or self.closed or self.faults.drop or self.faults.answer:
                    return
            for number, _, kind, item in new:
                version = number
                yield line({"type": kind, "object": item})
            if not new and query.get("allowWatchBookmarks") == "true" and version < latest:
                version = latest
                yield line({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(version)}}})

    def follow(self, pod: str, query: Json) -> Iterator[bytes]:
        self._get("pods", pod)
        lines, epoch = self.logs[pod], self.epoch
        since = query.get("sinceTime", "").removesuffix("Z")
        start = next((i for i, (at, _) in enumerate(lines) if at[:19] >= since), len(lines)) if since else 0
        if "tailLines" in query:
            start = max(0, len(lines) - int(query["tailLines"]))
        while True:
            with self.changed:
                new = lines[start:]
                start += len(new)
                ended = self.objects["pods"].get(pod, {}).get("status", {}).get("phase") in (
                    None,
                    "Succeeded",
                    "Failed",
                )
                if not new and not ended and query.get("follow") == "true":
                    self.changed.wait(0.2)
            prefix = query.get("timestamps") == "true"
            for at, text in new:
                yield (f"{at} {text}" if prefix else text).encode() + b"\n"
            if self.epoch != epoch or self.closed or (not new and (ended or query.get("follow") != "true")):
                return


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def stamp() -> str:
    """As the kubelet writes it, without zeros at the end."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f").rstrip("0") + "Z"


def line(event: Json) -> bytes:
    return json.dumps(event).encode() + b"\n"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    api: TrainJobApi

    def log_message(self, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        parts, api = urlsplit(self.path), self.api
        query = dict(parse_qsl(parts.query))
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        match = re.fullmatch(rf"({re.escape(JOBS)}|{re.escape(PODS)})(?:/([^/]+))?(/log)?", parts.path)
        verbs = {"GET": "get" if match and match[2] else "watch" if query.get("watch") else "list"}
        verb = {**verbs, "POST": "create", "DELETE": "delete"}[self.command]
        resource = "trainjobs" if match and match[1] == JOBS else "pods"
        resource += "/log" if match and match[3] else ""
        api.requests.append(f"{verb} {resource}")
        if api.faults.drop:
            self.close_connection = True
            return
        try:
            refused = api.faults.answer or api.faults.refuse.get((verb, resource))
            if refused or not match:
                raise HttpError(*(refused or (404, "404 page not found")))
            if verb == "watch" or match[3]:
                self.stream(api.watch(resource, query) if verb == "watch" else api.follow(match[2], query))
                return
            answer = api.answer(verb, resource, match[2] or "", query, body)
        except HttpError as error:
            self.send(error.status, {"kind": "Status", "code": error.status, "message": error.message})
            return
        if verb == "create" and api.faults.lose_next_create:
            api.faults.lose_next_create = False
            self.close_connection = True
            return
        self.send(200, answer)

    do_GET = do_POST = do_DELETE = handle_any

    def send(self, status: int, content: Json) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, lines: Iterator[bytes]) -> None:
        first = next(lines, None)  # an error comes before the headers
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for data in [] if first is None else [first]:
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()
            for data in lines:
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True


@contextmanager
def running_api() -> Iterator[tuple[TrainJobApi, str]]:
    """The state of a running server, and its URL."""
    api = TrainJobApi()
    handler = type("BoundHandler", (Handler,), {"api": api})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield api, f"http://127.0.0.1:{server.server_port}"
    finally:
        api.closed = True
        api.drop_streams()
        server.shutdown()
        server.server_close()
