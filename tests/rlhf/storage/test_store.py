"""The behavior that folders and buckets have in common."""

import threading
from pathlib import Path

import pytest

from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.copy import download_prefix, upload_folder
from components.rlhf.storage.s3 import make_client
from components.rlhf.storage.store import FolderStore, Store, open_store
from components.rlhf.text.errors import InputError


def test_read_returns_what_was_written(store: Store) -> None:
    assert store.read("a/b.json", limit=100) is None
    assert store.write("a/b.json", b"one")
    assert store.read("a/b.json", limit=3) == b"one"
    assert store.write("a/b.json", b"two!")
    assert store.read("a/b.json", limit=100) == b"two!"
    assert store.write("empty", b"")
    assert store.read("empty", limit=0) == b""


def test_object_longer_than_limit_is_refused(store: Store) -> None:
    store.write("state", b"12345")
    with pytest.raises(InputError, match=r"state is longer than 4 bytes"):
        store.read("state", limit=4)


def test_list_matches_folders_not_string_prefixes(store: Store) -> None:
    for key in ("run/a", "run/deep/b", "runner/c"):
        store.write(key, b"12")
    assert store.list("run") == {"run/a": 2, "run/deep/b": 2}
    assert store.list("run/deep") == {"run/deep/b": 2}
    assert store.list() == {"run/a": 2, "run/deep/b": 2, "runner/c": 2}
    assert store.list("none") == {}


def test_delete_matches_folders_not_string_prefixes(store: Store) -> None:
    for key in ("run/a", "run/deep/b", "runner/c"):
        store.write(key, b"12")
    store.delete("run")
    assert store.list() == {"runner/c": 2}
    store.delete("runner/c")
    store.delete("none")
    assert store.list() == {}


def test_conditional_write_fails_if_key_exists(store: Store) -> None:
    assert store.write("lease", b"first", only_if_absent=True)
    assert not store.write("lease", b"second", only_if_absent=True)
    assert store.read("lease", limit=100) == b"first"
    store.delete("lease")
    assert store.write("lease", b"third", only_if_absent=True)


def test_one_of_concurrent_conditional_writes_succeeds(store: Store) -> None:
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
def test_download_returns_what_was_uploaded(store: Store, tmp_path: Path, size: int) -> None:
    content = (b"weights " * (size // 8 + 1))[:size]
    (tmp_path / "file").write_bytes(content)
    store.upload(tmp_path / "file", "step-1/file")
    store.download("step-1/file", tmp_path / "out" / "back")
    assert (tmp_path / "out" / "back").read_bytes() == content
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["back"]
    assert store.list() == {"step-1/file": size}


def test_download_of_missing_key_is_refused(store: Store, tmp_path: Path) -> None:
    store.write("existing", b"1")
    with pytest.raises(InputError, match=r"missing does not exist; correct"):
        store.download("missing", tmp_path / "out" / "file")
    assert list((tmp_path / "out").iterdir()) == []


def test_folder_round_trip(store: Store, tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    for name in ("manifest.json", "config.json", "deep/weights"):
        (model / name).write_text(name)
    store.write("runs/model/old", b"of an earlier run")
    upload_folder(store, model, "runs/model", last="manifest.json")
    download_prefix(store, "runs/model", tmp_path / "back")
    downloaded = {p.relative_to(tmp_path / "back").as_posix(): p.read_text() for p in (tmp_path / "back").rglob("*.*")}
    assert downloaded == {"manifest.json": "manifest.json", "config.json": "config.json"}
    assert (tmp_path / "back/deep/weights").read_text() == "deep/weights"
    assert not (tmp_path / "back/old").exists()


def test_last_file_is_uploaded_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    for name in ("a-first", "manifest.json", "z-last"):
        (tmp_path / "model" / name).write_text(name)
    order: list[str] = []
    monkeypatch.setattr(FolderStore, "upload", lambda self, file, key: order.append(key))
    upload_folder(open_store(str(tmp_path / "store")), tmp_path / "model", "m", last="manifest.json")
    assert order == ["m/a-first", "m/z-last", "m/manifest.json"]


@pytest.mark.parametrize("name", ["m/../../out", "m//etc/passwd", "m/..\\out"])
def test_keys_that_lead_out_of_the_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A bucket may contain any key, and others may be able to write to it."""
    monkeypatch.setattr(FolderStore, "list", lambda self, prefix="": {name: 1})
    with pytest.raises(InputError, match="is a key that leads out of its folder"):
        download_prefix(open_store(str(tmp_path)), "m", tmp_path / "back")


@pytest.mark.parametrize("uri", ["gs://bucket/x", "minio://bucket/x", "s3://", "s3:///x"])
def test_unsupported_uri_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match="write s3://BUCKET/PREFIX"):
        open_store(uri)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"endpoint_url": "localhost:9000"}, "write it as http://HOST:PORT"),
        ({"endpoint_url": "http://key:secret@host"}, "credentials are not allowed in settings"),
        ({"checkpoint_uri": "gs://bucket"}, "write s3://BUCKET/PREFIX or a folder"),
        ({"publish_uri": "s3://"}, "write s3://BUCKET/PREFIX or a folder"),
    ],
)
def test_invalid_storage_settings_are_refused(config: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StorageConfig.model_validate(config)


@pytest.mark.parametrize(
    ("region", "environment", "expected"),
    [
        ("eu-west-9", {"AWS_REGION": "us-west-7", "AWS_DEFAULT_REGION": "us-west-8"}, "eu-west-9"),
        (None, {"AWS_REGION": "us-west-7", "AWS_DEFAULT_REGION": "us-west-8"}, "us-west-7"),
        (None, {"AWS_DEFAULT_REGION": "us-west-8"}, "us-west-8"),
    ],
)
def test_region_comes_from_config_or_environment(
    region: str | None, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """boto3 reads only AWS_DEFAULT_REGION; the Secret of the manifests, EKS and other SDKs set AWS_REGION."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert make_client(StorageConfig(region=region)).meta.region_name == expected
