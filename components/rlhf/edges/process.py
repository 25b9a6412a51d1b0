"""What a stage asks of the C library and the kernel for its own process."""

import ctypes
import os
import platform
import signal
import sys
import threading

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
    """On Linux, and where the runner of a laptop asks for it, be killed when the runner is: no stage is left behind."""
    if os.environ.get(DIE_WITH_PARENT) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def tidy_up_on_sigterm() -> None:
    """Turn SIGTERM into an exit that runs every `finally`: half-written artifacts go, and MLflow hears of the failure."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))
