"""Download of one object in parallel ranges, which resumes after a crash; boto3's downloads start over.

State next to the file: `.NAME.ETAG.part` (as long as the object) and `.NAME.ETAG.done` (one byte per range, 1 if complete).
"""

import contextlib
import os
import zlib
from base64 import b64decode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from components.rlhf.storage.s3_errors import RetryBudget, StaleObjectError, is_code
from components.rlhf.storage.s3_features import checksum_mode
from components.rlhf.storage.transfer import TransferProgress
from components.rlhf.text.errors import InputError

RANGE_BYTES = 16 * 2**20
CHUNK_BYTES = 2**18  # benchmarks/storage.py is slower with 2**20, because malloc then maps each block
THREADS = 8
CRC32 = "crc32"  # name of the object metadata with the CRC32 of the whole file


def download_object(
    client: Any, bucket: str, key: str, file: Path, retries: RetryBudget, log: Callable[[str], None] | None
) -> None:
    """Create file when all ranges have arrived and the CRC32 matches. Raises InputError if it does not match twice.

    Memory use is CHUNK_BYTES per thread, independent of the size of the object.
    """
    for is_last_attempt in (False, True):
        head = retries.run(f"find {key}", lambda: _head(client, bucket, key))
        part, done = (file.with_name(f".{file.name}.{_etag(head)}.{kind}") for kind in ("part", "done"))
        for old in file.parent.glob(f".{file.name}.*.part"):
            if old != part:  # belongs to an earlier version of the object
                old.unlink(missing_ok=True)
                old.with_suffix(".done").unlink(missing_ok=True)
        try:
            crc32 = _fetch_ranges(client, bucket, key, head, part, done, retries, log)
            if crc32 != (_crc32_of_object(head) or crc32):
                raise StaleObjectError(
                    f"s3://{bucket}/{key} is corrupt (checksum differs after two downloads); delete it and upload it again."
                )
        except StaleObjectError as stale:
            part.unlink(missing_ok=True)
            done.unlink(missing_ok=True)
            if is_last_attempt:
                raise InputError(str(stale)) from stale
            continue
        part.replace(file)
        done.unlink(missing_ok=True)
        return


def _head(client: Any, bucket: str, key: str) -> dict[str, Any]:
    try:
        head: dict[str, Any] = client.head_object(Bucket=bucket, Key=key, **checksum_mode(client))
    except Exception as error:
        if is_code(error, "404", "NoSuchKey"):  # HEAD does not distinguish a missing bucket, but this request does
            client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
            raise InputError(f"s3://{bucket}/{key} does not exist; correct the URI.") from error
        raise
    _ = head["ETag"], head["ContentLength"]  # a KeyError means a truncated response, which is retried
    return head


def _fetch_ranges(
    client: Any, bucket: str, key: str, head: dict[str, Any], part: Path, done: Path, retries: RetryBudget,
    log: Callable[[str], None] | None,
) -> str:  # fmt: skip
    """Download the missing ranges into the part file; return the CRC32 of the whole."""
    size = int(head["ContentLength"])
    num_ranges = -(-size // RANGE_BYTES)
    flags = (done.read_bytes() if done.is_file() and part.is_file() else b"").ljust(num_ranges, b"\0")
    missing = [index for index in range(num_ranges) if flags[index] != 1]
    bytes_done = (num_ranges - len(missing)) * RANGE_BYTES
    progress = TransferProgress(f"downloading s3://{bucket}/{key}", size, log, done=bytes_done)
    with contextlib.ExitStack() as stack:
        part_file, done_file = (os.open(path, os.O_RDWR | os.O_CREAT, 0o644) for path in (part, done))
        stack.callback(os.close, part_file)
        stack.callback(os.close, done_file)
        os.ftruncate(part_file, size)

        def fetch(index: int) -> None:
            start = index * RANGE_BYTES
            stop = min(size, start + RANGE_BYTES)
            retries.run(
                f"download {key}",
                lambda: _fetch(client, bucket, key, head["ETag"], part_file, start, stop, progress),
            )
            os.pwrite(done_file, b"\1", index)

        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        try:
            futures = {index: pool.submit(fetch, index) for index in missing}
            crc = 0
            for index in range(num_ranges):  # in order, while later ranges are downloaded
                if index in futures:
                    futures.pop(index).result()
                for start in range(index * RANGE_BYTES, min(size, (index + 1) * RANGE_BYTES), CHUNK_BYTES):
                    crc = zlib.crc32(os.pread(part_file, min(CHUNK_BYTES, size - start), start), crc)
            return f"{crc:08x}"
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _fetch(
    client: Any, bucket: str, key: str, etag: str, part_file: int, start: int, stop: int, progress: TransferProgress
) -> None:
    """Download bytes start to stop of the object into the same offsets of the part file."""
    changed = StaleObjectError(f"s3://{bucket}/{key} changed during its download; try again when nothing writes to it.")
    position = start
    try:
        response = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", IfMatch=etag)
        if response["ContentLength"] != stop - start:
            raise changed
        with contextlib.closing(response["Body"]) as body:
            while chunk := body.read(CHUNK_BYTES):
                os.pwrite(part_file, chunk, position)
                position += len(chunk)
                progress.add(len(chunk))
    except BaseException as error:
        progress.add(start - position)
        if is_code(error, "PreconditionFailed", "412", "InvalidRange", "NoSuchKey"):
            raise changed from error
        raise


def crc32_of(file: Path) -> str:
    """CRC32 of a file as 8 hexadecimal digits."""
    crc = 0
    with file.open("rb") as source:
        while data := source.read(CHUNK_BYTES):
            crc = zlib.crc32(data, crc)
    return f"{crc:08x}"


def _crc32_of_object(head: dict[str, Any]) -> str | None:
    """The CRC32 in the metadata of an upload by S3Store, else the server's own if it covers the whole object."""
    crc32: str | None = head.get("Metadata", {}).get(CRC32)
    if crc32 is None and head.get("ChecksumType") == "FULL_OBJECT" and "ChecksumCRC32" in head:
        return b64decode(head["ChecksumCRC32"]).hex()
    return crc32


def _etag(head: dict[str, Any]) -> str:
    return "".join(c for c in str(head["ETag"]) if c.isalnum() or c == "-")
