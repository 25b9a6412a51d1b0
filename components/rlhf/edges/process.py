"""What a stage asks of the C library and the kernel for its own process."""

import ctypes
import os
import platform
import signal
import sys
import threading
import time

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc
PR_SET_PDEATHSIG = 1  # sys/prctl.h of Linux
DIE_WITH_PARENT = "RLHF_DIE_WITH_PARENT"


def keep_freed_memory() -> None:
    """On Linux with glibc, serve large blocks from the heap and never give it back; elsewhere do nothing.

    By default every large tensor is mapped and unmapped, and the kernel zeroes its pages each time.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_memory() -> None:
    """On Linux with glibc, return what is free now: between blocks of ever other sizes it would only grow."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def die_with_parent() -> None:
    """On Linux, and where the runner of a laptop asks for it by its process id, be killed when the runner is: no stage is left behind."""
    parent = os.environ.get(DIE_WITH_PARENT)
    if not parent or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        # It died while this process was starting, and the kernel tells of later deaths only.
        os.kill(os.getpid(), signal.SIGKILL)


def local_rank() -> int:
    """Which of the processes on this machine this is, as torchrun says."""
    return int(os.environ.get("LOCAL_RANK", "0"))


class Stop:
    """SIGTERM and Ctrl-C. At first they end the process, through every `finally`; once deferred they ask for a last checkpoint.

    Who defers looks at `signal` between steps. A step that takes longer than SECONDS_TO_SAVE, or a second signal some seconds
    later, ends the process after all: what is lost then is the work since the last checkpoint.
    """

    SECONDS_TO_SAVE = 20.0  # torchrun's agent and the runner of a laptop kill after 30
    SAME_SIGNAL_SECONDS = 2.0  # one signal to a whole group of processes arrives again through torchrun's agent

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
                f"{self.name}: saving a checkpoint after this step; once more ends at once", file=sys.stderr, flush=True
            )
            watch = threading.Timer(self.SECONDS_TO_SAVE, os.kill, (os.getpid(), number))
            watch.daemon = True
            watch.start()
        elif time.monotonic() - self._first > self.SAME_SIGNAL_SECONDS:
            sys.exit(128 + number)
