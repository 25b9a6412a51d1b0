"""A store in an S3 bucket, on boto3: parallel transfers with checksums, retries within a budget, downloads that resume.

Keys behave as paths do in a folder: a prefix means what lies under `prefix/`. Credentials come from boto3's own chain.
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
    """Objects under s3://BUCKET/PREFIX. say is given a line every few seconds of a long transfer.

    Every method raises InputError for what retrying cannot mend (credentials, bucket, certificate) and when the budget of
    settings.retry_minutes is spent. Before the store has answered once, seconds are all it gets.
    """

    def __init__(self, uri: str, config: StorageConfig, log: Callable[[str], None] | None = None) -> None:
        bucket, _, prefix = uri.removeprefix(PREFIX).partition("/")
        if not uri.startswith(PREFIX) or not bucket:
            raise InputError(f"{uri} names no bucket; write s3://BUCKET/PREFIX.")
        self.uri = uri.rstrip("/")
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.client = make_client(config)
        self._retries = RetryBudget(self.uri, 60 * config.retry_minutes)
        self._log = log
        self._bucket_exists = False
        self._open_uploads: dict[str, str] = {}  # upload id -> full key, of this object alone
        events = self.client.meta.events
        events.register("after-call.s3.CreateMultipartUpload", self._upload_began)
        events.register("after-call.s3.CompleteMultipartUpload", self._upload_ended)

    def list(self, prefix: str = "") -> dict[str, int]:
        return self._retries.run("list", lambda: {key: size for key, size in self._objects(prefix) if key})

    def read(self, key: str, *, limit: int) -> bytes | None:
        def attempt() -> bytes | None:
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=self._full(key), ChecksumMode="ENABLED")
            except Exception as error:
                if is_code(error, "NoSuchKey"):
                    return None
                raise
            with contextlib.closing(answer["Body"]) as body:
                if answer["ContentLength"] > limit:
                    raise InputError(
                        f"{self._name(key)} is longer than {limit} bytes, which nothing of ours is; delete it."
                    )
                data: bytes = body.read()
            return data

        return self._retries.run(f"read {key}", attempt)

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        ticket = uuid.uuid4().hex  # tells our own object from another's when the answer to a first try was lost
        condition = {"IfNoneMatch": "*"} if only_if_absent else {}

        def attempt() -> bool:
            self._require_bucket()
            where = {"Bucket": self.bucket, "Key": self._full(key)}
            try:
                self.client.put_object(
                    **where, Body=data, ChecksumAlgorithm="CRC32", Metadata={WRITER: ticket}, **condition
                )
            except Exception as error:
                if not is_code(error, "PreconditionFailed", "412"):
                    raise
                return bool(self.client.head_object(**where)["Metadata"].get(WRITER) == ticket)
            return True

        return self._retries.run(f"write {key}", attempt)

    def upload(self, file: Path, key: str) -> None:
        """Copy a file into the store; it is there whole, with its CRC32, or not at all."""
        size, full = file.stat().st_size, self._full(key)
        extra = {"ChecksumAlgorithm": "CRC32", "Metadata": {CRC32: crc32_of(file)}}

        def attempt() -> None:
            self._require_bucket()
            meter = TransferProgress(f"uploading {self._name(key)}", size, self._log)
            try:
                self.client.upload_file(
                    str(file), self.bucket, full, ExtraArgs=extra, Callback=meter.add, Config=_transfer_config()
                )
            except BaseException:
                self._abort_own(full)
                raise
            there = self.client.head_object(Bucket=self.bucket, Key=full)
            if there["ContentLength"] != size:
                raise InputError(
                    f"{file} changed while it was uploaded to {self._name(key)} ({size} bytes before, "
                    f"{there['ContentLength']} in the store); upload it again when nothing writes to it."
                )

        self._retries.run(f"upload {key}", attempt)

    def download(self, key: str, file: Path) -> None:
        """Copy an object out of the store; file appears when it is whole and its CRC32 is that of the upload.

        What has arrived is kept beside it (`.NAME.ETAG.part`), and a later call for the same object goes on from there.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        download_object(self.client, self.bucket, self._full(key), file, self._retries, self._log)

    def delete(self, prefix: str) -> None:
        def attempt() -> None:
            full = self._full(prefix)
            keys = [self._full(key) for key, _ in self._objects(prefix)]
            keys += [full] if full else []
            for start in range(0, len(keys), 1000):  # the server's limit for one request
                batch = [{"Key": key} for key in keys[start : start + 1000]]
                answer = self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": batch, "Quiet": True})
                for failed in answer.get("Errors", []):
                    raise InputError(
                        f"{PREFIX}{self.bucket}/{failed['Key']} could not be deleted ({failed.get('Code')})."
                    )
            self._abort_all(full)

        self._retries.run(f"delete {prefix}", attempt)

    def _require_bucket(self) -> None:
        """Some stores make a bucket of any name that is written to, a misspelt one too."""
        if self._bucket_exists:
            return
        try:
            self.client.head_bucket(Bucket=self.bucket)
        except Exception as error:
            if is_code(error, "404", "NoSuchBucket"):
                raise InputError(
                    f"{self.uri}: the bucket does not exist; correct the URI or make the bucket."
                ) from error
            if not is_code(error, "403", "AccessDenied"):  # who may write need not be allowed to look
                raise
        self._bucket_exists = True

    def _objects(self, prefix: str) -> Iterator[tuple[str, int]]:
        start = self._full(prefix)
        for page in self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=f"{start}/" if start else ""
        ):
            _ = page["IsTruncated"]  # an answer that was cut off must not pass for an empty folder
            for found in page.get("Contents", []):
                if not found["Key"].endswith("/"):  # what some programs write to stand for a folder
                    key = found["Key"].removeprefix(f"{self.prefix}/" if self.prefix else "")
                    yield key, found["Size"]

    def _full(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, key.strip("/")) if part)

    def _name(self, key: str) -> str:
        return f"{PREFIX}{self.bucket}/{self._full(key)}"

    def _upload_began(self, parsed: dict[str, Any], **_: Any) -> None:
        if "UploadId" in parsed:
            self._open_uploads[parsed["UploadId"]] = parsed["Key"]

    def _upload_ended(self, parsed: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
        if "Error" not in parsed:
            done = [upload for upload, key in self._open_uploads.items() if key == parsed.get("Key")]
            for upload in done:
                del self._open_uploads[upload]

    def _abort_own(self, full: str) -> None:
        """The parts of a failed upload cost money and are of no use. Those that cannot be deleted now wait for delete."""
        for upload in [upload for upload, key in self._open_uploads.items() if key == full]:
            with contextlib.suppress(Exception):
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=full, UploadId=upload)
            del self._open_uploads[upload]

    def _abort_all(self, full: str) -> None:
        """Parts that dead processes left under a prefix."""
        answer = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=full)
        for upload in answer.get("Uploads", []):
            if upload["Key"] == full or upload["Key"].startswith(f"{full}/"):
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def make_client(config: StorageConfig) -> Any:
    """A boto3 client with these settings; it checks checksums both ways and retries a request twice by itself."""
    if config.ca_bundle and not Path(config.ca_bundle).is_file():
        raise InputError(f"storage.ca_bundle: {config.ca_bundle} does not exist; name a file of PEM certificates.")
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
            region_name=config.region or os.environ.get("AWS_REGION"),  # boto3 knows AWS_DEFAULT_REGION alone
            verify=config.ca_bundle,
            config=client_config,
        )
    except Exception as error:  # a profile that is not there, an endpoint that is no URL
        raise InputError(f"S3 cannot be used: {describe_error(error)}.") from error


def _transfer_config() -> TransferConfig:
    return TransferConfig(
        multipart_threshold=2 * PART_BYTES,
        multipart_chunksize=PART_BYTES,
        max_concurrency=THREADS,
        preferred_transfer_client="classic",  # the other one heeds neither our retries nor our pool
    )
