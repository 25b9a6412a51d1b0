"""What goes wrong with S3: what is worth another try, how long, and one sentence for everything else."""

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

from components.rlhf.text.errors import InputError

T = TypeVar("T")
FIRST_CONTACT_SECONDS = 10.0  # an endpoint that never answered is more likely misspelt than down
MAX_WAIT_SECONDS = 20.0
TRANSIENT_CODES = {
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError", "InvalidPart", "NoSuchUpload",
    "OperationAborted", "RequestTimeout", "RequestTimeoutException", "ServiceUnavailable", "SlowDown", "Throttling",
    "ThrottlingException", "TooManyRequestsException", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch",
}  # fmt: skip
# Python's HTTP client takes an answer whose headers were cut off for a whole one without these.
ALWAYS_ANSWERED = {"ContentLength", "ETag", "IsTruncated", "UploadId"}


class StaleObjectError(Exception):
    """The object is another one than when its download began, or what arrived is not it: begin anew. Says what to do."""


class RetryBudget:
    """Tries again, with growing random waits, what may go well later, until the budget of seconds is spent."""

    def __init__(self, uri: str, budget_seconds: float) -> None:
        self.uri, self.budget = uri, budget_seconds
        self._answered = False

    def run(self, what: str, attempt: Callable[[], T]) -> T:
        """What attempt returns. Raises InputError, one sentence, for what is hopeless or when the budget is spent."""
        failed_at: float | None = None
        for number in range(10**6):
            try:
                result = attempt()
            except (InputError, StaleObjectError):
                raise
            except Exception as error:
                self._answered = self._answered or _answer(error)
                if not is_transient(error):
                    if isinstance(error, BotoCoreError | ClientError) or _client_error(error):
                        raise InputError(f"{self.uri}: could not {what}: {describe_error(error)}.") from error
                    raise
                now = time.monotonic()
                failed_at = failed_at or now
                budget = self.budget if self._answered else min(self.budget, FIRST_CONTACT_SECONDS)
                wait = random.uniform(0, min(MAX_WAIT_SECONDS, 0.5 * 2**number))
                if now + wait - failed_at > budget:
                    raise InputError(
                        f"{self.uri}: could not {what}, after {now - failed_at:.0f} s of trying: {describe_error(error)}; "
                        "see that storage.endpoint_url is right and that the store is up."
                    ) from error
                time.sleep(wait)
            else:
                self._answered = True
                return result
        raise AssertionError("a budget ends sooner")


def is_code(error: BaseException, *codes: str) -> bool:
    """Whether it is the answer of the server with one of these codes (HEAD requests have the status alone)."""
    answer = _client_error(error)
    return answer is not None and str(answer.response.get("Error", {}).get("Code")) in codes


def is_transient(error: BaseException) -> bool:
    """Whether the same request may go well a little later."""
    answer = _client_error(error)
    if answer is not None:
        status = answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or is_code(error, *TRANSIENT_CODES)
    if _was_truncated(error):
        return True
    if isinstance(error, SSLError):
        return "CERTIFICATE_VERIFY_FAILED" not in str(error)  # a connection that was cut says SSLError too
    kinds = (
        ConnectionError, HTTPClientError, IncompleteReadError, ResponseStreamingError, FlexibleChecksumError,
        http.client.HTTPException, TimeoutError, BrokenPipeError, ConnectionResetError, ConnectionRefusedError,
        ConnectionAbortedError,
    )  # fmt: skip
    return isinstance(error, kinds) or isinstance(_cause(error), kinds)


def describe_error(error: BaseException) -> str:
    """What is wrong and what to do, without a final stop."""
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return (
            "no complete credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or an IAM "
            "role, or storage.anonymous for a public bucket"
        )
    if isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "its certificate is signed by nobody this machine trusts; name the CA in storage.ca_bundle"
    if _was_truncated(error):
        return "the answer was cut short"
    answer = _client_error(error)
    if answer is None:
        return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    code = str(answer.response.get("Error", {}).get("Code"))
    status = answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return "the bucket does not exist; correct the URI or make the bucket"
    if code in ("NoSuchKey", "404"):
        return "it does not exist; correct the URI"
    if code == "RequestTimeTooSkewed":
        return "the clock of this machine is wrong; set it"
    if status in (401, 403):
        return f"the credentials were refused ({code}); see AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what they may do"
    if status in (301, 307, 400) and code in ("301", "307", "PermanentRedirect", "AuthorizationHeaderMalformed"):
        return "the bucket lies in another region; set storage.region"
    message = answer.response.get("Error", {}).get("Message", "")
    return f"the server answered {code}{f' ({message})' if message else ''}".rstrip(".")


def _cause(error: BaseException) -> BaseException | None:
    """boto3 wraps what it met in errors of its own."""
    return getattr(error, "last_exception", None) or error.__cause__ or error.__context__


def _client_error(error: BaseException) -> ClientError | None:
    if isinstance(error, ClientError):
        return error
    cause = _cause(error) if type(error).__name__ in ("S3UploadFailedError", "RetriesExceededError") else None
    return cause if isinstance(cause, ClientError) else None


def _was_truncated(error: BaseException) -> bool:
    return isinstance(error, KeyError) and error.args[0] in ALWAYS_ANSWERED


def _answer(error: BaseException) -> bool:
    kinds = IncompleteReadError | ResponseStreamingError | FlexibleChecksumError
    return _client_error(error) is not None or _was_truncated(error) or isinstance(error, kinds)
