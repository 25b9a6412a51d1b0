"""A Kubeflow Pipelines server: whether it is one, whether it is new enough, whether we may use it; its errors as sentences."""

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

MINIMUM = (2, 16)  # the first whose tasks take a security context; what else we set is older
SECONDS = 10.0


@dataclass(frozen=True)
class ServerAccess:
    """How the server is reached. token and cookies are secrets and appear in no message."""

    host: str
    namespace: str | None = None  # of the user, on a server for several users; else where it is installed
    token: str | None = None
    cookies: str | None = None
    ca_bundle: Path | None = None


@dataclass(frozen=True)
class Server:
    client: Any  # kfp.Client
    multi_user: bool
    version: str  # "unknown" where the server does not say


def read_secret_file(path: Path | None, option: str) -> str | None:
    """The content of a file with a token or cookies."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InputError(f"{option} {path} cannot be read ({reason}); write the secret into it.") from None
    if not text:
        raise InputError(f"{option} {path} is empty; write the secret into it.")
    return text


def connect(access: ServerAccess) -> Server:
    """A client of the server, after seconds at the most. Raises InputError when there is none, it is too old, or it refuses us."""
    if not re.match(r"https?://[^/]", access.host):
        raise InputError(f"--host {access.host} is no address; write http(s)://HOST[:PORT].")
    health = _get(access, "healthz")
    # The UI's own server answers for the API that it passes requests on to, in names of its own.
    if health.get("apiServerReady") is False:
        raise InputError(
            f"{access.host} is the UI of Kubeflow Pipelines, and the API behind it does not answer; wait for its pods."
        )
    multi_user = bool(health.get("multi_user"))
    version = str(health.get("tag_name") or health.get("apiServerTagName") or "unknown")
    _require_version(access.host, version, health)
    if multi_user and not access.namespace:
        raise InputError(f"{access.host} serves several users; name your namespace with --namespace.")
    # Health is open to all in places; this is not. kfp's client would take a login page for an empty answer.
    _get(access, "experiments", page_size="1", **({"namespace": str(access.namespace)} if multi_user else {}))
    with quiet():
        from kfp import Client

        client = Client(
            host=access.host,
            # In-cluster credentials are looked up by it; to a server of one user a namespace must not be sent at all.
            namespace=access.namespace if multi_user and access.namespace else "kubeflow",
            existing_token=access.token,
            cookies=access.cookies,
            ssl_ca_cert=str(access.ca_bundle) if access.ca_bundle else None,
        )
    return Server(client, multi_user, version)


def _get(access: ServerAccess, path: str, **query: str) -> dict[str, Any]:
    """What the server answers. kfp's own client would try for half a minute, and breaks on a wrong certificate."""
    headers = {"Accept": "application/json"}
    if access.token:
        headers["authorization"] = f"Bearer {access.token}"
    if access.cookies:
        headers["Cookie"] = access.cookies
    pool = urllib3.PoolManager(
        ca_certs=str(access.ca_bundle) if access.ca_bundle else certifi.where(), timeout=SECONDS, retries=False
    )
    with translate_api_errors(access):
        answer = pool.request("GET", f"{access.host.rstrip('/')}/apis/v2beta1/{path}", fields=query, headers=headers)
        if answer.status >= 400 and not (answer.status == 404 and path == "healthz"):
            raise ApiException(http_resp=RESTResponse(answer))
    if answer.status == 404:
        raise InputError(
            f"{access.host} is no Kubeflow Pipelines of version 2 (no /apis/v2beta1/healthz); correct --host, or upgrade it."
        )
    try:
        if answer.status != 200:
            raise ValueError(f"a redirection ({answer.status})")
        found = json.loads(answer.data)
        if not isinstance(found, dict):
            raise ValueError("no object")
    except ValueError:
        what = "a page" if answer.status == 200 else f"a redirection ({answer.status})"
        raise InputError(
            f"{access.host} answers with {what} where Kubeflow Pipelines' API answers JSON, as a login does: give a token "
            "(--token-file) or a session's cookies (--cookies-file), a new one if it has expired, or correct --host."
        ) from None
    return found


def _require_version(host: str, version: str, health: dict[str, Any]) -> None:
    """Where no version is told (builds without a tag), what the answer holds tells the oldest."""
    numbers = re.match(r"v?(\d+)\.(\d+)", version)
    too_old = (
        tuple(map(int, numbers.groups())) < MINIMUM
        if numbers
        else not {"pipeline_store", "pipelineStore"} & set(health)
    )
    if too_old:
        shown = version if numbers else "older than 2.14"
        raise InputError(
            f"{host} runs Kubeflow Pipelines {shown}, and this pipeline needs {'.'.join(map(str, MINIMUM))} or newer "
            "(security contexts, optional secrets, node selectors as run parameters); upgrade it."
        )


@contextlib.contextmanager
def translate_api_errors(access: ServerAccess) -> Iterator[None]:
    """Within the block, what the API and the network raise becomes one sentence."""
    try:
        with quiet():
            yield
    except ApiException as error:
        raise InputError(_sentence(error, access)) from None
    except urllib3.exceptions.HTTPError as error:
        raise InputError(f"{access.host} cannot be reached ({_cause(error)}); {_advice(error)}.") from None


def _sentence(error: ApiException, access: ServerAccess) -> str:
    where = f"namespace {access.namespace}" if access.namespace else "this server"
    if error.status == 401:
        return f"{access.host} does not accept who you are (401); give a token (--token-file or KFP_TOKEN), a new one if it has expired."
    if error.status == 403:
        return f"{access.host} does not let you use {where} (403); ask its owner for edit rights, or choose another --namespace."
    text = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or error.reason)
    said = re.search(r'"(?:message|error|error_message)"\s*:\s*"((?:[^"\\]|\\.)*)"', text)
    reason = (said.group(1) if said else text).replace("\\n", " ").replace('\\"', '"')
    return f"{access.host} refuses ({error.status}): {' '.join(reason.split())[:400]}"


def _cause(error: Exception) -> str:
    """The innermost reason, without the objects that urllib3 prints."""
    inner = getattr(error, "reason", None) or error
    text = re.sub(r"^<[^>]*>: |^\w+\([^)]*\): ", "", str(inner))
    return text.removeprefix("Failed to establish a new connection: ")[:200]


def _advice(error: Exception) -> str:
    if "CERTIFICATE" in str(error).upper():
        return "give the CA's certificate with --ca-bundle"
    return "check --host, and the port-forward if it goes through one (kubectl -n kubeflow port-forward service/ml-pipeline-ui 8080:80)"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """kfp's client warns of versions long gone and prints links of its own."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
