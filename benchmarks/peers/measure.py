"""What a measured process does: mark CPU and wall time, read its peak memory, print its result as one line.

Imports the standard library only, so that every environment can use it.
"""

import json
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

RESULT = "RESULT "


class Marks:
    """Moments between iterations. CPU time is user plus system time of this process, over all threads."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        self._marks.append((time.process_time(), time.perf_counter()))

    def drop_first(self) -> None:
        """Forget the first mark: what came before the second was a warm-up."""
        del self._marks[0]

    def intervals(self) -> list[list[float]]:
        """[CPU seconds, wall seconds] between each mark and the next one."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [[after[0] - before[0], after[1] - before[1]] for before, after in pairs]


def peak_bytes() -> int:
    """Largest resident set of this process so far (VmHWM)."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def read_job() -> dict[str, Any]:
    """What this process is to measure: a JSON object, the only argument of the program."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    return job


def print_result(marks: Marks, *, version: str, samples: float, tokens: float, **more: Any) -> None:
    """Print the measurements for the process that started this one; samples and tokens are means per iteration."""
    result = {
        "version": version,
        "samples": samples,
        "tokens": tokens,
        "intervals": marks.intervals(),
        "peak_bytes": peak_bytes(),
    } | more
    print(f"{RESULT}{json.dumps(result)}", flush=True)
