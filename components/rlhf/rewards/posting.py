"""JSON posted to a server by many threads, with retries, time-outs, a rate limit, and a key from the environment."""

import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, ReadTimeoutError

from components.rlhf.text.errors import InputError, RetryableError

RETRIED = (408, 409, 425, 429)  # and all from 500
SECONDS = 1.0  # the unit of waits between retries
MAX_WAIT_SECONDS, MAX_RETRY_AFTER_SECONDS, LOG_SECONDS = 60.0, 120.0, 15.0
MAX_BODY_BYTES = 16 * 2**20

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where JSON is posted to, with which key, and how patiently."""

    address: str
    name: str  # as in "gpt has answered 3 of 5 requests"
    prefix: str  # of every message, such as "The reward safety: "
    key: str  # of its settings, for advice: judge, ppo.rewards.1
    token_setting: str  # name of the setting with the environment variable: api_key_variable
    token_variable: str | None
    timeout_seconds: float
    max_retries: int
    max_concurrency: int
    requests_per_minute: int | None
    max_failures_in_a_row: int  # of requests after their retries: then the server is taken to be down
    has_models: bool  # a model is one of its settings, and so is a rate limit


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a request has no answer: a rejection concerns this request alone, anything else may concern all."""

    message: str  # a sentence without the full stop
    is_rejection: bool = False
    retry_after: float = 0.0  # seconds that the server asks to wait

    def error(self, prefix: str) -> InputError:
        return (InputError if self.is_rejection else RetryableError)(f"{prefix}{self.message}.")


