"""A server with the part of the v2beta1 API of Kubeflow Pipelines that submitting a run uses.

Paths, methods and schemas are those of the published OpenAPI: requests and responses are validated by the models that
kfp_server_api generates from it, and errors are those of the API server (a google.rpc.Status). State is in memory.
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


class HttpError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class KfpApi:
    """State and settings of the server. Tests change the settings and inspect what was created."""

    def __init__(self) -> None:
        self.multi_user = False
        self.version: str | None = "2.17.0"
        self.pipeline_store: str | None = "database"
        self.behind_ui = False  # behind ml-pipeline-ui, which answers /healthz itself and proxies the rest
        self.ready = True
        self.token: str | None = None
        self.cookie: str | None = None
        self.namespaces_with_rights: set[str] | None = None  # None is all
        self.pipelines: dict[str, Json] = {}
        self.versions: dict[str, Json] = {}
        self.experiments: dict[str, Json] = {}
        self.runs: dict[str, Json] = {}
        self.recurring_runs: dict[str, Json] = {}
        self.states: list[str] = ["PENDING", "RUNNING", "SUCCEEDED"]  # of a run, one per poll
        self.task_details: list[Json] = []  # of every run
        self.num_failing_polls = 0  # polls of a run that fail with 503 before the next one succeeds
        self.requests: list[str] = []
        self.clock = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> str:
        self.clock += timedelta(seconds=1)
        return self.clock.isoformat().replace("+00:00", "Z")

    @property
    def num_created(self) -> int:
        """Number of objects that requests have created."""
        return sum(map(len, (self.pipelines, self.versions, self.experiments, self.runs, self.recurring_runs)))

    def handle(self, method: str, url: str, headers: Any, body: bytes) -> Json:
        parts = urlsplit(url)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.requests.append(f"{method} {parts.path}")
        if self.token and headers.get("authorization") != f"Bearer {self.token}":
            raise HttpError(401, "Request header error: there is no user identity header.")
        if self.cookie and headers.get("Cookie") != self.cookie:
            raise HttpError(401, "no session")
        for pattern, methods in ROUTES.items():
            match = re.fullmatch(pattern, parts.path)
            if match and method in methods:
                return getattr(self, methods[method])(*map(unquote, match.groups()), query, headers, body)
        raise HttpError(404, "Not Found")

    # --- health

    def health(self, query: Json, headers: Any, body: bytes) -> Json:
        fields: Json = {"multi_user": self.multi_user, "tag_name": self.version, "pipeline_store": self.pipeline_store}
        if self.behind_ui:  # frontend/server/handlers/healthz.ts
            names = {"tag_name": "apiServerTagName", "pipeline_store": "pipelineStore"}
            fields = {names.get(key, key): value for key, value in fields.items()} if self.ready else {}
            fields |= {"apiServerReady": self.ready, "frontendTagName": self.version, "buildDate": "today"}
        return {key: value for key, value in fields.items() if value is not None}

    # --- pipelines

    def list_pipelines(self, query: Json, headers: Any, body: bytes) -> Json:
        if self.multi_user and query.get("namespace"):
            self._authorize(query["namespace"])
        pipelines = [p for p in self.pipelines.values() if p.get("namespace", "") == query.get("namespace", "")]
        return validate_response("V2beta1ListPipelinesResponse", {"pipelines": filter_items(pipelines, query)})

    def create_pipeline(self, query: Json, headers: Any, body: bytes) -> Json:
        request = parse_request("V2beta1Pipeline", json.loads(body))
        self._authorize(request.get("namespace"))
        if any(p["display_name"] == request["display_name"] for p in self.pipelines.values()):
            raise HttpError(409, f"Already exist error: The name {request['display_name']} already exist.")
        created = request | {"pipeline_id": str(uuid.uuid4()), "created_at": self.now()}
        self.pipelines[created["pipeline_id"]] = created
        return validate_response("V2beta1Pipeline", created)

    def list_versions(self, pipeline_id: str, query: Json, headers: Any, body: bytes) -> Json:
        self._pipeline(pipeline_id)
        versions = [v for v in self.versions.values() if v["pipeline_id"] == pipeline_id]
        if query.get("sort_by") == "created_at desc":
            versions = sorted(versions, key=lambda v: v["created_at"], reverse=True)
        return validate_response(
            "V2beta1ListPipelineVersionsResponse", {"pipeline_versions": filter_items(versions, query)}
        )

    def upload_version(self, query: Json, headers: Any, body: bytes) -> Json:
        pipeline = self._pipeline(query["pipelineid"])
        self._authorize(pipeline.get("namespace"))
        if any(v["display_name"] == query["name"] for v in self.versions.values()):
            raise HttpError(409, f"Already exist error: The name {query['name']} already exist.")
        documents = list(yaml.safe_load_all(uploaded_file(headers, body)))
        json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
        json_format.ParseDict(documents[1], pipeline_spec_pb2.PlatformSpec())
        created = {
            "pipeline_id": pipeline["pipeline_id"],
            "pipeline_version_id": str(uuid.uuid4()),
            "display_name": query["name"],
            "description": query.get("description", ""),
            "created_at": self.now(),
            # A google.protobuf.Struct returns every number as a float.
            "pipeline_spec": numbers_as_floats({"pipeline_spec": documents[0], "platform_spec": documents[1]}),
        }
        self.versions[created["pipeline_version_id"]] = created
        return validate_response("V2beta1PipelineVersion", created)

    # --- experiments, runs

    def list_experiments(self, query: Json, headers: Any, body: bytes) -> Json:
        namespace = query.get("namespace", "")
        if self.multi_user and not namespace:
            raise HttpError(400, "Invalid input error: In multi-user mode, ListExperiment must filter by namespace.")
        if not self.multi_user and namespace:
            raise HttpError(400, "Invalid input error: In single-user mode, ListExperiment cannot filter by namespace.")
        self._authorize(namespace)
        experiments = [e for e in self.experiments.values() if e.get("namespace", "") == namespace]
        return validate_response("V2beta1ListExperimentsResponse", {"experiments": filter_items(experiments, query)})

    def create_experiment(self, query: Json, headers: Any, body: bytes) -> Json:
        request = parse_request("V2beta1Experiment", json.loads(body))
        self._authorize(request.get("namespace"))
        created = request | {"experiment_id": str(uuid.uuid4()), "created_at": self.now()}
        self.experiments[created["experiment_id"]] = created
        return validate_response("V2beta1Experiment", created)

    def create_run(self, query: Json, headers: Any, body: bytes) -> Json:
        request = self._run_request("V2beta1Run", body)
        created = request | {"run_id": str(uuid.uuid4()), "created_at": self.now(), "state": "PENDING"}
        self.runs[created["run_id"]] = created
        return validate_response("V2beta1Run", created)

    def get_run(self, run_id: str, query: Json, headers: Any, body: bytes) -> Json:
        if self.num_failing_polls:
            self.num_failing_polls -= 1
            raise HttpError(503, "upstream connect error")
        if run_id not in self.runs:
            raise HttpError(404, f"Run {run_id} not found.")
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        error = {"error": {"code": 13, "message": "Workflow failed: task ppo"}} if state == "FAILED" else {}
        details = [validate_response("V2beta1PipelineTaskDetail", detail) for detail in self.task_details]
        run = self.runs[run_id] | {"state": state, "run_details": {"task_details": details}}
        return validate_response("V2beta1Run", run | error)

    def create_recurring_run(self, query: Json, headers: Any, body: bytes) -> Json:
        request = self._run_request("V2beta1RecurringRun", body)
        if len(request["trigger"]["cron_schedule"]["cron"].split()) != 6:
            raise HttpError(400, "Invalid input error: Schedule cron is not a supported format.")
        created = request | {"recurring_run_id": str(uuid.uuid4()), "created_at": self.now()}
        self.recurring_runs[created["recurring_run_id"]] = created
        return validate_response("V2beta1RecurringRun", created)

    def _run_request(self, model: str, body: bytes) -> Json:
        request = parse_request(model, json.loads(body))
        if request.get("experiment_id") not in self.experiments:
            raise HttpError(404, f"Experiment {request.get('experiment_id')} not found.")
        self._authorize(self.experiments[request["experiment_id"]].get("namespace"))
        reference = request["pipeline_version_reference"]
        version = self.versions.get(reference["pipeline_version_id"])
        if version is None or version["pipeline_id"] != reference["pipeline_id"]:
            raise HttpError(404, "PipelineVersion not found.")
        inputs = version["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
        unknown = set(request.get("runtime_config", {}).get("parameters") or {}) - set(inputs)
        if unknown:
            raise HttpError(400, f"Invalid input error: Unrecognized input parameter: {unknown}.")
        return request

    def _pipeline(self, pipeline_id: str) -> Json:
        if pipeline_id not in self.pipelines:
            raise HttpError(404, f"Pipeline {pipeline_id} not found.")
        return self.pipelines[pipeline_id]

    def _authorize(self, namespace: str | None) -> None:
        if self.namespaces_with_rights is not None and namespace not in self.namespaces_with_rights:
            raise HttpError(403, f"Failed to authorize with API: User is not authorized in namespace {namespace}")


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


class Response:
    """The response object that kfp_server_api's deserializer expects."""

    def __init__(self, data: Json) -> None:
        self.data = json.dumps(data)


