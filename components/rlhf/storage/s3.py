"""A store in an S3 bucket, based on boto3: parallel transfers with checksums, retries, and resumable downloads.

A prefix is a folder: it matches keys under `prefix/`. Credentials come from boto3's default chain, and so does whether checksums are
sent (AWS_REQUEST_CHECKSUM_CALCULATION). Where a server lacks checksums, conditional writes or the deletion of several objects, the store
works without them, and logs what that costs.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore import UNSIGNED
from botocore.config import Config

from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.s3_download import CRC32, THREADS, crc32_of, download_object
from components.rlhf.storage.s3_errors import RetryBudget, describe_error, is_code
from components.rlhf.storage.s3_features import (
    CHECKSUM_SETTINGS,
    CHECKSUMS,
    CONDITIONAL_WRITES,
    DELETE_OBJECTS,
    LIST_UPLOADS,
    StoreFeatures,
    checksum_mode,
    may_reject_checksums,
    rejects_overwriting,
    sends_checksums,
)
from components.rlhf.storage.store import require_prefix
from components.rlhf.storage.transfer import TransferProgress
from components.rlhf.text.errors import InputError

PREFIX = "s3://"
PART_BYTES = 16 * 2**20
CONNECT_SECONDS = 5
READ_SECONDS = 60
WRITER = "writer"


class S3Store:
    """Objects under s3://BUCKET/PREFIX. log receives progress lines of long transfers.

    Every method raises InputError for permanent errors (credentials, bucket, certificate), and when retries have taken
    config.retry_minutes, or 10 seconds if the server has never responded.
    """

    def __init__(self, uri: str, config: StorageConfig, log: Callable[[str], None] | None = None) -> None:
        bucket, _, prefix = uri.removeprefix(PREFIX).partition("/")
        if not uri.startswith(PREFIX) or not bucket:
            raise InputError(f"{uri} has no bucket; write s3://BUCKET/PREFIX.")
        self.uri = uri.rstrip("/")
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self._config = config
        self._retries = RetryBudget(self.uri, 60 * config.retry_minutes)
        self._log = log
        self._bucket_exists = False
        self._open_uploads: dict[str, str] = {}  # upload id -> full key, of this client's multipart uploads
        self._features = StoreFeatures(self.uri, log)
        self._connect()

    def _connect(self, *, checksums: bool = True) -> None:
        self.client = make_client(self._config, checksums=checksums)
        events = self.client.meta.events
        events.register("after-call.s3.CreateMultipartUpload", self._on_upload_created)
        events.register("after-call.s3.CompleteMultipartUpload", self._on_upload_completed)

    def list(self, prefix: str = "") -> dict[str, int]:
        return self._retries.run("list", lambda: {key: size for key, size in self._list_objects(prefix) if key})

    def read(self, key: str, *, limit: int) -> bytes | None:
        def attempt() -> bytes | None:
            try:
                location = {"Bucket": self.bucket, "Key": self._full_key(key)}
                response = self.client.get_object(**location, **checksum_mode(self.client))
            except Exception as error:
                if is_code(error, "NoSuchKey"):
                    return None
                raise
            with contextlib.closing(response["Body"]) as body:
                if response["ContentLength"] > limit:
                    raise InputError(f"{self._uri(key)} is longer than {limit} bytes; delete it.")
                data: bytes = body.read()
            return data

        return self._retries.run(f"read {key}", attempt)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Bytes start to start + length - 1 of an object, or as many of them as it has."""

        def attempt() -> bytes:
            location = {"Bucket": self.bucket, "Key": self._full_key(key)}
            response = self.client.get_object(**location, Range=f"bytes={start}-{start + length - 1}")
            with contextlib.closing(response["Body"]) as body:
                data: bytes = body.read()
            return data

        return self._retries.run(f"read {key}", attempt)

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        write_id = uuid.uuid4().hex  # identifies this write if the response to an earlier attempt was lost
        location = {"Bucket": self.bucket, "Key": self._full_key(key)}
        is_conditional = only_if_absent and self._retries.run(f"write {key}", self._has_conditional_writes)
        condition = {"IfNoneMatch": "*"} if is_conditional else {}

        def attempt() -> bool:
            self._require_bucket()
            if only_if_absent and not is_conditional and self._writer_of(location) not in (None, write_id):
                return False
            try:
                self._with_checksums_if_possible(
                    lambda: self.client.put_object(**location, Body=data, Metadata={WRITER: write_id}, **condition)
                )
            except Exception as error:
                if not is_code(error, "PreconditionFailed", "412"):
                    raise
                return self._writer_of(location) == write_id
            return True

        return self._retries.run(f"write {key}", attempt)

    def upload(self, file: Path, key: str) -> None:
        """Upload a file atomically, with its CRC32 as metadata."""
        size, full = file.stat().st_size, self._full_key(key)
        extra = {"Metadata": {CRC32: crc32_of(file)}}

        def attempt() -> None:
            self._require_bucket()
            progress = TransferProgress(f"uploading {self._uri(key)}", size, self._log)
            try:
                self._with_checksums_if_possible(
                    lambda: self.client.upload_file(
                        str(file), self.bucket, full, ExtraArgs=extra, Callback=progress.add, Config=_transfer_config()
                    )
                )
            except BaseException:
                self._abort_own_uploads(full)
                raise
            uploaded = self.client.head_object(Bucket=self.bucket, Key=full)["ContentLength"]
            if uploaded != size:
                raise InputError(
                    f"{file} changed while it was uploaded to {self._uri(key)} ({size} bytes before, {uploaded} in the "
                    "store); upload it again when nothing writes to it."
                )

        self._retries.run(f"upload {key}", attempt)

    def download(self, key: str, file: Path) -> None:
        """Download an object atomically and verify its CRC32; a later call resumes an interrupted download."""
        file.parent.mkdir(parents=True, exist_ok=True)
        download_object(self.client, self.bucket, self._full_key(key), file, self._retries, self._log)

    def delete(self, prefix: str) -> None:
        require_prefix(prefix)

        def attempt() -> None:
            full = self._full_key(prefix)
            keys = [self._full_key(key) for key, _ in self._list_objects(prefix)]
            keys += [full]
            for start in range(0, len(keys), 1000):  # the server's limit for one request
                self._delete_objects(keys[start : start + 1000])
            self._abort_all_uploads(full)

        self._retries.run(f"delete {prefix}", attempt)

    def _delete_objects(self, keys: Sequence[str]) -> None:
        def delete_together() -> None:
            response = self.client.delete_objects(
                Bucket=self.bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}
            )
            for failed in response.get("Errors", []):
                raise InputError(f"s3://{self.bucket}/{failed['Key']} could not be deleted ({failed.get('Code')}).")

        if self._features.try_optional(DELETE_OBJECTS, lambda: self._with_checksums_if_possible(delete_together)):
            return
        for key in keys:
            self.client.delete_object(Bucket=self.bucket, Key=key)

    def _with_checksums_if_possible(self, request: Callable[[], object]) -> None:
        """Make a request; without checksums if the server rejects it because of them."""
        try:
            request()
        except Exception as error:
            if not sends_checksums(self.client) or not may_reject_checksums(error):
                raise
            if not self._works_without_checksums(request):
                raise
            self._features.note(CHECKSUMS)

    def _works_without_checksums(self, request: Callable[[], object]) -> bool:
        """Make the request again without checksums; if it fails again, they were not the reason, and are sent from then on too."""
        self._connect(checksums=False)
        try:
            request()
        except Exception:
            self._connect()
            return False
        return True

    def _has_conditional_writes(self) -> bool:
        """Whether a write that requires that the object does not exist fails if it does; tried once, on an object of its own."""
        if self._features.conditional_writes is None:
            self._require_bucket()
            location = {"Bucket": self.bucket, "Key": self._full_key(f".probe-{uuid.uuid4().hex}")}
            self._with_checksums_if_possible(lambda: self.client.put_object(**location, Body=b"probe"))
            try:
                if self.client.get_object(**location)["Body"].read() != b"probe":
                    raise InputError(
                        f"{self.uri}: an object that was just written reads differently; use another store."
                    )
                self._features.conditional_writes = rejects_overwriting(self.client, location)
            finally:
                with contextlib.suppress(Exception):
                    self.client.delete_object(**location)
            if not self._features.conditional_writes:
                self._features.note(CONDITIONAL_WRITES)
        return self._features.conditional_writes

    def _writer_of(self, location: dict[str, str]) -> str | None:
        """The id of the write that created an object; None if it does not exist."""
        try:
            return str(self.client.head_object(**location)["Metadata"].get(WRITER))
        except Exception as error:
            if is_code(error, "404", "NoSuchKey"):
                return None
            raise

    def _require_bucket(self) -> None:
        """Some servers would create a bucket with a misspelled name on the first write."""
        if self._bucket_exists:
            return
        try:
            self.client.head_bucket(Bucket=self.bucket)
        except Exception as error:
            if is_code(error, "404", "NoSuchBucket"):
                raise InputError(
                    f"{self.uri}: the bucket does not exist; correct the URI or create the bucket."
                ) from error
            if not is_code(error, "403", "AccessDenied"):  # write permission does not imply permission for HeadBucket
                raise
        self._bucket_exists = True

    def _list_objects(self, prefix: str) -> Iterator[tuple[str, int]]:
        start = self._full_key(prefix)
        for page in self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=f"{start}/" if start else ""
        ):
            _ = page["IsTruncated"]  # a truncated response must not be taken for an empty folder
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):  # a folder marker of some S3 programs
                    key = entry["Key"].removeprefix(f"{self.prefix}/" if self.prefix else "")
                    yield key, entry["Size"]

    def _full_key(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, key.strip("/")) if part)

    def _uri(self, key: str) -> str:
        return f"{PREFIX}{self.bucket}/{self._full_key(key)}"

    def _on_upload_created(self, parsed: dict[str, Any], **_: Any) -> None:
        if "UploadId" in parsed:
            self._open_uploads[parsed["UploadId"]] = parsed["Key"]

    def _on_upload_completed(self, parsed: dict[str, Any], **_: Any) -> None:
        if "Error" not in parsed:
            for upload in self._own_uploads(parsed.get("Key")):
                del self._open_uploads[upload]

    def _own_uploads(self, full: str | None) -> set[str]:
        return {upload for upload, key in self._open_uploads.items() if key == full}

    def _abort_own_uploads(self, full: str) -> None:
        """Delete the parts of failed uploads, which cost money. delete() removes those that cannot be deleted here."""
        for upload in self._own_uploads(full):
            with contextlib.suppress(Exception):
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=full, UploadId=upload)
            del self._open_uploads[upload]

    def _abort_all_uploads(self, full: str) -> None:
        """Delete parts that crashed processes left under a prefix."""

        def abort() -> None:
            response = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=full)
            for upload in response.get("Uploads", []):
                key = upload["Key"]
                if key == full or key.startswith(f"{full}/"):
                    self.client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload["UploadId"])

        self._features.try_optional(LIST_UPLOADS, abort)


