"""A process of its own for code that may hang, crash or leak: it answers requests one at a time, and ends with this process."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

TICK_SECONDS, MEMORY_SECONDS = 0.05, 0.5  # between looks at whether the process lives, and at its memory
CHUNK = 2**16


class ChildError(Exception):
    """A request has no answer, and the process is of no more use."""

    def __init__(self, reason: Literal["ended", "late", "memory"]) -> None:
        super().__init__(reason)
        self.reason = reason


class Child:
    """A Python program that serves requests (serving.py), in a session of its own. What it prints goes to our standard error."""

    def __init__(self, program: str) -> None:
        child_reads, requests = os.pipe()
        results, child_writes = os.pipe()
        # The child ends when its standard input is closed: when this process ends, however it does.
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", program, str(child_reads), str(child_writes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(child_reads, child_writes),
            start_new_session=True,
        )
        os.close(child_reads)
        os.close(child_writes)
        for descriptor in (requests, results):
            os.set_blocking(descriptor, False)
        self._requests, self._results, self._number = requests, results, 0
        # Through this process, which redacts what it writes.
        printer = threading.Thread(target=_print_lines, args=(self.process.stdout,), daemon=True)
        printer.start()
        self._end = weakref.finalize(self, _end, self.process, printer, (requests, results))

    def call(self, request: dict[str, Any], *, seconds: float, max_bytes: float | None = None) -> dict[str, Any]:
        """The answer to a request. Raises ChildError if it is late, or the process ends or takes more memory than max_bytes."""
        self._number += 1
        message = {"number": self._number, **request}
        outgoing = memoryview(json.dumps(message).encode() + b"\n")
        incoming = bytearray()
        deadline, next_look = time.monotonic() + seconds, time.monotonic() + MEMORY_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self._results, selectors.EVENT_READ)
            selector.register(self._requests, selectors.EVENT_WRITE)
            while True:
                ready = {key.fd for key, _ in selector.select(TICK_SECONDS)}
                if self._requests in ready:
                    outgoing = outgoing[self._write(outgoing[:CHUNK]) :]
                    if not outgoing:
                        selector.unregister(self._requests)
                if self._results in ready:
                    incoming += self._read()
                    if incoming.endswith(b"\n"):
                        break
                elif self.process.poll() is not None:
                    raise ChildError("ended")
                now = time.monotonic()
                if now > deadline:
                    raise ChildError("late")
                if max_bytes and now > next_look:
                    next_look = now + MEMORY_SECONDS
                    if session_memory(self.process.pid) > max_bytes:
                        raise ChildError("memory")
        answer: dict[str, Any] = json.loads(incoming)
        if answer.pop("number", None) != self._number:
            raise ChildError("ended")
        return answer

    def close(self) -> None:
        """End the process and whatever it has started."""
        self._end()

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._requests, data)
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            raise ChildError("ended") from None

    def _read(self) -> bytes:
        try:
            data = os.read(self._results, CHUNK)
        except BlockingIOError:
            return b""
        if not data:
            raise ChildError("ended")
        return data


def session_memory(session: int) -> int:
    """Resident memory in bytes of all processes of a session; 0 where there is no /proc."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session:
                total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


def pod_memory() -> float:
    """Memory in bytes that this container or machine has."""
    limits = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # not this version of cgroups, or "max"
            limits.append(float(Path(path).read_text()))
    return min(limits)


def _end(process: "subprocess.Popen[str]", printer: threading.Thread, descriptors: tuple[int, ...]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
    process.wait()
    printer.join(timeout=5.0)
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()
    for descriptor in descriptors:
        os.close(descriptor)


def _print_lines(lines: Iterable[str] | None) -> None:
    with contextlib.suppress(ValueError):  # closed while a grandchild still held the other end
        for line in lines or ():
            print(line.rstrip("\n"), file=sys.stderr, flush=True)
