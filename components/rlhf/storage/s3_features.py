"""What S3 servers may lack, how that is noticed, and what it costs.

SeaweedFS has all of this; storage/README.md says which other servers were tried.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from components.rlhf.storage.s3_errors import is_code

CHECKSUM_SETTINGS = ("request_checksum_calculation", "response_checksum_validation")  # of botocore's Config
CHECKSUMS, CONDITIONAL_WRITES, DELETE_OBJECTS, LIST_UPLOADS = (
    "checksum headers", "conditional writes", "DeleteObjects", "ListMultipartUploads",
)  # fmt: skip
COST = {
    CHECKSUMS: "bytes that were corrupted on their way are noticed by a download only, not by the upload",
    CONDITIONAL_WRITES: "two processes that start at the same moment are told apart only by what each reads back",
    DELETE_OBJECTS: "objects are deleted one by one",
    LIST_UPLOADS: "parts of interrupted uploads stay until a lifecycle rule of the bucket deletes them",
}
NOT_IMPLEMENTED = ("NotImplemented", "501", "MethodNotAllowed", "405")


@dataclass
class StoreFeatures:
    """What is known of one server."""

    uri: str
    log: Callable[[str], None] | None
    conditional_writes: bool | None = None  # None: not tried yet

    def __post_init__(self) -> None:
        self._missing: set[str] = set()

    def note(self, feature: str) -> None:
        """Remember that the server lacks a feature, and log it once."""
        if feature not in self._missing and self.log:
            self.log(f"{self.uri} does not support {feature}: {COST[feature]}")
        self._missing.add(feature)

    def try_optional(self, feature: str, request: Callable[[], object]) -> bool:
        """Make a request unless the server is known to lack it; return whether it has it."""
        if feature in self._missing:
            return False
        try:
            request()
        except Exception as error:
            if not is_code(error, *NOT_IMPLEMENTED):
                raise
            self.note(feature)
            return False
        return True


def sends_checksums(client: Any) -> bool:
    return bool(client.meta.config.request_checksum_calculation != "when_required")


def checksum_mode(client: Any) -> dict[str, str]:
    """Argument of a GET or HEAD that asks for checksums, unless the client does not want any."""
    wanted = client.meta.config.response_checksum_validation != "when_required"
    return {"ChecksumMode": "ENABLED"} if wanted else {}


def may_reject_checksums(error: BaseException) -> bool:
    """Whether a write may have failed because of checksum headers or trailers.

    Servers that do not know them answer in many ways: they lack a feature, an argument is invalid, or, because the trailer is part of
    what is signed, the signature does not match.
    """
    return is_code(
        error, *NOT_IMPLEMENTED, "InvalidArgument", "InvalidRequest", "BadRequest", "400", "InvalidDigest", "MalformedTrailerError",
        "MissingContentLength", "411", "SignatureDoesNotMatch", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch",
    )  # fmt: skip


def rejects_overwriting(client: Any, location: dict[str, str]) -> bool:
    """Whether If-None-Match prevents that an existing object is overwritten. Some servers ignore the header."""
    try:
        client.put_object(**location, Body=b"probe", IfNoneMatch="*")
    except Exception as error:
        if is_code(error, "PreconditionFailed", "412"):
            return True
        if is_code(error, *NOT_IMPLEMENTED, "InvalidArgument", "InvalidRequest", "400"):
            return False
        raise
    return False
