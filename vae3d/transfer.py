"""Copies between the host and a device, so that a training step waits for the device in one function only, `read`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


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
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)  # with the strides of `tensor`
    return copy.copy_(tensor, non_blocking=True)


def host_copy(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples whose tensors are in host memory, complete when it returns.

    Tensors that occur twice are copied once.
    """
    copies: dict[int, Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in copies:
                copies[id(value)] = to_host(value.detach())
            return copies[id(value)]
        if isinstance(value, Mapping):
            return {key: copied(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copied(inner) for inner in value)
        return value

    result = copied(value)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return result
