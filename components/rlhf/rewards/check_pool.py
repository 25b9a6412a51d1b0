"""Several processes that check responses side by side, each check with a time-out that holds whatever it does."""

import os
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from components.rlhf.subprocesses.child import Child, ChildError
from components.rlhf.text.errors import InputError

PROGRAM = "components.rlhf.rewards.check_process"
SECONDS = 5.0  # for one check
GRACE_SECONDS = 5.0  # until a process that does not interrupt its check is ended
START_SECONDS = 120.0  # for the first check of a process, which imports its library
MAX_PROCESSES = 4


class CheckPool:
    """Processes start when they are needed, and end with close or with this process."""

    def __init__(self) -> None:
        self.num_processes = min(MAX_PROCESSES, _num_cores())
        self._idle: queue.SimpleQueue[tuple[Child, set[str]] | None] = queue.SimpleQueue()
        for _ in range(self.num_processes):
            self._idle.put(None)

    def check_all(self, requests: Sequence[dict[str, Any]], *, max_failed: int) -> list[dict[str, Any]]:
        """The answer to each request (check_process.py), in their order; {} where there is none within SECONDS.

        Once more than max_failed have none, the others are not checked, and have none either.
        """
        failed = [0]

        def check(request: dict[str, Any]) -> dict[str, Any]:
            if failed[0] > max_failed:
                return {}
            answer = self._check(request)
            failed[0] += not answer
            return answer

        with ThreadPoolExecutor(self.num_processes) as executor:
            return list(executor.map(check, requests))

    def close(self) -> None:
        """End the processes; the next check would start new ones."""
        for _ in range(self.num_processes):
            worker = self._idle.get()
            if worker is not None:
                worker[0].close()
            self._idle.put(None)

    def _check(self, request: dict[str, Any]) -> dict[str, Any]:
        worker, kind = self._idle.get(), request["kind"]
        try:
            child, known = worker or (Child(PROGRAM), set())
            worker = (child, known)
            if kind not in known:
                child.call({"kind": kind, "load": True}, seconds=START_SECONDS)
                known.add(kind)
            return child.call({"seconds": SECONDS, **request}, seconds=SECONDS + GRACE_SECONDS)
        except ChildError:
            child.close()
            worker = None
            if kind not in known:
                raise InputError(
                    f"The process that checks responses ({kind}) does not start; its output is above, if there is any."
                ) from None
            return {}
        finally:
            self._idle.put(worker)


def _num_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1
