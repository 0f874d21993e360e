"""What the processes of one training run do together; alone, all of it does nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

BUCKET = 64 * 2**20  # elements of one all-reduce: as few as possible, in bounded memory


def together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def leaving() -> Iterator[None]:
    """The process group ends with the block: gloo's threads abort a process that ends while they live (torch 2.15).

    After an error NCCL's is left to the end of the process: ending it would wait for ranks that are still at work.
    """
    finished = False
    try:
        yield
        finished = True
    finally:
        if dist.is_available() and dist.is_initialized() and (finished or dist.get_backend() == "gloo"):
            dist.destroy_process_group()


def everyone(ok: bool, device: torch.device) -> bool:
    """Whether `ok` holds on every rank. Every rank must call it."""
    if not together():
        return ok
    lowest = torch.tensor(int(ok), device=device)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return bool(lowest)


@torch.no_grad()
def spread(tensor: Tensor) -> Tensor:
    """Largest minus smallest value over ranks, element by element."""
    low, high = tensor.clone(), tensor.clone()
    if together():
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return high - low


def add_up(tensor: Tensor) -> None:
    """Replace a tensor by its sum over ranks, in place. Every rank must call it."""
    if together():
        dist.all_reduce(tensor)


def gathered(mine: T) -> list[T]:
    """What each rank gives, in their order, on the first rank; nothing on the others. Every rank must call it."""
    if not together():
        return [mine]
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, parts)
    return parts or []


@torch.no_grad()
def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, in place, in as few all-reduces as fit BUCKET.

    Ranks must give tensors of the same shapes and dtypes in the same order.
    """
    if not together():
        return
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET):
            _average(bucket)
            bucket = []
        bucket.append(tensor)
    if bucket:
        _average(bucket)


def _average(tensors: list[Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    pieces = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)])
