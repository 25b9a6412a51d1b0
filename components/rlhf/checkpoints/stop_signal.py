"""SIGTERM and Ctrl-C as a request for a last checkpoint."""

import os
import signal
import sys
import threading
import time


class StopSignal:
    """Handles SIGTERM and Ctrl-C. They end the process through every `finally` until defer() is called; then they are recorded.

    After defer() the training loop checks `signal` between steps and saves a checkpoint. If the step takes longer than
    SECONDS_TO_SAVE, or a second signal arrives some seconds later, the process ends at once and loses the work since the
    latest checkpoint.
    """

    SECONDS_TO_SAVE = 20.0  # torchrun's agent and the local runner kill after 30
    SAME_SIGNAL_SECONDS = 2.0  # torchrun's agent forwards a signal that was sent to its whole process group

    def __init__(self) -> None:
        self.signal = 0
        self._deferred = False
        self._first = 0.0

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name if self.signal else ""

    @property
    def exit_code(self) -> int:
        return 128 + self.signal

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)

    def defer(self) -> None:
        self._deferred = True

    def _on_signal(self, number: int, _frame: object) -> None:
        if not self._deferred:
            sys.exit(128 + number)
        if not self.signal:
            self.signal, self._first = number, time.monotonic()
            print(
                f"{self.name}: saving a checkpoint after this step; send it again to stop at once",
                file=sys.stderr,
                flush=True,
            )
            watch = threading.Timer(self.SECONDS_TO_SAVE, os.kill, (os.getpid(), number))
            watch.daemon = True
            watch.start()
        elif time.monotonic() - self._first > self.SAME_SIGNAL_SECONDS:
            sys.exit(128 + number)
