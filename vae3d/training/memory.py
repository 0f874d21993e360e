"""Running out of a GPU's memory, and giving back what is held for nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

# Libraries that allocate by themselves fail with plain RuntimeErrors.
SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in a CPU's allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def first_line(error: BaseException) -> str:
    """What an error says, for a log line; Python's own MemoryError says nothing but its name."""
    return (str(error) or type(error).__name__).splitlines()[0]


def attempted(run: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """What run() returns, or, if memory ran out in it, None and what was said; other errors are raised on."""
    reason = None
    try:
        return run(), None
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = first_line(error)
    release()
    return None, reason


def release() -> None:
    """Give cached memory back. To be called outside of the `except` that caught an error, whose traceback holds tensors
    (pytorch#18853)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def idle_gib() -> float:
    """GiB that the allocator holds without use; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    return (torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) / 2**30


def compact(threshold_gib: float | None) -> float:
    """Give idle memory back if there is more of it than the threshold; returns the GiB that were idle, else 0.

    Not done without need: the next steps must ask the driver for it again, which waits for the GPU.
    """
    idle = idle_gib()
    if threshold_gib is None or idle <= threshold_gib:
        return 0.0
    release()
    return idle
