"""A store in an S3 bucket, based on boto3: parallel transfers with checksums, retries, and resumable downloads.

A prefix is a folder: it matches keys under `prefix/`. Credentials come from boto3's default chain.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore import UNSIGNED
from botocore.config import Config

from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.s3_download import CRC32, THREADS, crc32_of, download_object
from components.rlhf.storage.s3_errors import RetryBudget, describe_error, is_code
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
        self.client = make_client(config)
        self._retries = RetryBudget(self.uri, 60 * config.retry_minutes)
        self._log = log
        self._bucket_exists = False
        self._open_uploads: dict[str, str] = {}  # upload id -> full key, of this client's multipart uploads
        events = self.client.meta.events
        events.register("after-call.s3.CreateMultipartUpload", self._on_upload_created)
        events.register("after-call.s3.CompleteMultipartUpload", self._on_upload_completed)

    def list(self, prefix: str = "") -> dict[str, int]:
        return self._retries.run("list", lambda: {key: size for key, size in self._list_objects(prefix) if key})

    def read(self, key: str, *, limit: int) -> bytes | None:
        def attempt() -> bytes | None:
            try:
                response = self.client.get_object(Bucket=self.bucket, Key=self._full_key(key), ChecksumMode="ENABLED")
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

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        write_id = uuid.uuid4().hex  # identifies this write if the response to an earlier attempt was lost
        condition = {"IfNoneMatch": "*"} if only_if_absent else {}

        def attempt() -> bool:
            self._require_bucket()
            location = {"Bucket": self.bucket, "Key": self._full_key(key)}
            try:
                self.client.put_object(
                    **location, Body=data, ChecksumAlgorithm="CRC32", Metadata={WRITER: write_id}, **condition
                )
            except Exception as error:
                if not is_code(error, "PreconditionFailed", "412"):
                    raise
                return bool(self.client.head_object(**location)["Metadata"].get(WRITER) == write_id)
            return True

        return self._retries.run(f"write {key}", attempt)

    def upload(self, file: Path, key: str) -> None:
        """Upload a file atomically, with its CRC32 as metadata."""
        size, full = file.stat().st_size, self._full_key(key)
        extra = {"ChecksumAlgorithm": "CRC32", "Metadata": {CRC32: crc32_of(file)}}

        def attempt() -> None:
            self._require_bucket()
            progress = TransferProgress(f"uploading {self._uri(key)}", size, self._log)
            try:
                self.client.upload_file(
                    str(file), self.bucket, full, ExtraArgs=extra, Callback=progress.add, Config=_transfer_config()
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
        def attempt() -> None:
            full = self._full_key(prefix)
            keys = [self._full_key(key) for key, _ in self._list_objects(prefix)]
            keys += [full] if full else []
            for start in range(0, len(keys), 1000):  # the server's limit for one request
                batch = [{"Key": key} for key in keys[start : start + 1000]]
                response = self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": batch, "Quiet": True})
                for failed in response.get("Errors", []):
                    raise InputError(f"s3://{self.bucket}/{failed['Key']} could not be deleted ({failed.get('Code')}).")
            self._abort_all_uploads(full)

        self._retries.run(f"delete {prefix}", attempt)

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
        response = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=full)
        for upload in response.get("Uploads", []):
            if upload["Key"] == full or upload["Key"].startswith(f"{full}/"):
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def make_client(config: StorageConfig) -> Any:
    """Create a boto3 client that verifies checksums in both directions and makes up to 3 attempts per request."""
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
        request_checksum_calculation="when_supported",
        response_checksum_validation="when_supported",
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
