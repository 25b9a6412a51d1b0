"""Tuning of memory: glibc's malloc, Python's garbage collection, and the kernels that are kept."""

import ctypes
import gc
import os
import platform

# Kernels that oneDNN, and torch's layer above it, keep for reuse: 1,024 by default, up to a MiB each.
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
NUM_KERNELS = 64  # several times the shapes of one pass
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> None:
    """With glibc, allocate large blocks on the heap and keep them when freed; otherwise do nothing.

    By default every large tensor is mapped and unmapped, and the kernel zeroes its pages each time.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def keep_few_kernels() -> None:
    """Bound the kernels for bf16 on a CPU, which are made for every number of tokens; otherwise memory grows for hundreds of steps.

    Call it before torch computes anything. Variables that are set already stay as they are.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(NUM_KERNELS))


def release_freed_memory() -> None:
    """With glibc, return free heap memory to the system; fragmentation by blocks of varying sizes would let it grow."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def release_models() -> None:
    """Return the memory of models to which nothing refers any more, also in cycles: to the GPU and to the system."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    release_freed_memory()


def collect_old_objects_rarely() -> None:
    """Visit objects that have survived two collections 20 times less often than by default.

    The imports of a stage create hundreds of thousands of objects and no garbage, and by default all of them are visited again and
    again. Young objects, such as a step's tensors in a cycle, are collected as by default.
    """
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 200)
