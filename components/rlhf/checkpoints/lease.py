"""One writer per key: the holder writes a heartbeat, and a second process fails instead of mixing in its checkpoints."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.rlhf.storage.store import Store
from components.rlhf.text.errors import InputError, RetryableError
from components.rlhf.text.strict_json import parse_json

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # without a heartbeat, which is a counter: clocks of two machines are never compared
LIMIT = 10_000  # bytes


class Lease:
    """Held from acquire() to release() by a thread that writes heartbeats; lost when another owner is found in the file."""

    def __init__(self, store: Store, key: str, log: Callable[[str], None]) -> None:
        self.store, self.key, self.log = store, key, log
        pid = os.getpid()
        self.identity = {
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "processes": _process_namespace(),
            "pid": pid,
            "started": _start_time(pid),
        }
        self.beat = 0
        self.lost = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease. Raises InputError while a live process holds it; waits up to STALE_SECONDS for its heartbeat."""
        try:
            self._acquire_once()
        except OSError as error:
            raise InputError(
                f"{self.store.uri}/{self.key} cannot be written ({error.strerror}); free some space, or correct storage.checkpoint_uri."
            ) from None
        self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)
        self._thread.start()

    def _acquire_once(self) -> None:
        if not self.store.write(self.key, self._text(), only_if_absent=True):
            other = self._read()
            if other and not self._owner_is_dead(other):
                self._wait_for_a_beat(other)
            self.store.write(self.key, self._text())
        # If two processes take over at once, or write at once to a store without conditional writes, the later one wins.
        time.sleep(min(0.2, BEAT_SECONDS))
        now = self._read()
        if now.get("owner") != self.identity["owner"]:
            raise RetryableError(_held_message(self.store.uri, self.key, now))

    def check(self) -> None:
        """Raise InputError if another process has taken over."""
        if self.lost:
            raise RetryableError(self.lost)

    def release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._read().get("owner") == self.identity["owner"]:
                self.store.delete(self.key)

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # the store is unreachable for a while; saves report it
                now = self._read()
                if not now:
                    continue  # deleted manually, or unreadable for a moment: a new owner will write it
                if now.get("owner") != self.identity["owner"]:
                    self.lost = _held_message(self.store.uri, self.key, now)
                    return
                self.beat += 1
                self.store.write(self.key, self._text())

    def _wait_for_a_beat(self, other: dict[str, Any]) -> None:
        self.log(f"waiting up to {STALE_SECONDS:.0f} s for a heartbeat of {_name(other)}, which holds the checkpoints")
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 2)
            now = self._read()
            if not now:
                return
            if (now.get("owner"), now.get("beat")) != (other.get("owner"), other.get("beat")):
                raise RetryableError(_held_message(self.store.uri, self.key, now))
        self.log(f"{_name(other)} sent no heartbeat; taking over its checkpoints")

    def _owner_is_dead(self, other: dict[str, Any]) -> bool:
        """Whether the holder ran on this machine and has died. A reused pid is told apart by its start time.

        A host name is not enough: a pod of a job that starts again has the name of the one before it, which may still run elsewhere.
        """
        pid = other.get("pid")
        here = all(other.get(key) == self.identity[key] for key in ("host", "processes"))
        if not here or not isinstance(pid, int) or not 0 < pid < 2**31:
            return False
        return _start_time(pid) != other.get("started")

    def _read(self) -> dict[str, Any]:
        """The holder; {} if there is none or it cannot be read."""
        try:
            content = parse_json(self.store.read(self.key, limit=LIMIT) or b"{}")
        except (ValueError, InputError):
            return {}
        return content if isinstance(content, dict) else {}

    def _text(self) -> bytes:
        return json.dumps({**self.identity, "beat": self.beat}).encode()


def _process_namespace() -> str:
    """The boot of this machine and the namespace of process ids in which pids here have a meaning; "" without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """When a process on this machine started, in the kernel's ticks; "" if it does not exist or there is no /proc."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state == "Z" else rest[18]
    except (OSError, IndexError):
        if not Path("/proc").is_dir():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 0)
                return "alive"
        return ""


def _name(holder: dict[str, Any]) -> str:
    """The holder as the file names it, with control characters escaped."""
    pid, host = (str(holder.get(key))[:100] for key in ("pid", "host"))
    return f"process {pid} on {host}" if (pid + host).isprintable() else f"process {pid!a} on {host!a}"


def _held_message(uri: str, key: str, holder: dict[str, Any]) -> str:
    return (
        f"{_name(holder)} is training with the same settings and inputs and writes checkpoints to {uri}/{key.rpartition('/')[0]}; "
        "wait until it ends, or set another storage.checkpoint_uri for this run."
    )
