"""What holds for every store: a folder and a bucket behave the same."""

import threading
from pathlib import Path

import pytest

from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.copy import download_prefix, upload_folder
from components.rlhf.storage.s3 import make_client
from components.rlhf.storage.store import FolderStore, Store, open_store
from components.rlhf.text.errors import InputError


def test_written_is_read(store: Store) -> None:
    assert store.read("a/b.json", limit=100) is None
    assert store.write("a/b.json", b"one")
    assert store.read("a/b.json", limit=3) == b"one"
    assert store.write("a/b.json", b"two!")
    assert store.read("a/b.json", limit=100) == b"two!"
    assert store.write("empty", b"")
    assert store.read("empty", limit=0) == b""


def test_too_long_to_be_ours(store: Store) -> None:
    store.write("state", b"12345")
    with pytest.raises(InputError, match=r"state is longer than 4 bytes"):
        store.read("state", limit=4)


def test_lists_by_folder_not_by_letters(store: Store) -> None:
    for key in ("run/a", "run/deep/b", "runner/c"):
        store.write(key, b"12")
    assert store.list("run") == {"run/a": 2, "run/deep/b": 2}
    assert store.list("run/deep") == {"run/deep/b": 2}
    assert store.list() == {"run/a": 2, "run/deep/b": 2, "runner/c": 2}
    assert store.list("none") == {}


def test_deletes_by_folder_not_by_letters(store: Store) -> None:
    for key in ("run/a", "run/deep/b", "runner/c"):
        store.write(key, b"12")
    store.delete("run")
    assert store.list() == {"runner/c": 2}
    store.delete("runner/c")
    store.delete("none")
    assert store.list() == {}


def test_only_if_absent(store: Store) -> None:
    assert store.write("lease", b"first", only_if_absent=True)
    assert not store.write("lease", b"second", only_if_absent=True)
    assert store.read("lease", limit=100) == b"first"
    store.delete("lease")
    assert store.write("lease", b"third", only_if_absent=True)


def test_of_many_at_once_exactly_one_is_first(store: Store) -> None:
    for trial in range(5):
        won: list[int] = []
        start = threading.Barrier(8)

        def compete(number: int, key: str, won: list[int], start: threading.Barrier) -> None:
            start.wait()
            if store.write(key, str(number).encode(), only_if_absent=True):
                won.append(number)

        threads = [threading.Thread(target=compete, args=(n, f"lease-{trial}", won, start)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.read(f"lease-{trial}", limit=9) == str(won[0]).encode()


@pytest.mark.parametrize("size", [0, 1, 1000, 40_000_000])
def test_files_come_back(store: Store, tmp_path: Path, size: int) -> None:
    content = (b"weights " * (size // 8 + 1))[:size]
    (tmp_path / "file").write_bytes(content)
    store.upload(tmp_path / "file", "step-1/file")
    store.download("step-1/file", tmp_path / "out" / "back")
    assert (tmp_path / "out" / "back").read_bytes() == content
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["back"]
    assert store.list() == {"step-1/file": size}


def test_download_of_nothing(store: Store, tmp_path: Path) -> None:
    store.write("there", b"1")
    with pytest.raises(InputError, match=r"not-there does not exist; correct"):
        store.download("not-there", tmp_path / "out" / "file")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_and_back(store: Store, tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    for name in ("manifest.json", "config.json", "deep/weights"):
        (model / name).write_text(name)
    store.write("runs/model/old", b"of the run before")
    upload_folder(store, model, "runs/model", last="manifest.json")
    download_prefix(store, "runs/model", tmp_path / "back")
    found = {p.relative_to(tmp_path / "back").as_posix(): p.read_text() for p in (tmp_path / "back").rglob("*.*")}
    assert found == {"manifest.json": "manifest.json", "config.json": "config.json"}
    assert (tmp_path / "back/deep/weights").read_text() == "deep/weights"
    assert not (tmp_path / "back/old").exists()


def test_a_copy_without_its_last_file_is_seen_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    for name in ("a-first", "manifest.json", "z-last"):
        (tmp_path / "model" / name).write_text(name)
    order: list[str] = []
    monkeypatch.setattr(FolderStore, "upload", lambda self, file, key: order.append(key))
    upload_folder(open_store(str(tmp_path / "store")), tmp_path / "model", "m", last="manifest.json")
    assert order == ["m/a-first", "m/z-last", "m/manifest.json"]


@pytest.mark.parametrize("name", ["m/../../out", "m//etc/passwd", "m/..\\out"])
def test_keys_that_lead_out_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A bucket may hold any key, and others may write to it."""
    monkeypatch.setattr(FolderStore, "list", lambda self, prefix="": {name: 1})
    with pytest.raises(InputError, match="names a place outside of its folder"):
        download_prefix(open_store(str(tmp_path)), "m", tmp_path / "back")


@pytest.mark.parametrize("uri", ["gs://bucket/x", "minio://bucket/x", "s3://", "s3:///x"])
def test_no_such_store(uri: str) -> None:
    with pytest.raises(InputError, match="write s3://BUCKET/PREFIX"):
        open_store(uri)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"endpoint_url": "localhost:9000"}, "write it as http://HOST:PORT"),
        ({"endpoint_url": "http://key:secret@host"}, "credentials are not allowed in settings"),
        ({"checkpoint_uri": "gs://bucket"}, "write s3://BUCKET/PREFIX or a folder"),
        ({"publish_uri": "s3://"}, "write s3://BUCKET/PREFIX or a folder"),
    ],
)
def test_settings_that_cannot_be(config: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        StorageConfig.model_validate(config)


@pytest.mark.parametrize(
    ("region", "environment", "used"),
    [
        ("eu-west-9", {"AWS_REGION": "us-west-7", "AWS_DEFAULT_REGION": "us-west-8"}, "eu-west-9"),
        (None, {"AWS_REGION": "us-west-7", "AWS_DEFAULT_REGION": "us-west-8"}, "us-west-7"),
        (None, {"AWS_DEFAULT_REGION": "us-west-8"}, "us-west-8"),
    ],
)
def test_the_region_is_the_setting_or_that_of_the_environment(
    region: str | None, environment: dict[str, str], used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """boto3 by itself reads AWS_DEFAULT_REGION alone; the Secret of the manifests, EKS and other SDKs say AWS_REGION."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert make_client(StorageConfig(region=region)).meta.region_name == used
