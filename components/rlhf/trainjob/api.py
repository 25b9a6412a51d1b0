"""The Kubernetes API as JSON: requests that outlast outages, streams, and errors as sentences."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kubernetes import client, config
from urllib3.exceptions import HTTPError

from components.rlhf.text.errors import InputError, RetryableError

Object = dict[str, Any]
Query = Mapping[str, str | int]
GROUP = "trainer.kubeflow.org"
TRANSIENT = {401, 408, 429, 500, 502, 503, 504}  # 401 while the token of the account is renewed
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
MAX_PAUSE_SECONDS = 30.0
MANIFESTS = "manifests/components/trainjob"


class ApiError(Exception):
    """The server's answer to a request that failed; status 0 if there was none."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    @property
    def is_transient(self) -> bool:
        return self.status == 0 or self.status in TRANSIENT


class Api:
    """Requests to the API server in one namespace. log receives a line when the server stops to answer, and when it does again."""

    def __init__(
        self,
        api_client: client.ApiClient,
        namespace: str,
        log: Callable[[str], None],
        *,
        pause_seconds: float = 1.0,
        outage_seconds: float = 1800.0,
    ) -> None:
        self.namespace, self.outage_seconds = namespace, outage_seconds
        self._client, self._log, self._pause_seconds = api_client, log, pause_seconds
        self.jobs = f"/apis/{GROUP}/v1alpha1/namespaces/{namespace}/trainjobs"
        self.pods = f"/api/v1/namespaces/{namespace}/pods"

    def request(self, method: str, path: str, *, query: Query | None = None, body: Object | None = None) -> Object:
        """A request, repeated until the server answers. Raises ApiError for a refusal, and RetryableError after outage_seconds."""
        outage = Outage(self)
        while True:
            try:
                answer = json.loads(self._send(method, path, query, body, READ_SECONDS, stream=False).data)
                if not isinstance(answer, dict):
                    raise ApiError(0, "the answer is no object")
                outage.end()
                return answer
            except ValueError:  # the page of a proxy
                outage.wait("the answer is not JSON")
            except HTTPError as error:
                outage.wait(type(error).__name__)
            except ApiError as error:
                if not error.is_transient:
                    raise
                outage.wait(str(error))

    def lines(self, path: str, query: Query, *, read_seconds: float) -> Iterator[bytes]:
        """The lines of a stream until the server or the network ends it. Raises ApiError for a refusal and a lost connection."""
        try:
            response = self._send("GET", path, query, None, read_seconds, stream=True)
            try:
                rest = b""
                for chunk in response.stream(amt=None, decode_content=False):
                    *complete, rest = (rest + chunk).split(b"\n")
                    yield from complete
                if rest:
                    yield rest
            finally:
                response.close()
        except HTTPError as error:
            raise ApiError(0, type(error).__name__) from None

    def _send(
        self, method: str, path: str, query: Query | None, body: Object | None, read_seconds: float, *, stream: bool
    ) -> Any:
        try:
            response = self._client.call_api(
                path,
                method,
                query_params=list((query or {}).items()),
                header_params={"Accept": "application/json, */*"}
                | ({"Content-Type": "application/json"} if body else {}),
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=(CONNECT_SECONDS, read_seconds),
            )
        except client.ApiException as error:  # such as a certificate that does not fit
            raise ApiError(error.status or 0, message_of(error.body) or str(error.reason).splitlines()[0]) from None
        if not 200 <= response.status < 300:
            raise ApiError(response.status, message_of(response.data) or f"HTTP {response.status}")
        return response

    def say(self, text: str) -> None:
        self._log(text)

    def pause(self, attempt: int) -> float:
        """Seconds to wait before a request is repeated."""
        return float(min(self._pause_seconds * 2**attempt, MAX_PAUSE_SECONDS))


class Outage:
    """Counts the failures of one request in a row."""

    def __init__(self, api: Api) -> None:
        self._api, self._attempt, self._start = api, 0, 0.0

    def wait(self, reason: str, stop: threading.Event | None = None) -> None:
        """Sleep before another attempt. Raises RetryableError if the server has not answered for the whole outage_seconds."""
        now = time.monotonic()
        self._start = self._start or now
        if now - self._start > self._api.outage_seconds:
            raise RetryableError(
                f"The Kubernetes API has not answered for {self._api.outage_seconds / 60:.0f} minutes ({reason}); the TrainJob continues, "
                "and another attempt of this task will find it."
            )
        if self._attempt == 1:
            self._api.say(f"the Kubernetes API does not answer ({reason}); trying again")
        (stop or threading.Event()).wait(self._api.pause(self._attempt))
        self._attempt += 1

    def end(self) -> None:
        if self._attempt > 1:
            self._api.say("the Kubernetes API answers again")
        self._attempt, self._start = 0, 0.0


def connect(namespace: str, log: Callable[[str], None]) -> Api:
    """The API server of this pod, or that of KUBECONFIG. Raises InputError if there is none."""
    configuration = client.Configuration()
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST"):
            config.load_incluster_config(client_configuration=configuration)
        else:
            config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)
    except config.ConfigException as error:
        raise InputError(
            f"The Kubernetes API cannot be used ({error}); the service account of the run must mount its token "
            "(automountServiceAccountToken)."
        ) from None
    configuration.retries = False
    return Api(client.ApiClient(configuration), namespace, log)


def message_of(body: Any) -> str:
    """The message of a Status object, or ""."""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, TypeError, KeyError):
        return ""


def explain(error: ApiError, verb: str, resource: str, namespace: str) -> InputError:
    """The sentence for a refused request: a missing permission, a missing definition, or what the server says."""
    message = " ".join(str(error).split())
    if error.status == 403 and "admission webhook" not in message and "exceeded quota" not in message:
        return InputError(
            f"The service account of the run may not {verb} {resource} in namespace {namespace}; apply {MANIFESTS}, and let "
            f"cluster.service_account be the account that it names ({message})."
        )
    if error.status == 404 and resource == f"trainjobs.{GROUP}":
        return InputError(
            f"The cluster has no {resource}/v1alpha1; install Kubeflow Trainer 2.2 or newer (manifests/README.md)."
        )
    if error.status == 400 and "unknown field" in message:
        return InputError(
            f"Kubeflow Trainer is too old for this TrainJob ({message}); install version 2.2 or newer (manifests/README.md)."
        )
    if "TrainingRuntime" in message or "trainingRuntime" in message:
        return InputError(
            f"The TrainJob's runtime was refused ({message}); apply {MANIFESTS}, or correct cluster.runtime."
        )
    return InputError(f"Kubernetes refused to {verb} {resource} in namespace {namespace}: {message}")
