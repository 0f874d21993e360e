"""What the processes of one training run do is_distributed; alone, all of it does nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

BUCKET = 64 * 2**20  # elements of one all-reduce: as few as possible, in bounded memory


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def process_group_scope() -> Iterator[None]:
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


def all_ranks_ok(ok: bool, device: torch.device) -> bool:
    """Whether `ok` holds on every rank. Every rank must call it."""
    if not is_distributed():
        return ok
    lowest = torch.tensor(int(ok), device=device)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return bool(lowest)


@torch.no_grad()
def max_minus_min(tensor: Tensor) -> Tensor:
    """Largest minus smallest value over ranks, element by element."""
    low, high = tensor.clone(), tensor.clone()
    if is_distributed():
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return high - low


def all_reduce_sum(tensor: Tensor) -> None:
    """Replace a tensor by its sum over ranks, in place. Every rank must call it."""
    if is_distributed():
        dist.all_reduce(tensor)


def gather_to_main(mine: T) -> list[T]:
    """What each rank gives, in their order, on the first rank; nothing on the others. Every rank must call it."""
    if not is_distributed():
        return [mine]
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, parts)
    return parts or []


@torch.no_grad()
def all_reduce_mean(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, in place, in as few all-reduces as fit BUCKET.

    Ranks must give tensors of the same shapes and dtypes in the same order.
    """
    if not is_distributed():
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
