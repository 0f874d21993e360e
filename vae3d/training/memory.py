"""Out-of-memory errors, and idle GPU memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

# Libraries that allocate memory themselves raise plain RuntimeErrors.
MESSAGES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or in a CPU's allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


def first_line(error: BaseException) -> str:
    """The error's first line; Python's MemoryError has no text."""
    return (str(error) or type(error).__name__).splitlines()[0]


def catch_out_of_memory(run: Callable[[], T]) -> tuple[T | None, str | None]:
    """run() and None, or, if memory runs out, None and the error message. Other errors propagate."""
    try:
        return run(), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = first_line(error)
    free_cache()  # outside of `except`, whose traceback holds tensors (pytorch#18853)
    return None, message


def free_cache() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def idle_gib() -> float:
    """GiB that the GPU's allocator holds without use; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    return (torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) / 2**30


def release_idle_memory(threshold_gib: float | None) -> float:
    """Release idle GPU memory if there is more than the threshold; returns the GiB that were idle, or 0.

    Not done every time: the next steps must allocate again, which waits for the GPU.
    """
    idle = idle_gib()
    if threshold_gib is None or idle <= threshold_gib:
        return 0.0
    free_cache()
    return idle
