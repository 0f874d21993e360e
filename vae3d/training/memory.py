"""Out-of-memory errors, idle GPU memory, and the memory of tensors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
GIB = 2**30

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


class PeakMemory(TorchDispatchMode):
    """Tracks the bytes of live storages that operators create: `live` now, `peak` at most. apart: not counted."""

    def __init__(self, apart: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {x.untyped_storage()._cdata for x in apart}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self._known:
                storage = x.untyped_storage()
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _freed(self, storage: int, size: int) -> None:
        self.live -= size
        self._known.discard(storage)
