"""Following the log of a pod: each line once, across lost connections."""

import re
import threading
from collections.abc import Callable

from components.rlhf.config.trainjob import CONTAINER
from components.rlhf.text.errors import RetryableError
from components.rlhf.trainjob.api import Api, ApiError, Object, Outage

STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z ?")
READ_SECONDS = 3600.0  # a stage may print nothing for this long before the connection is renewed
Stamp = tuple[str, int]  # second, nanoseconds


class LogFollower:
    """Follows the log of one pod at a time in a thread; write receives its lines."""

    def __init__(self, api: Api, write: Callable[[str], None]) -> None:
        self._api, self._write = api, write
        self._uid, self._thread = "", threading.Thread()
        self._stop = threading.Event()

    def follow(self, pod: Object) -> None:
        """Start to follow a pod whose container has started; does nothing if it is followed already."""
        uid, name = pod["metadata"]["uid"], pod["metadata"]["name"]
        if uid == self._uid:
            return
        self._stop.set()
        self._uid, self._stop = uid, threading.Event()
        self._thread = threading.Thread(target=follow_log, args=(self._api, name, self._write, self._stop), daemon=True)
        self._thread.start()

    def finish(self, seconds: float) -> None:
        """Wait for the last lines of a pod that has ended."""
        if self._thread.ident:
            self._thread.join(seconds)
        self._stop.set()


def follow_log(api: Api, pod: str, write: Callable[[str], None], stop: threading.Event) -> None:
    """Write the lines of a pod's log until the container has ended, the pod is gone, or stop is set."""
    last, num_last = ("", 0), 0  # stamp of the last line, and number of lines with it
    outage, path = Outage(api), f"{api.pods}/{pod}/log"
    while not stop.is_set():
        query: dict[str, str | int] = {"container": CONTAINER, "follow": "true", "timestamps": "true"}
        if last[0]:
            query["sinceTime"] = f"{last[0]}Z"  # to the second, so that lines come again
        resumed, num_again = last, 0
        try:
            for line in api.lines(path, query, read_seconds=READ_SECONDS):
                outage.end()
                stamp, text = split_line(line.decode("utf-8", errors="replace"), last)
                if stop.is_set() or stamp < resumed:
                    continue
                num_again += stamp == resumed
                if stamp == resumed and num_again <= num_last and resumed[0]:
                    continue
                num_last = num_last + 1 if stamp == last else 1
                last = stamp
                write(text)
            if has_ended(api, pod):
                return
            stop.wait(api.pause(0))
        except ApiError as error:
            if error.status == 404:
                return
            try:
                outage.wait(str(error), stop)  # 400 while the container starts
            except RetryableError:
                return  # the watch of the job says it
            if error.status == 403:
                write(f"(the log cannot be read: {' '.join(str(error).split())})")
                return


def split_line(line: str, last: Stamp) -> tuple[Stamp, str]:
    """The time stamp and the text of a line; a line without a stamp has that of the line before."""
    found = STAMP.match(line)
    if not found:
        return last, line
    return (found[1], int((found[2] or "0").ljust(9, "0"))), line[found.end() :]


def has_ended(api: Api, pod: str) -> bool:
    try:
        found = api.request("GET", f"{api.pods}/{pod}")
    except ApiError as error:
        return error.status == 404
    return (found.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def tail(api: Api, pod: str, num_lines: int) -> list[str]:
    """The last lines of a pod's log; none if it is gone."""
    try:
        query: dict[str, str | int] = {"container": CONTAINER, "tailLines": num_lines}
        lines = api.lines(f"{api.pods}/{pod}/log", query, read_seconds=30.0)
        return [line.decode("utf-8", errors="replace") for line in lines][-num_lines:]
    except ApiError:
        return []