def parse_request(model: str, data: Json) -> Json:
    """Parse a request with a model of the API. Unknown fields and wrong types are errors; empty fields are dropped."""
    known = getattr(kfp_server_api, model).attribute_map.values()
    if set(data) - set(known):
        raise HttpError(400, f"unknown field {sorted(set(data) - set(known))} in {model}")
    try:
        request: Json = MODELS.sanitize_for_serialization(MODELS.deserialize(Response(data), model))
    except (ValueError, TypeError) as error:
        raise HttpError(400, f"{model}: {error}") from None
    return request


def validate_response(model: str, data: Json) -> Json:
    """The response, which must match a model of the API."""
    assert set(data) <= set(getattr(kfp_server_api, model).attribute_map.values()), (model, sorted(data))
    MODELS.deserialize(Response(data), model)
    return data


def filter_items(items: list[Json], query: Json) -> list[Json]:
    """The first page of the items that match the filter of the query."""
    for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
        assert predicate["operation"] in ("EQUALS", 1) and set(predicate) == {"operation", "key", "stringValue"}
        items = [item for item in items if item.get(predicate["key"]) == predicate["stringValue"]]
    return items[: int(query.get("page_size") or 20)]


def numbers_as_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: numbers_as_floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [numbers_as_floats(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def uploaded_file(headers: Any, body: bytes) -> str:
    message = BytesParser().parsebytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body)
    (part,) = message.get_payload()
    assert part.get_param("name", header="content-disposition") == "uploadfile"
    return part.get_payload(decode=True).decode()


@contextmanager
def serving(api: Any) -> Iterator[str]:
    """Within the block, the address of a server that passes requests to api.handle."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                status, content = 200, api.handle(self.command, self.path, self.headers, body)
            except HttpError as error:
                status, content = error.status, {"code": error.status, "message": error.message}
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