def make_client(config: StorageConfig, *, checksums: bool = True) -> Any:
    """Create a boto3 client that makes up to 3 attempts per request.

    With checksums it sends and verifies them, unless boto3's own settings say when_required.
    """
    if config.ca_bundle and not Path(config.ca_bundle).is_file():
        raise InputError(f"storage.ca_bundle: {config.ca_bundle} does not exist; set it to a PEM file.")
    endpoint = config.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    path_style = bool(endpoint) if config.path_style is None else config.path_style
    client_config = Config(
        signature_version=UNSIGNED if config.anonymous else None,
        s3={"addressing_style": "path" if path_style else "virtual"},
        retries={"mode": "standard", "total_max_attempts": 3},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=THREADS + 2,
        **({} if checksums else dict.fromkeys(CHECKSUM_SETTINGS, "when_required")),
    )
    try:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=config.endpoint_url,
            region_name=config.region or os.environ.get("AWS_REGION"),  # boto3 reads only AWS_DEFAULT_REGION
            verify=config.ca_bundle,
            config=client_config,
        )
    except Exception as error:  # a missing profile, an invalid endpoint URL
        raise InputError(f"S3 cannot be used: {describe_error(error)}.") from error


def _transfer_config() -> TransferConfig:
    return TransferConfig(
        multipart_threshold=2 * PART_BYTES,
        multipart_chunksize=PART_BYTES,
        max_concurrency=THREADS,
        preferred_transfer_client="classic",  # the CRT client ignores the client's retries and connection pool
    )