class Poster(Generic[T]):
    """Posts to one server. read(body, content) makes a T of the answer to a body, or a Failure if it is not what it should be."""

    def __init__(self, server: Server, read: Callable[[Any, bytes], T | Failure], log: Callable[[str], None]) -> None:
        """Raises InputError for a key that cannot be one."""
        self.server, self.read, self.log = server, read, log
        self.token = os.environ.get(server.token_variable or "", "").strip()
        if not (self.token.isascii() and self.token.isprintable()):
            raise InputError(
                f"{server.prefix}The API key in {server.token_variable} contains characters that no key has; correct it."
            )
        self.session = requests.Session()
        adapter = HTTPAdapter(pool_maxsize=server.max_concurrency)
        self.session.mount("https://", adapter)
        self.session.mount("http://", adapter)
        self.session.auth = self._set_token  # without it, requests would send the credentials of a ~/.netrc

    def post_all(
        self, bodies: Mapping[str, Any], keep: Callable[[str, T], None] = lambda key, answer: None
    ) -> dict[str, T | Failure]:
        """The answer to each body, or why it has none. keep(key, answer) is called by the thread that has received it.

        Raises RetryableError if the server is down, and InputError if it refuses the key or the address.
        """
        calls = Calls(requests_per_minute=self.server.requests_per_minute)
        results: dict[str, T | Failure] = {}
        failures_in_a_row = 0
        executor = ThreadPoolExecutor(self.server.max_concurrency)
        try:
            futures = {
                executor.submit(self._post_patiently, key, body, calls, keep): key for key, body in bodies.items()
            }
            logged = time.monotonic()
            for number, future in enumerate(as_completed(futures), start=1):
                results[futures[future]] = result = future.result()
                if isinstance(result, Failure):
                    failures_in_a_row += not result.is_rejection
                    if failures_in_a_row >= self.server.max_failures_in_a_row:
                        raise result.error(self.server.prefix)
                else:
                    failures_in_a_row = 0
                if time.monotonic() - logged > LOG_SECONDS:
                    logged = time.monotonic()
                    self.log(f"{self.server.name} has answered {number} of {len(futures)} requests")
        finally:
            calls.stopped.set()
            executor.shutdown(cancel_futures=True)  # what is on its way is paid for
        return results

    def close(self) -> None:
        """Close the connections; the next request would open new ones."""
        self.session.close()

    def _post_patiently(self, key: str, body: Any, calls: "Calls", keep: Callable[[str, T], None]) -> T | Failure:
        """The answer to one request, after retries. Raises InputError for what no request to this server can succeed with."""
        failure = Failure(message=f"{self.server.address} was not asked", is_rejection=False)
        for attempt in range(self.server.max_retries + 1):
            if attempt and not calls.wait_before_retry(attempt, failure.retry_after):
                break
            calls.wait_for_turn()
            if calls.stopped.is_set():
                break
            result = self._post(body)
            if not isinstance(result, Failure):
                keep(key, result)
                return result
            failure = result
            if failure.is_rejection:
                break
        return failure

    def _post(self, body: Any) -> T | Failure:
        server, timeout = self.server, self.server.timeout_seconds
        try:
            response = self.session.post(
                server.address, json=body, timeout=(min(timeout, 30.0), timeout), allow_redirects=False, stream=True
            )
            content = _read_within(response, timeout)
        except (requests.Timeout, ReadTimeoutError, TimeoutError):
            return Failure(
                message=f"{server.address} did not answer within {timeout:g} seconds; raise {server.key}.timeout_seconds, or try again "
                "later"
            )
        except (requests.RequestException, HTTPError) as error:
            return Failure(
                message=f"{server.address} cannot be reached ({_reason(error)}); correct {server.key}.url, or try again later"
            )
        return self._read_response(body, response, content)

    def _read_response(self, body: Any, response: requests.Response, content: bytes) -> T | Failure:
        server, status, detail = self.server, response.status_code, _detail(content, response.reason)
        if status in RETRIED or status >= 500:
            try:
                retry_after = float(response.headers.get("Retry-After", ""))
            except ValueError:
                retry_after = 0.0
            advice = f"try again later, or {'set' if server.has_models else 'lower'} {server.key}."
            advice += "requests_per_minute" if server.has_models else "max_concurrency"
            return Failure(
                message=f"{server.address} answers {status} ({detail}) after {server.max_retries} retries; {advice}",
                retry_after=retry_after,
            )
        if status in (401, 403):
            raise InputError(f"{server.prefix}{server.address} answers {status} ({detail}); {self._token_advice()}.")
        if status in (404, 405) or response.is_redirect:
            advice = f"correct {server.key}.url" + (f" or {server.key}.model" if server.has_models else "")
            raise InputError(f"{server.prefix}{server.address} answers {status} ({detail}); {advice}.")
        if status != 200:
            settings = "the settings of the judge" if server.key == "judge" else f"the settings {server.key}"
            return Failure(
                message=f"{server.address} rejects the request ({status}: {detail}); correct {settings}",
                is_rejection=True,
            )
        return self.read(body, content)

    def _set_token(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request

    def _token_advice(self) -> str:
        variable = self.server.token_variable
        if not variable:
            return f"set {self.server.key}.{self.server.token_setting} to the environment variable with the API key"
        if not self.token:
            return f"set the environment variable {variable} to the API key (on a cluster, that key of the Secret cluster.secrets.judge)"
        return f"correct the API key in {variable}"


class Calls:
    """Spaces the starts of requests evenly, and ends all waiting when stopped is set."""

    def __init__(self, *, requests_per_minute: int | None) -> None:
        self.interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self.stopped = threading.Event()
        self._next, self._lock = 0.0, threading.Lock()

    def wait_for_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(self._next, now)
            self._next = turn + self.interval
        self.stopped.wait(turn - now)

    def wait_before_retry(self, attempt: int, retry_after: float) -> bool:
        """Wait 1, 2, 4... seconds, or as long as the server asks, within limits; False if all requests are to end."""
        wait = max(min(2.0 ** (attempt - 1), MAX_WAIT_SECONDS), min(retry_after, MAX_RETRY_AFTER_SECONDS))
        return not self.stopped.wait(wait * SECONDS * random.uniform(1.0, 1.25))


def one_line(content: bytes) -> str:
    """The beginning of a body as one line of text."""
    return " ".join(content[:1000].decode("utf-8", errors="replace").split())


def _read_within(response: requests.Response, seconds: float) -> bytes:
    """The body. Raises TimeoutError if it takes longer than this, however often something arrives."""
    deadline, content = time.monotonic() + seconds, b""
    while chunk := response.raw.read1(2**16, decode_content=True):  # what has arrived
        content += chunk
        if time.monotonic() > deadline or len(content) > MAX_BODY_BYTES:
            response.close()
            raise TimeoutError
    return content


def _detail(content: bytes, default: str) -> str:
    """The message of an error response in the format of OpenAI, or its first characters."""
    try:
        parsed = json.loads(content)
        error = parsed.get("error", parsed)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        text = one_line(content) or default or ""
    return " ".join(text.split())[:200]


def _reason(error: requests.RequestException | HTTPError) -> str:
    first = error.args[0] if error.args else error
    return str(getattr(first, "reason", first)).rpartition(": ")[2][:200] or type(error).__name__
