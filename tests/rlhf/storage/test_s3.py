"""S3 against a real server: what cannot work says so in seconds, what breaks in between is mended, nothing half is taken for whole."""

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


def made(path: Path, size: int) -> Path:
    path.write_bytes(os.urandom(size))
    return path


def refused(store: Store, folder: Path) -> list[str]:
    """The sentence of every method, none of which may work; each within seconds."""
    file = made(folder / "file", 1000)
    sentences = []
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
        sentences.append(str(error.value))
    for sentence in sentences:
        assert sentence.startswith(store.uri) and "\n" not in sentence and SECRET_KEY not in sentence
    return sentences


# --- what no retry can mend ---


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials(s3: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str) -> None:
    monkeypatch.setenv(wrong, "wrong")
    for sentence in refused(s3(), tmp_path):
        assert "the credentials were refused" in sentence and "AWS_SECRET_ACCESS_KEY" in sentence


def test_no_credentials(s3: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in credentials():
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    for sentence in refused(s3(), tmp_path):
        assert "no complete credentials were found; set AWS_ACCESS_KEY_ID" in sentence
    for sentence in refused(s3(anonymous=True), tmp_path):
        assert "the credentials were refused" in sentence


def test_missing_bucket(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    for sentence in refused(s3(bucket="misspelt"), tmp_path):
        assert "the bucket does not exist; correct the URI or make the bucket" in sentence
    names = [bucket["Name"] for bucket in bare_client(server.url).list_buckets()["Buckets"]]
    assert "misspelt" not in names  # this server makes a bucket of any name that is written to


def test_nobody_at_the_endpoint(s3: Open, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = s3(endpoint_url=f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    with pytest.raises(
        InputError, match=r"could not list, after \d+ s of trying: Could not connect.*endpoint_url is right"
    ):
        store.list()
    with pytest.raises(InputError, match="Could not connect"):
        store.upload(tmp_path / "file", "a")
    assert time.monotonic() - started < 30


def test_certificates(s3: Open, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"storage.ca_bundle: /nowhere.pem does not exist"):
        s3(ca_bundle="/nowhere.pem")


# --- what breaks in between ---


def test_busy_and_broken_answers_are_tried_again(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    """Two of three answers fail in one way or another; what arrives is right all the same."""
    kinds = ["503", "reset", None, "500", "truncate", None]
    file = made(tmp_path / "file", 40 * MB)
    with FaultProxy(server.port, lambda number, _: kinds[number % len(kinds)], after=4_000) as proxy:
        store = s3(endpoint_url=proxy.url)
        assert store.write("small", b"content")
        assert store.read("small", limit=100) == b"content"
        store.upload(file, "file")
        store.download("file", tmp_path / "back")
        assert store.list() == {"small": 7, "file": 40 * MB}
        assert {fault for fault, _ in proxy.done} == {"503", "reset", "500", "truncate"}
    assert (tmp_path / "back").read_bytes() == file.read_bytes()


def test_an_answer_cut_off_in_its_headers_is_no_answer(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    """Python's HTTP client takes the headers that came for all of them, and no body for an empty one."""
    file = made(tmp_path / "file", 40 * MB)
    s3().upload(file, "file")
    s3().write("small", b"content")
    with FaultProxy(server.port, lambda number, _: "headless" if number % 2 == 0 else None) as proxy:
        store = s3(endpoint_url=proxy.url)
        assert store.list() == {"small": 7, "file": 40 * MB}
        assert store.read("small", limit=100) == b"content"
        store.download("file", tmp_path / "back")
        assert len(proxy.done) >= 3
    assert (tmp_path / "back").read_bytes() == file.read_bytes()


def test_slow_answers(s3: Open, server: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SECONDS", 0.2)
    file = made(tmp_path / "file", 10 * MB)
    lines: list[str] = []
    with FaultProxy(server.port, lambda number, line: "slow") as proxy:
        store = s3(endpoint_url=proxy.url, log=lines.append)
        store.upload(file, "file")
        store.download("file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    said = [
        line
        for line in lines
        if re.fullmatch(rf"downloading {store.uri}/file: \d+ of 10 MB, \d+ MB/s, \d+:\d\d left", line)
    ]
    assert len(said) >= 2


def test_the_budget_ends(s3: Open, server: SeaweedFS) -> None:
    with FaultProxy(server.port, lambda number, line: "503") as proxy:
        started = time.monotonic()
        with pytest.raises(
            InputError, match=r"could not read a, after \d+ s of trying: the server answered (SlowDown|503)"
        ):
            s3(endpoint_url=proxy.url, retry_minutes=0.05).read("a", limit=9)
    assert time.monotonic() - started < 10


def test_a_lost_answer_does_not_lose_the_lease(s3: Open, server: SeaweedFS) -> None:
    """The first try wins, its answer is lost, and the second one finds the key taken: by ourselves."""
    with FaultProxy(server.port, lambda n, line: "lost" if line.startswith("PUT") and n < 2 else None) as proxy:
        assert s3(endpoint_url=proxy.url).write("lease", b"mine", only_if_absent=True)
        assert [fault for fault, _ in proxy.done] == ["lost"]
    assert not s3().write("lease", b"theirs", only_if_absent=True)
    assert s3().read("lease", limit=9) == b"mine"


def test_killed_and_started_again_in_mid_upload(s3: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mortal = SeaweedFS(tmp_path / "server")
    try:
        mortal.start()
        file = made(tmp_path / "file", 200 * MB)
        parts = threading.Semaphore(0)

        def see(number: int, line: str) -> str | None:
            if "partNumber" in line:
                parts.release()
            return "slow"

        with FaultProxy(mortal.port, see) as proxy:
            store = s3(endpoint_url=proxy.url)
            store.write("small", b"1")
            upload = threading.Thread(target=store.upload, args=(file, "file"))
            upload.start()
            for _ in range(3):
                assert parts.acquire(timeout=30)
            mortal.kill()
            time.sleep(1)
            mortal.start()
            seen = bare_client(mortal.url).list_objects_v2(Bucket=BUCKET).get("Contents", [])
            assert not [found for found in seen if found["Key"].endswith("/file")]  # nothing half
            upload.join(timeout=90)
            assert not upload.is_alive()
            store.download("file", tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == file.read_bytes()
            store.delete("file")
            assert not bare_client(mortal.url).list_multipart_uploads(Bucket=BUCKET).get("Uploads")
    finally:
        mortal.kill()


def test_a_failed_upload_leaves_nothing(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    def no_end(number: int, line: str) -> str | None:
        return "503" if "partNumber=3" in line else None

    file = made(tmp_path / "file", 60 * MB)
    with FaultProxy(server.port, no_end) as proxy:
        store = s3(endpoint_url=proxy.url, retry_minutes=0.02)
        store.write("small", b"1")
        with pytest.raises(InputError, match="could not upload file"):
            store.upload(file, "file")
    assert s3().list() == {"small": 1}
    assert not bare_client(server.url).list_multipart_uploads(Bucket=BUCKET, Prefix=key_of(store, "")).get("Uploads")


# --- downloads ---


def test_a_download_goes_on_where_it_was(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    file = made(tmp_path / "file", 120 * MB)  # 8 ranges of 16 MiB
    s3().upload(file, "file")

    def half(number: int, line: str) -> str | None:
        gets.append(line)
        return "503" if len([1 for line in gets if line.startswith("GET")]) > 4 else None

    gets: list[str] = []
    target = tmp_path / "out" / "back"
    with FaultProxy(server.port, half) as proxy, pytest.raises(InputError, match="could not download"):
        s3(endpoint_url=proxy.url, retry_minutes=0.02).download("file", target)
    assert not target.exists()
    with FaultProxy(server.port, lambda *_: None) as proxy:
        s3(endpoint_url=proxy.url).download("file", target)
        again = [line for line in proxy.first_lines if line.startswith("GET")]
    assert len(again) == 4
    assert target.read_bytes() == file.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["back"]


def test_what_was_begun_of_another_object_is_not_used(s3: Open, tmp_path: Path, server: SeaweedFS) -> None:
    store, target = s3(), tmp_path / "out" / "back"
    store.upload(made(tmp_path / "old", 40 * MB), "file")
    broken = threading.Semaphore(1)

    def one(number: int, line: str) -> str | None:
        return None if line.startswith("HEAD") or broken.acquire(blocking=False) else "503"

    with FaultProxy(server.port, one) as proxy, pytest.raises(InputError):
        s3(endpoint_url=proxy.url, retry_minutes=0.02).download("file", target)
    assert len(list(target.parent.glob(".back.*"))) == 2
    new = made(tmp_path / "new", 40 * MB)
    store.upload(new, "file")
    store.download("file", target)
    assert target.read_bytes() == new.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["back"]


def test_a_byte_that_changed_on_the_way_is_seen(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    """Plain http carries no checksum of a range: the CRC32 of the whole object finds it, and a second download mends it."""
    file = made(tmp_path / "file", 40 * MB)
    s3().upload(file, "file")
    with FaultProxy(server.port, lambda n, line: "corrupt" if line.startswith("GET") and n < 3 else None) as proxy:
        s3(endpoint_url=proxy.url).download("file", tmp_path / "back")
        assert [fault for fault, _ in proxy.done] == ["corrupt"] * 2
    assert (tmp_path / "back").read_bytes() == file.read_bytes()


def test_an_object_that_is_not_what_was_uploaded(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    store = s3()
    bare_client(server.url).put_object(
        Bucket=BUCKET, Key=key_of(store, "file"), Body=b"x" * 100, Metadata={"crc32": "0" * 8}
    )
    with pytest.raises(
        InputError, match=r"file is not what was uploaded \(checksum differs after two downloads\); delete it"
    ):
        store.download("file", tmp_path / "out" / "back")
    assert list((tmp_path / "out").iterdir()) == []


def test_objects_of_others_have_no_digest(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    store = s3()
    bare_client(server.url).put_object(Bucket=BUCKET, Key=key_of(store, "file"), Body=b"x" * 100)
    store.download("file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"x" * 100


# --- whole folders, and much at once ---


def test_a_local_copy_is_spoken_of_by_its_uri(s3: Open, server: SeaweedFS) -> None:
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
        pytest.fail("there is nothing")
    with local_copy("Qwen/Qwen2.5-0.5B", config) as path:
        assert path == "Qwen/Qwen2.5-0.5B"


def store_settings(server: SeaweedFS) -> StorageConfig:
    return StorageConfig(endpoint_url=server.url, region="us-east-1")


@pytest.mark.parametrize("cluster", [True, False])
def test_kfp_is_told_where_a_model_was_published(
    s3: Open, server: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: bool
) -> None:
    """On a cluster instead of its own place; on a laptop the next stage reads the folder, and the URI is metadata alone."""
    monkeypatch.setenv("RLHF_RUN_ID", "run-1")
    kept = "s3://pipelines/run/model" if cluster else str(tmp_path / "model")
    model = {"artifacts": [{"name": "model", "uri": kept}]}
    given = json.dumps({"outputs": {"artifacts": {"model": model}, "outputFile": str(tmp_path / "output.json")}})
    store = s3()
    storage = store_settings(server).model_copy(update={"publish_uri": store.uri}).canonical_json()
    config = RegisterStageConfig(decision="promote").canonical_json()
    with stage_run(
        "demo", RegisterStageConfig, config=config, tracking="{}", executor_input=given, storage=storage
    ) as run:
        run.write_artifact(
            "model", tmp_path / "model", lambda draft: (draft / "config.json").write_text("{}"), kind="sft_model",
            parents={}, facts={},
        )  # fmt: skip
    (written,) = json.loads((tmp_path / "output.json").read_text())["artifacts"]["model"]["artifacts"]
    uri = f"{store.uri}/run-1/demo/model"
    assert written["uri"] == (uri if cluster else kept)
    assert written["metadata"]["published_uri"] == uri
    with local_copy(uri, store_settings(server)) as copy:
        assert open_artifact(Path(copy), "sft_model").digest == written["metadata"]["digest"]


MEMORY = """
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


def test_2_gb_within_bounded_memory(s3: Open, server: SeaweedFS, tmp_path: Path) -> None:
    size = 2 * 10**9
    with (tmp_path / "large").open("wb") as file:
        for number in range(size // (8 * MB)):
            file.write(bytes([number % 251]) * (8 * MB))
    command = [sys.executable, "-c", MEMORY, str(tmp_path), server.url, str(size)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "large").stat().st_size == size
    assert subprocess.run(["cmp", tmp_path / "sent", tmp_path / "large"]).returncode == 0
    for name in ("sent", "large"):
        (tmp_path / name).unlink()
    assert int(done.stdout) < 128 * MB


def test_ranges_are_of_the_size_these_tests_count_on() -> None:
    assert s3_download.RANGE_BYTES == 16 * 2**20
