"""S3 against a real server: permanent errors fail within seconds, transient errors are retried, and writes are atomic."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.config.register import RegisterStageConfig
from components.rlhf.config.storage import StorageConfig
from components.rlhf.runtime.stage import stage_run
from components.rlhf.storage import s3_download, transfer
from components.rlhf.storage.copy import local_copy
from components.rlhf.storage.store import Store
from components.rlhf.text.errors import InputError
from tests.rlhf.storage.conftest import Open
from tests.support.fault_proxy import FaultProxy
from tests.support.seaweed import BUCKET, SECRET_KEY, SeaweedFS, bare_client, credentials, free_port

pytestmark = pytest.mark.slow
MB = 10**6
ROOT = Path(__file__).resolve().parents[3]


def key_of(store: Store, key: str) -> str:
    return store.uri.removeprefix(f"s3://{BUCKET}/") + "/" + key


def random_file(path: Path, size: int) -> Path:
    path.write_bytes(os.urandom(size))
    return path


def refusals(store: Store, folder: Path) -> list[str]:
    """The error messages of all methods, each of which must fail within seconds."""
    file = random_file(folder / "file", 1000)
    messages = []
    for call in (
        lambda: store.list(),
        lambda: store.read("a", limit=9),
        lambda: store.write("a", b"1"),
        lambda: store.upload(file, "a"),
        lambda: store.download("a", folder / "out"),
        lambda: store.delete("a"),
    ):
        started = time.monotonic()
        with pytest.raises(InputError) as error:
            call()
        assert time.monotonic() - started < 15
        messages.append(str(error.value))
    for message in messages:
        assert message.startswith(store.uri) and "\n" not in message and SECRET_KEY not in message
    return messages


# --- permanent errors ---


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_refused(s3: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str) -> None:
    monkeypatch.setenv(wrong, "wrong")
    for message in refusals(s3(), tmp_path):
        assert "access was denied" in message and "AWS_SECRET_ACCESS_KEY" in message


def test_missing_credentials_are_refused(s3: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in credentials():
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    for message in refusals(s3(), tmp_path):
        assert "no complete credentials were found; set AWS_ACCESS_KEY_ID" in message
    for message in refusals(s3(anonymous=True), tmp_path):
        assert "access was denied" in message


def test_missing_bucket_is_refused_and_not_created(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    for message in refusals(s3(bucket="misspelled"), tmp_path):
        assert "the bucket does not exist; correct the URI or create the bucket" in message
    names = [bucket["Name"] for bucket in bare_client(server.url).list_buckets()["Buckets"]]
    assert "misspelled" not in names  # SeaweedFS creates missing buckets on write


def test_unreachable_endpoint_fails_within_seconds(s3: Open, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = s3(endpoint_url=f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    with pytest.raises(
        InputError, match=r"could not list in \d+ s of retries: Could not connect.*check storage.endpoint_url"
    ):
        store.list()
    with pytest.raises(InputError, match="Could not connect"):
        store.upload(tmp_path / "file", "a")
    assert time.monotonic() - started < 30


def test_missing_ca_bundle_is_refused(s3: Open, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"storage.ca_bundle: /nowhere.pem does not exist"):
        s3(ca_bundle="/nowhere.pem")


# --- transient errors ---


def test_transient_errors_are_retried(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    """Two of three responses fail."""
    kinds = ["503", "reset", None, "500", "truncate", None]
    file = random_file(tmp_path / "file", 40 * MB)
    with FaultProxy(server.port, lambda number, _: kinds[number % len(kinds)], after=4_000) as proxy:
        store = s3(endpoint_url=proxy.url)
        assert store.write("small", b"content")
        assert store.read("small", limit=100) == b"content"
        store.upload(file, "file")
        store.download("file", tmp_path / "back")
        assert store.list() == {"small": 7, "file": 40 * MB}
        assert {fault for fault, _ in proxy.injected} == {"503", "reset", "500", "truncate"}
    assert (tmp_path / "back").read_bytes() == file.read_bytes()


def test_response_with_truncated_headers_is_retried(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    """Python's HTTP client takes truncated headers for complete ones, and a missing body for an empty one."""
    file = random_file(tmp_path / "file", 40 * MB)
    s3().upload(file, "file")
    s3().write("small", b"content")
    with FaultProxy(server.port, lambda number, _: "headless" if number % 2 == 0 else None) as proxy:
        store = s3(endpoint_url=proxy.url)
        assert store.list() == {"small": 7, "file": 40 * MB}
        assert store.read("small", limit=100) == b"content"
        store.download("file", tmp_path / "back")
        assert len(proxy.injected) >= 3
    assert (tmp_path / "back").read_bytes() == file.read_bytes()


