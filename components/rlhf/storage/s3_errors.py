"""Errors of S3: which are retried and for how long, and error messages for the others."""

import http.client
import random
import time
from collections.abc import Callable
from typing import TypeVar

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ResponseStreamingError,
    SSLError,
)

from components.rlhf.text.errors import InputError, RetryableError

T = TypeVar("T")
FIRST_CONTACT_SECONDS = 10.0  # an endpoint that has never responded is probably misspelled
MAX_WAIT_SECONDS = 20.0
TRANSIENT_CODES = {
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError", "InvalidPart", "NoSuchUpload",
    "OperationAborted", "RequestTimeout", "RequestTimeoutException", "ServiceUnavailable", "SlowDown", "Throttling",
    "ThrottlingException", "TooManyRequestsException", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch",
}  # fmt: skip
# Python's HTTP client treats a response with truncated headers as complete; then these fields are missing.
REQUIRED_FIELDS = {"ContentLength", "ETag", "IsTruncated", "UploadId"}


class StaleObjectError(Exception):
    """The object changed during its download, or the downloaded bytes are corrupt: start over."""


class RetryBudget:
    """Retries transient errors with exponentially growing random waits until the time budget is exhausted."""

    def __init__(self, uri: str, budget_seconds: float) -> None:
        self.uri, self.budget = uri, budget_seconds
        self._has_responded = False

    def run(self, action: str, attempt: Callable[[], T]) -> T:
        """Return the result of attempt. Raises InputError for a permanent error, RetryableError when the budget is exhausted."""
        first_failure: float | None = None
        max_wait = 0.5
        while True:
            try:
                result = attempt()
                self._has_responded = True
                return result
            except (InputError, StaleObjectError):
                raise
            except Exception as error:
                self._has_responded |= _is_response(error)
                if not is_transient(error):
                    if isinstance(error, BotoCoreError | ClientError) or _client_error(error):
                        raise InputError(f"{self.uri}: could not {action}: {describe_error(error)}.") from error
                    raise
                now = time.monotonic()
                first_failure = first_failure or now
                budget = self.budget if self._has_responded else min(self.budget, FIRST_CONTACT_SECONDS)
                wait = random.uniform(0, max_wait)
                if now + wait - first_failure > budget:
                    raise RetryableError(
                        f"{self.uri}: could not {action} in {now - first_failure:.0f} s of retries: {describe_error(error)}; "
                        "check storage.endpoint_url, and that the server is running."
                    ) from error
                time.sleep(wait)
                max_wait = min(MAX_WAIT_SECONDS, 2 * max_wait)


def is_code(error: BaseException, *codes: str) -> bool:
    """Whether it is an error response with one of these codes. For HEAD requests, the code is the HTTP status."""
    client_error = _client_error(error)
    return client_error is not None and str(client_error.response.get("Error", {}).get("Code")) in codes


def is_transient(error: BaseException) -> bool:
    """Whether the request is retryable."""
    client_error = _client_error(error)
    if client_error is not None:
        status = client_error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        is_overload = (status >= 500 and status != 501) or status == 429  # 501: the server will never know this request
        return is_overload or is_code(error, *TRANSIENT_CODES)
    if _was_truncated(error):
        return True
    if isinstance(error, SSLError):
        return "CERTIFICATE_VERIFY_FAILED" not in str(error)  # a lost connection is an SSLError too
    kinds = (
        ConnectionError, HTTPClientError, IncompleteReadError, ResponseStreamingError, FlexibleChecksumError,
        http.client.HTTPException, TimeoutError, BrokenPipeError, ConnectionResetError, ConnectionRefusedError,
        ConnectionAbortedError,
    )  # fmt: skip
    return isinstance(error, kinds) or isinstance(_wrapped_error(error), kinds)


def describe_error(error: BaseException) -> str:
    """The problem and what to do, as part of a sentence."""
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return (
            "no complete credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or an IAM "
            "role, or storage.anonymous for a public bucket"
        )
    if isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "its certificate is not signed by a trusted CA; set storage.ca_bundle"
    if _was_truncated(error):
        return "the response was truncated"
    client_error = _client_error(error)
    if client_error is None:
        return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    code = str(client_error.response.get("Error", {}).get("Code"))
    status = client_error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return "the bucket does not exist; correct the URI or create the bucket"
    if code in ("NoSuchKey", "404"):
        return "it does not exist; correct the URI"
    if code == "RequestTimeTooSkewed":
        return "the clock of this machine is wrong; set it"
    if status in (401, 403):
        return f"access was denied ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and their permissions"
    if status in (301, 307, 400) and code in ("301", "307", "PermanentRedirect", "AuthorizationHeaderMalformed"):
        return "the bucket is in another region; set storage.region"
    message = client_error.response.get("Error", {}).get("Message", "")
    if status == 501:
        return f"the server does not support it ({message or code}); use a server that does (components/rlhf/storage/README.md)".rstrip(
            "."
        )
    return f"the server responded {code}{f' ({message})' if message else ''}".rstrip(".")


def _wrapped_error(error: BaseException) -> BaseException | None:
    return getattr(error, "last_exception", None) or error.__cause__ or error.__context__


def _client_error(error: BaseException) -> ClientError | None:
    """The server's error response, which boto3's transfer functions wrap; None for any other error."""
    if type(error).__name__ in ("S3UploadFailedError", "RetriesExceededError"):
        error = _wrapped_error(error) or error
    return error if isinstance(error, ClientError) else None


def _was_truncated(error: BaseException) -> bool:
    return isinstance(error, KeyError) and error.args[0] in REQUIRED_FIELDS


def _is_response(error: BaseException) -> bool:
    kinds = IncompleteReadError | ResponseStreamingError | FlexibleChecksumError
    return _client_error(error) is not None or _was_truncated(error) or isinstance(error, kinds)
