"""Copies between the host and a device, so that a training step waits for the device in one function only, `read`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def read(values: Tensor) -> list[float]:
    """The numbers of a tensor [N]. Waits until the device has computed them: the only place where a step does."""
    return values.tolist()


def host_buffer(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised host memory, pinned if `device` is a GPU: only from pinned memory are copies asynchronous."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, without waiting for it. Memory that is not pinned is copied to pinned memory first."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory. On a GPU it is complete after the next `read`, or once the stream is synchronised."""
    if tensor.is_meta:
        return tensor
    return _host_like(tensor).copy_(tensor, non_blocking=True)


def _host_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)  # with the strides of `tensor`


# ---- host memory that is used again


class HostBuffers:
    """Host memory for copies of nested values, used again by the next copy.

    The kernel zeroes new memory page by page, which takes several times as long as the copy; to pin it takes longer
    still. So it is kept. The tensors of a copy change with the next one.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def reserve(self, value: Any) -> None:
        """Allocate memory for copies of values like this one, and touch it."""
        self._buffers = [_host_like(tensor).zero_() for tensor in {id(t): t for t in tensors_of(value)}.values()]

    def copy(self, value: Any) -> Any:
        """`value` with its tensors in host memory. On a GPU the copies are queued on the current stream.

        Tensors that occur twice are copied once.
        """
        before, self._buffers = self._buffers, []
        copies: dict[int, Tensor] = {}

        def copied(tensor: Tensor) -> Tensor:
            if id(tensor) not in copies:
                position = len(self._buffers)
                buffer = before[position] if position < len(before) else None
                if buffer is None or not _same_layout(buffer, tensor):
                    buffer = _host_like(tensor)
                self._buffers.append(buffer)
                copies[id(tensor)] = buffer.copy_(tensor.detach(), non_blocking=True)
            return copies[id(tensor)]

        return map_tensors(copied, value)


def _same_layout(buffer: Tensor, tensor: Tensor) -> bool:
    """Whether `buffer` is as _host_like(tensor) would be."""
    if (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
        return False
    return buffer.stride() == torch.empty_like(tensor, device="meta").stride()


def host_copy(value: Any, buffers: HostBuffers | None = None) -> Any:
    """A copy of nested dicts, lists and tuples whose tensors are in host memory, complete when it returns.

    buffers: memory for it, whose last copy is overwritten; by default new memory.
    """
    result = (buffers or HostBuffers()).copy(value)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return result


def map_tensors(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    """fn of every tensor in nested dicts, lists, tuples and dataclasses; other values stay as they are."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(fn, inner) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(fn, inner) for inner in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(fn, inner) for inner in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: map_tensors(fn, getattr(value, name)) for name in fields})
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested dicts, lists, tuples and dataclasses."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: (found.append(tensor), tensor)[1], value)
    return found


# ---- copies beside the computation, on streams of their own


def has_streams(device: torch.device) -> bool:
    """Whether copies to and from `device` can run while it computes."""
    return device.type == "cuda"


class InputCopies(Generic[T]):
    """Copies batches to a device while it computes.

    A batch that was queued is copied on a stream of its own, and `take` lets the current stream wait for that copy
    only. Where a device has no streams, `queue` does nothing and `take` copies.

    copy: a batch in pinned host memory -> the batch on the device, by copies that do not wait.
    """

    def __init__(self, device: torch.device, copy: Callable[[T], T]) -> None:
        self.device, self.copy = device, copy
        self.ahead = has_streams(device)
        self._stream = torch.cuda.Stream(device) if self.ahead else None
        self._queued: list[tuple[T, T, torch.cuda.Event]] = []  # batch, its copy, when that is complete

    def queue(self, batch: T) -> None:
        """Begin to copy a batch that a later `take` will ask for."""
        if not self.ahead:
            return
        try:
            with torch.cuda.stream(self._stream):
                copied = self.copy(batch)
        except torch.OutOfMemoryError:  # `take` tries again, where the step can be skipped
            return
        self._queued.append((batch, copied, self._stream.record_event()))

    def take(self, batch: T) -> T:
        """The batch on the device, for work on the current stream."""
        for position, (queued, copied, complete) in enumerate(self._queued):
            if queued is batch:
                del self._queued[position]
                current = torch.cuda.current_stream(self.device)
                current.wait_event(complete)
                _used_on(current, copied, self.device)
                return copied
        return self.copy(batch)

    def each(self, batches: Sequence[T]) -> Iterator[T]:
        """The batches on the device; while one is used, the next is copied. Drops what was queued beside them."""
        self._queued = [entry for entry in self._queued if any(entry[0] is batch for batch in batches)]
        for position, batch in enumerate(batches):
            on_device = self.take(batch)
            if position + 1 < len(batches):
                self.queue(batches[position + 1])
            yield on_device


def _used_on(stream: torch.cuda.Stream, value: Any, device: torch.device) -> None:
    """The memory of these tensors, allocated on another stream, is not given away before `stream` has used it."""
    for tensor in tensors_of(value):
        if tensor.device.type == device.type:
            tensor.record_stream(stream)


def on_host(items: Iterable[T], device: torch.device) -> Iterator[T]:
    """The items with their tensors in host memory.

    On a GPU one item is computed while the one before is copied to pinned memory and used: an item is asked for, which
    queues its work, before the last is returned. Its tensors are valid until the next item is asked for, since two
    buffers take turns. Elsewhere the items are returned as they are.

    items: nested dicts, lists, tuples or dataclasses; what computes them must not wait for the device. device: of
    their tensors.
    """
    if not has_streams(device):
        yield from items
        return
    stream, ring = torch.cuda.Stream(device), (HostBuffers(), HostBuffers())
    last: tuple[T, torch.cuda.Event] | None = None
    for position, item in enumerate(items):
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            copied = ring[position % len(ring)].copy(item)
        _used_on(stream, item, device)
        del item
        queued = copied, stream.record_event()
        if last is not None:
            last[1].synchronize()
            yield last[0]
        last = queued
    if last is not None:
        last[1].synchronize()
        yield last[0]