def test_slow_transfers_log_progress(
    s3: Open, server: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "INTERVAL_SECONDS", 0.2)
    file = random_file(tmp_path / "file", 10 * MB)
    lines: list[str] = []
    with FaultProxy(server.port, lambda number, line: "slow") as proxy:
        store = s3(endpoint_url=proxy.url, log=lines.append)
        store.upload(file, "file")
        store.download("file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    pattern = rf"downloading {store.uri}/file: \d+ of 10 MB, \d+ MB/s, \d+:\d\d left"
    assert len([line for line in lines if re.fullmatch(pattern, line)]) >= 2


def test_retries_end_with_the_budget(s3: Open, server: SeaweedFS) -> None:
    with FaultProxy(server.port, lambda number, line: "503") as proxy:
        started = time.monotonic()
        with pytest.raises(
            InputError, match=r"could not read a in \d+ s of retries: the server responded (SlowDown|503)"
        ):
            s3(endpoint_url=proxy.url, retry_minutes=0.05).read("a", limit=9)
    assert time.monotonic() - started < 10


def test_conditional_write_succeeds_if_its_response_is_lost(s3: Open, server: SeaweedFS) -> None:
    """The first attempt succeeds and its response is lost; the retry finds the key that it has written itself."""
    with FaultProxy(server.port, lambda n, line: "lost" if line.startswith("PUT") and n < 2 else None) as proxy:
        assert s3(endpoint_url=proxy.url).write("lease", b"first", only_if_absent=True)
        assert [fault for fault, _ in proxy.injected] == ["lost"]
    assert not s3().write("lease", b"second", only_if_absent=True)
    assert s3().read("lease", limit=9) == b"first"


def test_upload_survives_server_restart(s3: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_server = SeaweedFS(tmp_path / "server")
    try:
        own_server.start()
        file = random_file(tmp_path / "file", 200 * MB)
        parts = threading.Semaphore(0)

        def count_parts(number: int, line: str) -> str | None:
            if "partNumber" in line:
                parts.release()
            return "slow"

        with FaultProxy(own_server.port, count_parts) as proxy:
            store = s3(endpoint_url=proxy.url)
            store.write("small", b"1")
            upload = threading.Thread(target=store.upload, args=(file, "file"))
            upload.start()
            for _ in range(3):
                assert parts.acquire(timeout=30)
            own_server.kill()
            time.sleep(1)
            own_server.start()
            objects = bare_client(own_server.url).list_objects_v2(Bucket=BUCKET).get("Contents", [])
            assert not [entry for entry in objects if entry["Key"].endswith("/file")]
            upload.join(timeout=90)
            assert not upload.is_alive()
            store.download("file", tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == file.read_bytes()
            store.delete("file")
            assert not bare_client(own_server.url).list_multipart_uploads(Bucket=BUCKET).get("Uploads")
    finally:
        own_server.kill()


def test_failed_upload_leaves_no_parts(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    def fail_part_3(number: int, line: str) -> str | None:
        return "503" if "partNumber=3" in line else None

    file = random_file(tmp_path / "file", 60 * MB)
    with FaultProxy(server.port, fail_part_3) as proxy:
        store = s3(endpoint_url=proxy.url, retry_minutes=0.02)
        store.write("small", b"1")
        with pytest.raises(InputError, match="could not upload file"):
            store.upload(file, "file")
    assert s3().list() == {"small": 1}
    assert not bare_client(server.url).list_multipart_uploads(Bucket=BUCKET, Prefix=key_of(store, "")).get("Uploads")


# --- downloads ---


def test_interrupted_download_resumes(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    file = random_file(tmp_path / "file", 120 * MB)  # 8 ranges of 16 MiB
    s3().upload(file, "file")

    def fail_second_half(number: int, line: str) -> str | None:
        gets.append(line)
        return "503" if len([1 for line in gets if line.startswith("GET")]) > 4 else None

    gets: list[str] = []
    target = tmp_path / "out" / "back"
    with FaultProxy(server.port, fail_second_half) as proxy, pytest.raises(InputError, match="could not download"):
        s3(endpoint_url=proxy.url, retry_minutes=0.02).download("file", target)
    assert not target.exists()
    with FaultProxy(server.port, lambda *_: None) as proxy:
        s3(endpoint_url=proxy.url).download("file", target)
        resumed = [line for line in proxy.first_lines if line.startswith("GET")]
    assert len(resumed) == 4
    assert target.read_bytes() == file.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["back"]


def test_partial_download_of_replaced_object_is_discarded(s3: Open, tmp_path: Path, server: SeaweedFS) -> None:
    store, target = s3(), tmp_path / "out" / "back"
    store.upload(random_file(tmp_path / "old", 40 * MB), "file")
    allowed = threading.Semaphore(1)

    def fail_after_one_range(number: int, line: str) -> str | None:
        return None if line.startswith("HEAD") or allowed.acquire(blocking=False) else "503"

    with FaultProxy(server.port, fail_after_one_range) as proxy, pytest.raises(InputError):
        s3(endpoint_url=proxy.url, retry_minutes=0.02).download("file", target)
    assert len(list(target.parent.glob(".back.*"))) == 2
    new = random_file(tmp_path / "new", 40 * MB)
    store.upload(new, "file")
    store.download("file", target)
    assert target.read_bytes() == new.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["back"]


def test_corrupted_bytes_are_detected_and_downloaded_again(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    """HTTP has no checksum of a range: the CRC32 of the whole object detects the corruption."""
    file = random_file(tmp_path / "file", 40 * MB)
    s3().upload(file, "file")
    with FaultProxy(server.port, lambda n, line: "corrupt" if line.startswith("GET") and n < 3 else None) as proxy:
        s3(endpoint_url=proxy.url).download("file", tmp_path / "back")
        assert [fault for fault, _ in proxy.injected] == ["corrupt"] * 2
    assert (tmp_path / "back").read_bytes() == file.read_bytes()


def test_object_with_wrong_checksum_is_refused(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    store = s3()
    bare_client(server.url).put_object(
        Bucket=BUCKET, Key=key_of(store, "file"), Body=b"x" * 100, Metadata={"crc32": "0" * 8}
    )
    with pytest.raises(InputError, match=r"file is corrupt \(checksum differs after two downloads\); delete it"):
        store.download("file", tmp_path / "out" / "back")
    assert list((tmp_path / "out").iterdir()) == []


def test_object_without_checksum_is_downloaded(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    store = s3()
    bare_client(server.url).put_object(Bucket=BUCKET, Key=key_of(store, "file"), Body=b"x" * 100)
    store.download("file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"x" * 100


# --- folders and large files ---


def test_errors_about_a_local_copy_name_its_uri(s3: Open, server: SeaweedFS) -> None:
    store = s3()
    store.write("data/train.jsonl", b"{}")
    config = store_settings(server)
    with local_copy(f"{store.uri}/data/train.jsonl", config) as path:
        assert Path(path).read_bytes() == b"{}" and Path(path).suffix == ".jsonl"
    assert not Path(path).exists()
    with (
        pytest.raises(InputError, match=rf"^{store.uri}/data: line 1 is wrong$"),
        local_copy(f"{store.uri}/data", config) as path,
    ):
        assert os.listdir(path) == ["train.jsonl"]
        raise InputError(f"{path}: line 1 is wrong")
    with pytest.raises(InputError, match="nothing does not exist"), local_copy(f"{store.uri}/nothing", config):
        pytest.fail("the block must not run")
    with local_copy("Qwen/Qwen2.5-0.5B", config) as path:
        assert path == "Qwen/Qwen2.5-0.5B"


def store_settings(server: SeaweedFS) -> StorageConfig:
    return StorageConfig(endpoint_url=server.url, region="us-east-1")


@pytest.mark.parametrize("cluster", [True, False])
def test_published_model_is_named_in_the_metadata_of_kfps_own_copy(
    s3: Open, server: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: bool
) -> None:
    """KFP's launcher fails a task that reports another URI than its own."""
    monkeypatch.setenv("RLHF_RUN_ID", "run-1")
    kfp_uri = "s3://pipelines/run/model" if cluster else str(tmp_path / "model")
    model = {"artifacts": [{"name": "model", "uri": kfp_uri}]}
    executor_input = json.dumps(
        {"outputs": {"artifacts": {"model": model}, "outputFile": str(tmp_path / "output.json")}}
    )
    store = s3()
    storage = store_settings(server).model_copy(update={"publish_uri": store.uri}).canonical_json()
    settings = RegisterStageConfig(decision="promote").canonical_json()
    with stage_run(
        "demo", RegisterStageConfig, settings=settings, tracking="{}", executor_input=executor_input, storage=storage
    ) as run:
        run.write_artifact(
            "model", tmp_path / "model", lambda folder: (folder / "config.json").write_text("{}"), kind="sft_model",
            parents={}, facts={},
        )  # fmt: skip
    (reported,) = json.loads((tmp_path / "output.json").read_text())["artifacts"]["model"]["artifacts"]
    uri = f"{store.uri}/run-1/demo/model"
    assert reported["uri"] == kfp_uri
    assert reported["metadata"]["published_uri"] == uri
    with local_copy(uri, store_settings(server)) as copy:
        assert open_artifact(Path(copy), "sft_model").digest == reported["metadata"]["digest"]


MEASURE_MEMORY = """
import os, resource, sys
from pathlib import Path
from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.store import open_store
folder, url, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store = open_store("s3://models/large", StorageConfig(endpoint_url=url, region="us-east-1"))
store.write("warm", b"up")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store.upload(folder / "large", "file")
(folder / "large").rename(folder / "sent")
store.download("file", folder / "large")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
store.delete("file")
"""


def test_2_gb_transfer_uses_bounded_memory(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    size = 2 * 10**9
    with (tmp_path / "large").open("wb") as file:
        for number in range(size // (8 * MB)):
            file.write(bytes([number % 251]) * (8 * MB))
    command = [sys.executable, "-c", MEASURE_MEMORY, str(tmp_path), server.url, str(size)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "large").stat().st_size == size
    assert subprocess.run(["cmp", tmp_path / "sent", tmp_path / "large"]).returncode == 0
    for name in ("sent", "large"):
        (tmp_path / name).unlink()
    assert int(done.stdout) < 128 * MB


def test_range_size_is_what_these_tests_assume() -> None:
    assert s3_download.RANGE_BYTES == 16 * 2**20
