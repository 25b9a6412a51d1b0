"""How far a long transfer is: a line every few seconds, from whichever thread moves the bytes."""

import threading
import time
from collections.abc import Callable

from components.rlhf.edges.progress import clock

SECONDS = 5.0


class Meter:
    """Counts the bytes of one transfer. The first line comes after a few seconds, so that short ones are silent."""

    def __init__(self, what: str, total: int, say: Callable[[str], None] | None, *, done: int = 0) -> None:
        self.what, self.total, self.say = what, total, say
        self._lock = threading.Lock()
        self._done = self._before = done
        self._began = self._shown = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """num_bytes more have been moved; a negative number takes back what has to be moved again."""
        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            if self.say is None or now - self._shown < SECONDS:
                return
            self._shown = now
            rate = max(1.0, (self._done - self._before) / (now - self._began))
            left = clock(max(0, self.total - self._done) / rate)
            text = f"{self.what}: {self._done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s, {left} left"
        self.say(text)
