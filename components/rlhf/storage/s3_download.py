"""Downloading one object in parallel ranges that survive the death of the process: boto3's own downloads begin again from 0.

Beside the file lie `.NAME.ETAG.part` (as long as the object) and `.NAME.ETAG.done` (one byte a range: 1 when it has arrived).
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
from components.rlhf.storage.transfer import TransferProgress
from components.rlhf.text.errors import InputError

RANGE_BYTES = 16 * 2**20
CHUNK_BYTES = 2**18  # with 2**20, benchmarks/storage.py is slower: the C library maps each block anew
THREADS = 8
CRC32 = "crc32"  # name of the object metadata that holds the CRC32 of the whole file


def download_object(
    client: Any, bucket: str, key: str, file: Path, retries: RetryBudget, log: Callable[[str], None] | None
) -> None:
    """file appears when all ranges have arrived and the CRC32 of the whole is right. Raises InputError when the object is not what it says.

    The memory it takes is that of CHUNK_BYTES for each of THREADS, whatever the size of the object.
    """
    name = f"s3://{bucket}/{key}"
    for last_try in (False, True):
        head = retries.run(f"find {key}", lambda: _head(client, bucket, key))
        part, done = (file.with_name(f".{file.name}.{_etag(head)}.{kind}") for kind in ("part", "done"))
        for old in file.parent.glob(f".{file.name}.*.part"):
            if old != part:  # of what the object was before
                old.unlink(missing_ok=True)
                old.with_suffix(".done").unlink(missing_ok=True)
        try:
            crc32 = _fetch_ranges(client, bucket, key, head, part, done, retries, log)
            if crc32 != (_crc32_in(head) or crc32):
                raise StaleObjectError(
                    f"{name} is not what was uploaded (checksum differs after two downloads); delete it and write it again."
                )
        except StaleObjectError as stale:
            part.unlink(missing_ok=True)
            done.unlink(missing_ok=True)
            if last_try:
                raise InputError(str(stale)) from stale
            continue
        part.replace(file)
        done.unlink(missing_ok=True)
        return


def _head(client: Any, bucket: str, key: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    except Exception as error:
        if is_code(error, "404", "NoSuchKey"):  # HEAD cannot say of what
            client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
            raise InputError(f"s3://{bucket}/{key} does not exist; correct the URI.") from error
        raise
    _ = found["ETag"], found["ContentLength"]  # missing when the answer was cut off, which is worth another try
    return found


def _fetch_ranges(
    client: Any, bucket: str, key: str, head: dict[str, Any], part: Path, done: Path, retries: RetryBudget,
    log: Callable[[str], None] | None,
) -> str:  # fmt: skip
    """Fill the part file; return the CRC32 of the whole."""
    size = int(head["ContentLength"])
    count = -(-size // RANGE_BYTES)
    flags = (done.read_bytes() if done.is_file() and part.is_file() else b"").ljust(count, b"\0")
    missing = [number for number in range(count) if flags[number] != 1]
    meter = TransferProgress(f"downloading s3://{bucket}/{key}", size, log, done=(count - len(missing)) * RANGE_BYTES)
    with contextlib.ExitStack() as stack:
        target, arrived = (os.open(path, os.O_RDWR | os.O_CREAT, 0o644) for path in (part, done))
        stack.callback(os.close, target)
        stack.callback(os.close, arrived)
        os.ftruncate(target, size)

        def fetch(number: int) -> None:
            start = number * RANGE_BYTES
            stop = min(size, start + RANGE_BYTES)
            retries.run(
                f"download {key}",
                lambda: _fetch(client, bucket, key, head["ETag"], target, start, stop, meter),
            )
            os.pwrite(arrived, b"\1", number)

        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        try:
            futures = {number: pool.submit(fetch, number) for number in missing}
            crc = 0
            for number in range(count):  # checked in order while later ranges arrive
                if number in futures:
                    futures.pop(number).result()
                for start in range(number * RANGE_BYTES, min(size, (number + 1) * RANGE_BYTES), CHUNK_BYTES):
                    crc = zlib.crc32(os.pread(target, min(CHUNK_BYTES, size - start), start), crc)
            return f"{crc:08x}"
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _fetch(
    client: Any, bucket: str, key: str, etag: str, target: int, start: int, stop: int, meter: TransferProgress
) -> None:
    """Write bytes start to stop of the object to where they belong."""
    moved = 0
    try:
        answer = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", IfMatch=etag)
        if answer["ContentLength"] != stop - start:
            raise StaleObjectError(
                f"s3://{bucket}/{key} changed while it was downloaded; start again when nothing writes to it."
            )
        with contextlib.closing(answer["Body"]) as body:
            while chunk := body.read(CHUNK_BYTES):
                os.pwrite(target, chunk, start + moved)
                moved += len(chunk)
                meter.add(len(chunk))
    except BaseException as error:
        meter.add(-moved)
        if is_code(error, "PreconditionFailed", "412", "InvalidRange", "NoSuchKey"):
            raise StaleObjectError(
                f"s3://{bucket}/{key} changed while it was downloaded; start again when nothing writes to it."
            ) from error
        raise


def crc32_of(file: Path) -> str:
    """CRC32 of a file as 8 hexadecimal digits."""
    crc = 0
    with file.open("rb") as source:
        while data := source.read(CHUNK_BYTES):
            crc = zlib.crc32(data, crc)
    return f"{crc:08x}"


def _crc32_in(head: dict[str, Any]) -> str | None:
    """What our uploads carry; of others' objects what the store has, if it has one of the whole."""
    ours: str | None = head.get("Metadata", {}).get(CRC32)
    if ours is None and head.get("ChecksumType") == "FULL_OBJECT" and "ChecksumCRC32" in head:
        return b64decode(head["ChecksumCRC32"]).hex()
    return ours


def _etag(head: dict[str, Any]) -> str:
    return "".join(letter for letter in str(head["ETag"]) if letter.isalnum() or letter == "-")
