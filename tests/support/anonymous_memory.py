"""Peak anonymous memory of this process between two moments, read by another process.

Anonymous memory is what the process has allocated; pages of files that it has mapped do not count, because the kernel can drop them.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from components.rlhf.runtime.memory import release_freed_memory

WATCH = r"""
import os, re, select, sys
path, peak = sys.argv[1], 0
while True:
    with open(path) as file:
        peak = max(peak, 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", file.read())[1]))
    if select.select([0], [], [], 0.001)[0]:
        if not os.read(0, 1):
            break
        os.write(1, peak.to_bytes(8, "big"))
        peak = 0
"""


def anonymous_bytes() -> int:
    """Anonymous memory of this process now."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{os.getpid()}/status").read_text())
    assert found
    return 1024 * int(found[1])


class Peak:
    """The peak since the block began, in bytes above what the process held then. Freed memory is returned to the system before."""

    above: int

    @classmethod
    @contextlib.contextmanager
    def watched(cls) -> Iterator["Peak"]:
        command = [sys.executable, "-c", WATCH, f"/proc/{os.getpid()}/status"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as watcher:
            assert watcher.stdin and watcher.stdout
            release_freed_memory()
            before, peak = anonymous_bytes(), cls()
            ask(watcher)
            yield peak
            peak.above = ask(watcher) - before
            watcher.stdin.close()


def ask(watcher: "subprocess.Popen[bytes]") -> int:
    """The largest value since the last question."""
    assert watcher.stdin and watcher.stdout
    watcher.stdin.write(b"?")
    return int.from_bytes(watcher.stdout.read(8), "big")
