"""How far a long transfer is: a line every few seconds, from whichever thread moves the bytes."""

import threading
import time
from collections.abc import Callable

from components.rlhf.text.progress import format_duration

SECONDS = 5.0


class TransferProgress:
    """Counts the bytes of one transfer. The first line comes after a few seconds, so that short ones are silent."""

    def __init__(self, what: str, total: int, log: Callable[[str], None] | None, *, done: int = 0) -> None:
        self.what, self.total, self.log = what, total, log
        self._lock = threading.Lock()
        self._done = self._before = done
        self._began = self._shown = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """num_bytes more have been moved; a negative number takes back what has to be moved again."""
        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            if self.log is None or now - self._shown < SECONDS:
                return
            self._shown = now
            rate = max(1.0, (self._done - self._before) / (now - self._began))
            left = format_duration(max(0, self.total - self._done) / rate)
            text = f"{self.what}: {self._done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s, {left} left"
        self.log(text)
