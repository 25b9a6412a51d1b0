"""Progress lines of long transfers."""

import threading
import time
from collections.abc import Callable

from components.rlhf.text.progress import format_duration

INTERVAL_SECONDS = 5.0


class TransferProgress:
    """Logs the progress of one transfer every 5 seconds, starting after 5 seconds. Thread-safe."""

    def __init__(self, label: str, total: int, log: Callable[[str], None] | None, *, done: int = 0) -> None:
        self.label, self.total, self.log = label, total, log
        self._lock = threading.Lock()
        self._done = self._done_at_start = done
        self._started = self._last_logged = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """Count transferred bytes; a negative number discards bytes that have to be transferred again."""
        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            if self.log is None or now - self._last_logged < INTERVAL_SECONDS:
                return
            self._last_logged = now
            rate = max(1.0, (self._done - self._done_at_start) / (now - self._started))
            left = format_duration(max(0, self.total - self._done) / rate)
            text = f"{self.label}: {self._done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s, {left} left"
        self.log(text)
