"""Process groups and collectives. With one process the collectives do nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vae3d.arguments import flatten, without_source_name
from vae3d.errors import UserError
from vae3d.host_memory import keep_freed_memory
from vae3d.precision import as_device

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

T = TypeVar("T")

LONG_TIMEOUT = timedelta(hours=2)  # of collectives while one rank probes files, validates, draws samples or saves

BUCKET = 64 * 2**20  # elements of one all-reduce: as few as possible, in bounded memory

# Settings that may differ between machines. Sources are compared by what they contain, not by path.
PER_MACHINE = ("launcher", "debug", "data.source", "data.workers", "data.prefetch", "data.timeout")
PER_MACHINE += ("source", "root", "workers", "timeout", "device")


class RanksDiffer(UserError):
    """Something that must be equal on all ranks is not."""


def init_training(precision: str) -> Accelerator:
    """Join the ranks of a training run. precision: fp32, bf16 or fp16.

    Raises UserError if they do not find each other.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    timeout = InitProcessGroupKwargs(timeout=LONG_TIMEOUT)
    AcceleratorState._reset_state()  # jobs of a sweep in one process may differ in precision
    cpu = _no_accelerator() or torch.accelerator.current_accelerator().type == "mps"  # which has no float64
    accelerator = Accelerator(mixed_precision=precision.replace("fp32", "no"), cpu=cpu, kwargs_handlers=[timeout])
    if accelerator.num_processes != (ranks := int(os.environ.get("WORLD_SIZE", 1))):
        raise UserError(
            f"WORLD_SIZE is {ranks}, but this rank found {accelerator.num_processes} in all; set RANK, LOCAL_RANK, "
            "MASTER_ADDR and MASTER_PORT too, or start with torchrun, or unset WORLD_SIZE for a single process"
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def init_inference(device: str | None) -> tuple[PartialState, torch.device]:
    """Join the ranks of a command that share its files or samples. Returns them and this rank's device."""
    from accelerate import PartialState

    timeout = timedelta(days=7)  # ranks wait for the one with the longest videos
    ranks = PartialState(cpu=device == "cpu" or _no_accelerator(), timeout=timeout)
    where = inference_device(device or ranks.device)
    return ranks, where


def inference_device(device: str | torch.device | None) -> torch.device:
    """The device of a process that is no rank. None: its accelerator, or else the CPU."""
    where = as_device(device or ("cpu" if _no_accelerator() else torch.accelerator.current_accelerator()))
    if where.type == "cpu":
        keep_freed_memory()
    return where


def _no_accelerator() -> bool:
    """Without a GPU, Accelerate joins the ranks that torchrun started only with cpu=True."""
    return not torch.accelerator.is_available()


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def shorten_timeout(timeout: timedelta) -> None:
    """Let collectives from now on fail after `timeout`: a rank that died is then noticed soon. Every rank must call it.

    All ranks meet first, under the old timeout. As torchtitan `distributed/utils.py: set_pg_timeouts`.
    """
    if is_distributed():
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
        if dist.get_backend() == "nccl":
            torch.cuda.synchronize()
        _set_timeout(timeout)


@contextmanager
def long_timeout(after: timedelta) -> Iterator[None]:
    """Inside, collectives wait for LONG_TIMEOUT; then for `after`. Every rank must enter it."""
    if is_distributed():
        _set_timeout(LONG_TIMEOUT)
    yield
    shorten_timeout(after)  # not after an error: the others are elsewhere


def _set_timeout(timeout: timedelta) -> None:
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(timeout, dist.group.WORLD)
    else:  # torch 2.6, which has the same under a private name
        dist.distributed_c10d._set_pg_timeout(timeout, dist.group.WORLD)


@contextmanager
def process_group_scope() -> Iterator[None]:
    """Destroy the process group at the end: gloo's threads abort a process that exits while they run (torch 2.15).

    After an error NCCL's group is left alone: destroying it would wait for ranks that are still at work.
    """
    finished = False
    try:
        yield
        finished = True
    finally:
        if dist.is_available() and dist.is_initialized() and (finished or dist.get_backend() == "gloo"):
            # Its threads may still have to free tensors of the last collective, for which they need the GIL, and
            # destroying joins them while it holds the GIL (seen with torch 2.6: the rank hung for ever).
            time.sleep(0.1)
            dist.destroy_process_group()


def check_ranks_agree(settings: Mapping[str, Any]) -> None:
    """Compare nested settings over ranks. Every rank must call it. Raises RanksDiffer, on all ranks."""
    if not is_distributed():
        return
    own = tuple(f"{name}." for name in PER_MACHINE)
    shared = {k: v for k, v in flatten(settings).items() if not f"{without_source_name(k)}.".startswith(own)}
    ranks = all_gather_object(shared)
    keys = sorted({key for rank in ranks for key in rank})
    lines = [f"  {key}: {_by_value(key, ranks)}" for key in keys if any(r.get(key) != ranks[0].get(key) for r in ranks)]
    if lines:
        raise RanksDiffer("the ranks of this run were started with different settings or data:\n" + "\n".join(lines))


def _by_value(key: str, ranks: list[dict[str, Any]]) -> str:
    """Each value of a setting, and the ranks that have it."""
    by_value: dict[str, list[int]] = {}
    for rank, settings in enumerate(ranks):
        by_value.setdefault(str(settings.get(key)), []).append(rank)
    return ", ".join(
        f"{value} on rank{'s' * (len(which) > 1)} {', '.join(map(str, which))}" for value, which in by_value.items()
    )


# ---- collectives: every rank must call them


def all_ranks_ok(ok: bool, device: torch.device) -> bool:
    """Whether `ok` is true on every rank."""
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
    """Replace a tensor by its sum over ranks, in place."""
    if is_distributed():
        dist.all_reduce(tensor)


def all_gather_object(item: T) -> list[T]:
    """The items of all ranks, in their order, on every rank."""
    if not is_distributed():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def gather_to_main(item: T) -> list[T]:
    """The items of all ranks, in their order, on the first rank; an empty list on the others."""
    if not is_distributed():
        return [item]
    items: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(item, items)
    return items or []


def broadcast_object(item: T, source: int = 0) -> T:
    """The item of the rank `source`, on every rank. Its pickle is all that the device of each must hold."""
    if not is_distributed():
        return item
    items = [item if dist.get_rank() == source else None]
    dist.broadcast_object_list(items, source)
    return items[0]


def on_first_rank(compute: Callable[[], T]) -> T:
    """compute() of the first rank, on every rank, which also raise the UserError that it raises there."""
    result, failure = None, None
    if not is_distributed() or dist.get_rank() == 0:
        try:
            result = compute()
        except UserError as error:
            failure = error
    result, failure = broadcast_object((result, failure))
    if failure is not None:
        raise failure
    return result


def reduction_buffer(tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor | None:
    """A buffer with which all_reduce_mean of these tensors, or some of them, allocates nothing; None with one rank."""
    if not is_distributed():
        return None
    return torch.empty(reduction_elements(tensors), dtype=dtype, device=tensors[0].device)


def reduction_elements(tensors: Sequence[Tensor]) -> int:
    """Elements of their reduction_buffer."""
    sizes = [tensor.numel() for tensor in tensors]
    return min(sum(sizes), max(BUCKET, *sizes))


@torch.no_grad()
def all_reduce_mean(tensors: Iterable[Tensor], buffer: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
    """Replace each tensor by its mean over ranks, in place, in as few all-reduces as fit BUCKET.

    Ranks must give tensors of the same shapes and dtypes in the same order. buffer: see reduction_buffer. dtype: in
    which they are summed, by default their own; sums are divided in the tensors' own.
    """
    if not is_distributed():
        return
    for bucket in buckets(tensors):
        _average(bucket, buffer, dtype or bucket[0].dtype)


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype with at most BUCKET elements together; a larger tensor by itself."""
    bucket: list[Tensor] = []
    elements = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or elements + tensor.numel() > BUCKET):
            yield bucket
            bucket, elements = [], 0
        bucket.append(tensor)
        elements += tensor.numel()
    if bucket:
        yield bucket


def _average(tensors: list[Tensor], buffer: Tensor | None, dtype: torch.dtype) -> None:
    sizes = [tensor.numel() for tensor in tensors]
    if buffer is None or buffer.dtype != dtype:
        buffer = tensors[0].new_empty(sum(sizes), dtype=dtype)
    flat = buffer[: sum(sizes)]
    pieces = [piece.view(tensor.shape) for piece, tensor in zip(flat.split(sizes), tensors, strict=True)]
    torch._foreach_copy_(pieces, tensors)
    dist.all_reduce(flat)
    if dtype == tensors[0].dtype:
        flat /= dist.get_world_size()
        torch._foreach_copy_(tensors, pieces)
    else:  # a sum in bfloat16 is rounded; its mean is not rounded again
        torch._foreach_copy_(tensors, pieces)
        torch._foreach_div_(tensors, float(dist.get_world_size()))
