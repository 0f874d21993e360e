"""The C library's memory allocator."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def release_freed_memory() -> None:
    """Give back to the kernel what keep_freed_memory keeps, so that the memory in use can be read."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def keep_freed_memory() -> bool:
    """Let the process reuse memory that it freed, instead of giving it back to the kernel. Returns whether it will.

    By default glibc maps large tensors again each time, and the kernel zeroes their pages: an eighth of a training step
    on a CPU. Only on Linux with glibc, and not if the environment sets one of VARIABLES.
    """
    if sys.platform != "linux" or any(name in os.environ for name in VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
