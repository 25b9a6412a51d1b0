"""One writer per key: a second one fails, a dead one is replaced, and a replaced one notices."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.rlhf.checkpoints import lease as module
from components.rlhf.checkpoints.lease import Lease
from components.rlhf.storage.store import FolderStore
from components.rlhf.text.errors import InputError


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "STALE_SECONDS", 1.0)


def lease_in(root: Path, said: list[str] | None = None) -> Lease:
    return Lease(FolderStore(root), "ppo/abc/lease.json", (said if said is not None else []).append)


def write_other(root: Path, **other: object) -> None:
    (root / "ppo" / "abc").mkdir(parents=True)
    holder = {"owner": "other", "host": "elsewhere", "pid": 1, "started": "7", "beat": 3}
    (root / "ppo" / "abc" / "lease.json").write_text(json.dumps(holder | other))


def test_second_writer_fails_and_names_the_first(tmp_path: Path) -> None:
    first = lease_in(tmp_path)
    first.acquire()
    with pytest.raises(InputError, match=r"process \d+ on .* is training with the same settings and inputs and writes"):
        lease_in(tmp_path).acquire()
    first.check()
    first.release()
    second = lease_in(tmp_path)
    second.acquire()
    second.release()
    assert not list(tmp_path.rglob("lease.json"))


def test_silent_holder_on_another_machine_is_replaced(tmp_path: Path) -> None:
    write_other(tmp_path)
    said: list[str] = []
    started = time.monotonic()
    lease = lease_in(tmp_path, said)
    lease.acquire()
    assert time.monotonic() - started > 1.0
    assert said[1] == "process 1 on elsewhere sent no heartbeat; taking over its checkpoints"
    lease.release()


def test_dead_holder_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from components.rlhf.checkpoints.lease import Lease; "
        "from components.rlhf.storage.store import FolderStore; import os, signal; "
        "Lease(FolderStore(Path(sys.argv[1])), 'ppo/abc/lease.json', print).acquire(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert list(tmp_path.rglob("lease.json"))
    said: list[str] = []
    lease = lease_in(tmp_path, said)
    lease.acquire()
    assert said == []
    lease.release()


def test_holder_of_the_same_name_on_another_machine_is_waited_for(tmp_path: Path) -> None:
    """Pods of a job that starts again have the names, and often the process ids, of those before."""
    write_other(tmp_path, host=socket.gethostname(), processes="another boot pid:[1]", pid=os.getpid())
    said: list[str] = []
    lease = lease_in(tmp_path, said)
    lease.acquire()
    assert len(said) == 2
    lease.release()


def test_reused_pid_is_not_mistaken_for_the_holder(tmp_path: Path) -> None:
    write_other(
        tmp_path, host=socket.gethostname(), processes=module._process_namespace(), pid=os.getpid(), started="1"
    )
    said: list[str] = []
    lease = lease_in(tmp_path, said)
    lease.acquire()
    assert said == []
    lease.release()


def test_replaced_holder_fails_and_leaves_the_new_lease_alone(tmp_path: Path) -> None:
    first = lease_in(tmp_path)
    first.acquire()
    path = tmp_path / "ppo" / "abc" / "lease.json"
    path.write_text(json.dumps({"owner": "other", "host": "elsewhere", "pid": 9, "beat": 0}))
    deadline = time.monotonic() + 10
    while not first.lost:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(InputError, match="process 9 on elsewhere is training"):
        first.check()
    first.release()
    assert json.loads(path.read_text())["owner"] == "other"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"x" * 20_000])
def test_unreadable_lease_is_replaced(tmp_path: Path, content: bytes) -> None:
    write_other(tmp_path)
    path = tmp_path / "ppo" / "abc" / "lease.json"
    path.write_bytes(content)
    lease = lease_in(tmp_path)
    lease.acquire()
    assert json.loads(path.read_bytes())["pid"] == os.getpid()
    lease.release()
    assert not path.exists()
