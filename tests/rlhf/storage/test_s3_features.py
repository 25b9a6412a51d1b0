"""S3 servers that lack checksums, conditional writes or requests for several objects: what still works, and what is said."""

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

from components.rlhf.checkpoints import lease as lease_module
from components.rlhf.checkpoints.lease import Lease
from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage import s3 as s3_module
from components.rlhf.storage.s3 import S3Store, make_client
from components.rlhf.storage.s3_features import COST, sends_checksums
from components.rlhf.text.errors import InputError
from tests.support.limited_s3 import LimitedS3

CHECKSUM_ANSWERS = ["accept", "NotImplemented", "InvalidArgument", "SignatureDoesNotMatch", "XAmzContentSHA256Mismatch"]
LIMITS = [
    {
        "checksums": checksums,
        "conditional_writes": writes,
        "delete_objects": number % 2 == 0,
        "list_uploads": number % 4 < 2,
    }
    for number, (checksums, writes) in enumerate(itertools.product(CHECKSUM_ANSWERS, ["honour", "ignore", "reject"]))
]


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
        monkeypatch.delenv(name, raising=False)


def open_limited(server: LimitedS3, log: list[str]) -> S3Store:
    return S3Store("s3://bucket/run", StorageConfig(endpoint_url=server.url, retry_minutes=0.01), log.append)


@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: "-".join(map(str, limits.values())))
def test_every_limited_server_stores_the_same(limits: dict[str, Any], tmp_path: Path) -> None:
    """All operations give what FolderStore gives, whatever the server lacks; what is lost is said once."""
    file, log = tmp_path / "file", []
    file.write_bytes(bytes(range(256)) * 100)
    with LimitedS3(**limits) as server:
        store = open_limited(server, log)
        assert store.write("a/1", b"one") and store.write("a/1", b"two")
        assert not store.write("a/1", b"three", only_if_absent=True)
        assert store.write("a/2", b"new", only_if_absent=True)
        assert (store.read("a/1", limit=99), store.read("a/2", limit=99)) == (b"two", b"new")
        store.upload(file, "b/file")
        store.download("b/file", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == file.read_bytes()
        assert store.list() == {"a/1": 3, "a/2": 3, "b/file": 25_600}  # and no probe
        store.delete("a")
        assert set(server.objects) == {"run/b/file"}
    lacking = {
        "checksum headers": limits["checksums"] != "accept",
        "conditional writes": limits["conditional_writes"] != "honour",
        "DeleteObjects": not limits["delete_objects"],
        "ListMultipartUploads": not limits["list_uploads"],
    }
    expected = [
        f"s3://bucket/run does not support {name}: {COST[name]}" for name, is_lacking in lacking.items() if is_lacking
    ]
    assert sorted(log) == sorted(expected)


@pytest.mark.parametrize("conditional_writes", ["ignore", "reject"])
def test_one_of_two_stages_holds_the_lease_without_conditional_writes(
    conditional_writes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.5)
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 2.0)
    with LimitedS3(conditional_writes=conditional_writes) as server:
        leases = [Lease(open_limited(server, []), "k/lease.json", lambda _: None) for _ in range(2)]
        refused: list[str] = []

        def acquire(lease: Lease) -> None:
            try:
                lease.acquire()
            except InputError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=acquire, args=(lease,)) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 1 and "is training with the same settings" in refused[0]
        for lease in leases:
            lease.release()


def test_server_that_forgets_writes_is_refused() -> None:
    with LimitedS3(forgets_writes=True) as server:
        store = open_limited(server, [])
        with pytest.raises(
            InputError, match="^s3://bucket/run: an object that was just written reads differently; use another store.$"
        ):
            store.write("lease", b"x", only_if_absent=True)


def test_unsupported_request_fails_at_once_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """501 is not retried, and not blamed on the address."""
    with LimitedS3(checksums="NotImplemented") as server:
        monkeypatch.setattr(s3_module, "may_reject_checksums", lambda error: False)
        with pytest.raises(
            InputError, match="could not write a: the server does not support it .no NotImplemented.; use a server"
        ):
            open_limited(server, []).write("a", b"1")
        assert sum(request.startswith("PUT") for request in server.requests) == 1


@pytest.mark.parametrize("value", ["when_required", "when_supported"])
def test_checksum_setting_of_boto3_is_heeded(monkeypatch: pytest.MonkeyPatch, value: str, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", value)
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", value)
    log: list[str] = []
    with LimitedS3(checksums="NotImplemented") as server:
        store = open_limited(server, log)
        assert sends_checksums(make_client(StorageConfig(endpoint_url=server.url))) == (value == "when_supported")
        assert store.write("a", b"1")
        (tmp_path / "f").write_bytes(b"2")
        store.upload(tmp_path / "f", "b")
    assert bool(log) == (value == "when_supported")


@pytest.mark.parametrize("prefix", ["", "/", ".", "./", "..", "a/../.."])
def test_whole_store_is_never_deleted(prefix: str) -> None:
    with LimitedS3() as server:
        store = open_limited(server, [])
        store.write("a", b"1")
        with pytest.raises(ValueError, match="is not a prefix that can be deleted"):
            store.delete(prefix)
        assert set(server.objects) == {"run/a"}
