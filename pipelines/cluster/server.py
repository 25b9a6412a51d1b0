"""Connection to a Kubeflow Pipelines server: version and access checks, and its errors as InputError."""

import contextlib
import io
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import certifi
import urllib3
from kfp_server_api.exceptions import ApiException
from kfp_server_api.rest import RESTResponse

from components.rlhf.text.errors import InputError

MIN_VERSION = (2, 16)  # the first with security contexts on tasks
TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class ServerAccess:
    """Address and credentials of a server. token and cookies are secrets, which no message may contain."""

    host: str
    namespace: str | None = None  # the profile namespace on a multi-user server, else where it is installed
    token: str | None = None
    cookies: str | None = None
    ca_bundle: Path | None = None


@dataclass(frozen=True)
class Server:
    client: Any  # kfp.Client
    multi_user: bool
    version: str  # "unknown" if the server does not report it


def read_secret_file(path: Path | None, option: str) -> str | None:
    """The content of a file with a token or cookies. Raises InputError if it cannot be read or is empty."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{option} {path} cannot be read ({reason}); write the secret into it.") from None
    if not text:
        raise InputError(f"{option} {path} is empty; write the secret into it.")
    return text


def connect(access: ServerAccess) -> Server:
    """Connect within seconds. Raises InputError if the server is unreachable, too old, or denies access."""
    if not re.match(r"https?://[^/]", access.host):
        raise InputError(f"--host {access.host} is not a URL; write http(s)://HOST[:PORT].")
    health = _get(access, "healthz")
    # The UI server proxies the API, but answers healthz itself, with other field names.
    if health.get("apiServerReady") is False:
        raise InputError(
            f"{access.host} is the Kubeflow Pipelines UI, and the API behind it does not respond; wait until its pods are ready."
        )
    multi_user = bool(health.get("multi_user"))
    version = str(health.get("tag_name") or health.get("apiServerTagName") or "unknown")
    _require_version(access.host, version, health)
    if multi_user and not access.namespace:
        raise InputError(f"{access.host} is a multi-user server; pass your profile namespace with --namespace.")
    # Some gateways leave healthz open. kfp's client would take a login page for an empty list.
    _get(access, "experiments", page_size="1", **({"namespace": str(access.namespace)} if multi_user else {}))
    with suppress_client_output():
        from kfp import Client

        client = Client(
            host=access.host,
            # The client only uses it to look up in-cluster credentials.
            namespace=access.namespace if multi_user and access.namespace else "kubeflow",
            existing_token=access.token,
            cookies=access.cookies,
            ssl_ca_cert=str(access.ca_bundle) if access.ca_bundle else None,
        )
    return Server(client, multi_user, version)


def _get(access: ServerAccess, path: str, **query: str) -> dict[str, Any]:
    """The JSON object at a path of the API. kfp's client would retry for half a minute, and crash on an invalid certificate."""
    headers = {"Accept": "application/json"}
    if access.token:
        headers["authorization"] = f"Bearer {access.token}"
    if access.cookies:
        headers["Cookie"] = access.cookies
    pool = urllib3.PoolManager(
        ca_certs=str(access.ca_bundle) if access.ca_bundle else certifi.where(), timeout=TIMEOUT_SECONDS, retries=False
    )
    with translate_api_errors(access):
        response = pool.request("GET", f"{access.host.rstrip('/')}/apis/v2beta1/{path}", fields=query, headers=headers)
        if response.status >= 400 and not (response.status == 404 and path == "healthz"):
            raise ApiException(http_resp=RESTResponse(response))
    if response.status == 404:
        raise InputError(
            f"{access.host} is not a Kubeflow Pipelines 2 server (no /apis/v2beta1/healthz); correct --host, or upgrade the server."
        )
    content = None
    if response.status == 200:
        with contextlib.suppress(ValueError):
            content = json.loads(response.data)
    if not isinstance(content, dict):
        received = "other content (a login page?)" if response.status == 200 else f"a redirect ({response.status})"
        raise InputError(
            f"{access.host}: expected JSON from the KFP API, got {received}; pass --token-file or --cookies-file with "
            "credentials that have not expired, or correct --host."
        )
    return content


def _require_version(host: str, version: str, health: dict[str, Any]) -> None:
    """Raise InputError for an old server. One that reports no version (a build without a tag) is old if it reports no pipeline store."""
    numbers = re.match(r"v?(\d+)\.(\d+)", version)
    too_old = (
        tuple(map(int, numbers.groups())) < MIN_VERSION
        if numbers
        else not {"pipeline_store", "pipelineStore"} & set(health)
    )
    if too_old:
        shown = version if numbers else "older than 2.14"
        raise InputError(
            f"{host} runs Kubeflow Pipelines {shown}, but this pipeline needs {'.'.join(map(str, MIN_VERSION))} or newer "
            "(security contexts, optional secrets, node selectors as run parameters); upgrade the server."
        )


@contextlib.contextmanager
def translate_api_errors(access: ServerAccess) -> Iterator[None]:
    """Turn errors of the API and the network within the block into InputError."""
    try:
        with suppress_client_output():
            yield
    except ApiException as error:
        raise InputError(_error_message(error, access)) from None
    except urllib3.exceptions.HTTPError as error:
        raise InputError(f"{access.host} cannot be reached ({_cause(error)}); {_advice(error)}.") from None


def _error_message(error: ApiException, access: ServerAccess) -> str:
    where = f"namespace {access.namespace}" if access.namespace else "this server"
    if error.status == 401:
        return f"{access.host} rejected the credentials (401); pass a token that has not expired with --token-file or KFP_TOKEN."
    if error.status == 403:
        return f"{access.host} denies access to {where} (403); ask its owner for edit permission, or choose another --namespace."
    text = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or error.reason)
    match = re.search(r'"(?:message|error|error_message)"\s*:\s*"((?:[^"\\]|\\.)*)"', text)
    reason = (match.group(1) if match else text).replace("\\n", " ").replace('\\"', '"')
    return f"{access.host} returned error {error.status}: {' '.join(reason.split())[:400]}"


def _cause(error: Exception) -> str:
    """The innermost reason, without the object representations that urllib3 puts in front of it."""
    inner = getattr(error, "reason", None) or error
    text = re.sub(r"^<[^>]*>: |^\w+\([^)]*\): ", "", str(inner))
    return text.removeprefix("Failed to establish a new connection: ")[:200]


def _advice(error: Exception) -> str:
    if "CERTIFICATE" in str(error).upper():
        return "pass the CA certificate with --ca-bundle"
    return "check --host and, if it uses one, the port-forward (kubectl -n kubeflow port-forward service/ml-pipeline-ui 8080:80)"


@contextlib.contextmanager
def suppress_client_output() -> Iterator[None]:
    """Suppress the warnings and links that kfp's client prints."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
