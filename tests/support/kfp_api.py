"""A server that speaks the v2beta1 API of Kubeflow Pipelines, as far as a client that submits runs asks.

Paths, methods and shapes are those of the published OpenAPI: requests and answers go through the models that kfp_server_api
generates from it, and anything else is refused as the API server refuses it (a google.rpc.Status). State is in memory.
"""

import json
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import kfp_server_api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

Json = dict[str, Any]
MODELS = kfp_server_api.ApiClient()


class Refusal(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class KfpApi:
    """What the server knows. Tests set multi_user, version, token and rights, and look at what was made."""

    def __init__(self) -> None:
        self.multi_user = False
        self.version: str | None = "2.17.0"
        self.pipeline_store: str | None = "database"
        self.behind_ui = False  # reached through ml-pipeline-ui, which answers /healthz itself and passes the rest on
        self.ready = True
        self.token: str | None = None
        self.cookie: str | None = None
        self.namespaces_with_rights: set[str] | None = None  # None is all
        self.pipelines: dict[str, Json] = {}
        self.versions: dict[str, Json] = {}
        self.experiments: dict[str, Json] = {}
        self.runs: dict[str, Json] = {}
        self.recurring_runs: dict[str, Json] = {}
        self.states: list[str] = ["PENDING", "RUNNING", "SUCCEEDED"]  # of a run, one a look
        self.broken_looks = 0  # looks at a run that fail with 503 before the next one works
        self.requests: list[str] = []
        self.format_duration = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> str:
        self.format_duration += timedelta(seconds=1)
        return self.format_duration.isoformat().replace("+00:00", "Z")

    @property
    def made(self) -> int:
        """Everything that requests have created."""
        return sum(map(len, (self.pipelines, self.versions, self.experiments, self.runs, self.recurring_runs)))

    def answer(self, method: str, url: str, headers: Any, body: bytes) -> Json:
        parts = urlsplit(url)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.requests.append(f"{method} {parts.path}")
        if self.token and headers.get("authorization") != f"Bearer {self.token}":
            raise Refusal(401, "Request header error: there is no user identity header.")
        if self.cookie and headers.get("Cookie") != self.cookie:
            raise Refusal(401, "no session")
        for pattern, methods in ROUTES.items():
            match = re.fullmatch(pattern, parts.path)
            if match and method in methods:
                return getattr(self, methods[method])(*map(unquote, match.groups()), query, headers, body)
        raise Refusal(404, "Not Found")

    # --- health

    def health(self, query: Json, headers: Any, body: bytes) -> Json:
        found: Json = {"multi_user": self.multi_user, "tag_name": self.version, "pipeline_store": self.pipeline_store}
        if self.behind_ui:  # frontend/server/handlers/healthz.ts
            names = {"tag_name": "apiServerTagName", "pipeline_store": "pipelineStore"}
            found = {names.get(key, key): value for key, value in found.items()} if self.ready else {}
            found |= {"apiServerReady": self.ready, "frontendTagName": self.version, "buildDate": "today"}
        return {key: value for key, value in found.items() if value is not None}

    # --- pipelines

    def list_pipelines(self, query: Json, headers: Any, body: bytes) -> Json:
        if self.multi_user and query.get("namespace"):
            self._authorize(query["namespace"])
        found = [p for p in self.pipelines.values() if p.get("namespace", "") == query.get("namespace", "")]
        return shaped("V2beta1ListPipelinesResponse", {"pipelines": filtered(found, query)})

    def create_pipeline(self, query: Json, headers: Any, body: bytes) -> Json:
        wanted = parsed("V2beta1Pipeline", json.loads(body))
        self._authorize(wanted.get("namespace"))
        if any(p["display_name"] == wanted["display_name"] for p in self.pipelines.values()):
            raise Refusal(409, f"Already exist error: The name {wanted['display_name']} already exist.")
        made = wanted | {"pipeline_id": str(uuid.uuid4()), "created_at": self.now()}
        self.pipelines[made["pipeline_id"]] = made
        return shaped("V2beta1Pipeline", made)

    def list_versions(self, pipeline_id: str, query: Json, headers: Any, body: bytes) -> Json:
        self._pipeline(pipeline_id)
        found = [v for v in self.versions.values() if v["pipeline_id"] == pipeline_id]
        if query.get("sort_by") == "created_at desc":
            found = sorted(found, key=lambda v: v["created_at"], reverse=True)
        return shaped("V2beta1ListPipelineVersionsResponse", {"pipeline_versions": filtered(found, query)})

    def upload_version(self, query: Json, headers: Any, body: bytes) -> Json:
        pipeline = self._pipeline(query["pipelineid"])
        self._authorize(pipeline.get("namespace"))
        if any(v["display_name"] == query["name"] for v in self.versions.values()):
            raise Refusal(409, f"Already exist error: The name {query['name']} already exist.")
        documents = list(yaml.safe_load_all(uploaded_file(headers, body)))
        json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
        json_format.ParseDict(documents[1], pipeline_spec_pb2.PlatformSpec())
        made = {
            "pipeline_id": pipeline["pipeline_id"],
            "pipeline_version_id": str(uuid.uuid4()),
            "display_name": query["name"],
            "description": query.get("description", ""),
            "created_at": self.now(),
            # A google.protobuf.Struct: every number comes back as a float.
            "pipeline_spec": floats({"pipeline_spec": documents[0], "platform_spec": documents[1]}),
        }
        self.versions[made["pipeline_version_id"]] = made
        return shaped("V2beta1PipelineVersion", made)

    # --- experiments, runs

    def list_experiments(self, query: Json, headers: Any, body: bytes) -> Json:
        namespace = query.get("namespace", "")
        if self.multi_user and not namespace:
            raise Refusal(400, "Invalid input error: In multi-user mode, ListExperiment must filter by namespace.")
        if not self.multi_user and namespace:
            raise Refusal(400, "Invalid input error: In single-user mode, ListExperiment cannot filter by namespace.")
        self._authorize(namespace)
        found = [e for e in self.experiments.values() if e.get("namespace", "") == namespace]
        return shaped("V2beta1ListExperimentsResponse", {"experiments": filtered(found, query)})

    def create_experiment(self, query: Json, headers: Any, body: bytes) -> Json:
        wanted = parsed("V2beta1Experiment", json.loads(body))
        self._authorize(wanted.get("namespace"))
        made = wanted | {"experiment_id": str(uuid.uuid4()), "created_at": self.now()}
        self.experiments[made["experiment_id"]] = made
        return shaped("V2beta1Experiment", made)

    def create_run(self, query: Json, headers: Any, body: bytes) -> Json:
        wanted = self._startable("V2beta1Run", body)
        made = wanted | {"run_id": str(uuid.uuid4()), "created_at": self.now(), "state": "PENDING"}
        self.runs[made["run_id"]] = made
        return shaped("V2beta1Run", made)

    def get_run(self, run_id: str, query: Json, headers: Any, body: bytes) -> Json:
        if self.broken_looks:
            self.broken_looks -= 1
            raise Refusal(503, "upstream connect error")
        if run_id not in self.runs:
            raise Refusal(404, f"Run {run_id} not found.")
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        error = {"error": {"code": 13, "message": "Workflow failed: task ppo"}} if state == "FAILED" else {}
        return shaped("V2beta1Run", self.runs[run_id] | {"state": state} | error)

    def create_recurring_run(self, query: Json, headers: Any, body: bytes) -> Json:
        wanted = self._startable("V2beta1RecurringRun", body)
        if len(wanted["trigger"]["cron_schedule"]["cron"].split()) != 6:
            raise Refusal(400, "Invalid input error: Schedule cron is not a supported format.")
        made = wanted | {"recurring_run_id": str(uuid.uuid4()), "created_at": self.now()}
        self.recurring_runs[made["recurring_run_id"]] = made
        return shaped("V2beta1RecurringRun", made)

    def _startable(self, model: str, body: bytes) -> Json:
        wanted = parsed(model, json.loads(body))
        if wanted.get("experiment_id") not in self.experiments:
            raise Refusal(404, f"Experiment {wanted.get('experiment_id')} not found.")
        self._authorize(self.experiments[wanted["experiment_id"]].get("namespace"))
        reference = wanted["pipeline_version_reference"]
        version = self.versions.get(reference["pipeline_version_id"])
        if version is None or version["pipeline_id"] != reference["pipeline_id"]:
            raise Refusal(404, "PipelineVersion not found.")
        inputs = version["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
        strangers = set(wanted.get("runtime_config", {}).get("parameters") or {}) - set(inputs)
        if strangers:
            raise Refusal(400, f"Invalid input error: Unrecognized input parameter: {strangers}.")
        return wanted

    def _pipeline(self, pipeline_id: str) -> Json:
        if pipeline_id not in self.pipelines:
            raise Refusal(404, f"Pipeline {pipeline_id} not found.")
        return self.pipelines[pipeline_id]

    def _authorize(self, namespace: str | None) -> None:
        if self.namespaces_with_rights is not None and namespace not in self.namespaces_with_rights:
            raise Refusal(403, f"Failed to authorize with API: User is not authorized in namespace {namespace}")


ROUTES = {
    r"/apis/v2beta1/healthz": {"GET": "health"},
    r"/apis/v2beta1/pipelines": {"GET": "list_pipelines", "POST": "create_pipeline"},
    r"/apis/v2beta1/pipelines/upload_version": {"POST": "upload_version"},
    r"/apis/v2beta1/pipelines/([^/]+)/versions": {"GET": "list_versions"},
    r"/apis/v2beta1/experiments": {"GET": "list_experiments", "POST": "create_experiment"},
    r"/apis/v2beta1/runs": {"POST": "create_run"},
    r"/apis/v2beta1/runs/([^/]+)": {"GET": "get_run"},
    r"/apis/v2beta1/recurringruns": {"POST": "create_recurring_run"},
}


class Answer:
    """What kfp_server_api's deserializer reads."""

    def __init__(self, data: Json) -> None:
        self.data = json.dumps(data)


def parsed(model: str, data: Json) -> Json:
    """A request by the API's own model: unknown fields and wrong types are refused, and empty ones left out."""
    known = getattr(kfp_server_api, model).attribute_map.values()
    if set(data) - set(known):
        raise Refusal(400, f"unknown field {sorted(set(data) - set(known))} in {model}")
    try:
        found: Json = MODELS.sanitize_for_serialization(MODELS.deserialize(Answer(data), model))
    except (ValueError, TypeError) as error:
        raise Refusal(400, f"{model}: {error}") from None
    return found


def shaped(model: str, data: Json) -> Json:
    """An answer, which must be one by the same model."""
    assert set(data) <= set(getattr(kfp_server_api, model).attribute_map.values()), (model, sorted(data))
    MODELS.deserialize(Answer(data), model)
    return data


def filtered(found: list[Json], query: Json) -> list[Json]:
    """A page of what passes the filter."""
    for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
        assert predicate["operation"] in ("EQUALS", 1) and set(predicate) == {"operation", "key", "stringValue"}
        found = [item for item in found if item.get(predicate["key"]) == predicate["stringValue"]]
    return found[: int(query.get("page_size") or 20)]


def floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [floats(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def uploaded_file(headers: Any, body: bytes) -> str:
    message = BytesParser().parsebytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body)
    (part,) = message.get_payload()
    assert part.get_param("name", header="content-disposition") == "uploadfile"
    return part.get_payload(decode=True).decode()


@contextmanager
def serving(api: Any) -> Iterator[str]:
    """The address of a server that answers with api.answer, as long as the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                status, content = 200, api.answer(self.command, self.path, self.headers, body)
            except Refusal as refusal:
                status, content = refusal.status, {"code": refusal.status, "message": refusal.message}
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if isinstance(content, bytes) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = do_PATCH = _handle

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
