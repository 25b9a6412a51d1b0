"""How this process keeps and returns freed memory (glibc's malloc)."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> None:
    """On Linux with glibc, serve large blocks from the heap and never give it back; elsewhere do nothing.

    By default every large tensor is mapped and unmapped, and the kernel zeroes its pages each time.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory() -> None:
    """On Linux with glibc, return what is free now: between blocks of ever other sizes it would only grow."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
