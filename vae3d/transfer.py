"""Copies between the host and a device, so that a training step waits for the device in one function only, `read`."""

from __future__ import annotations

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
    return host_buffer(tensor.shape, tensor.dtype, tensor.device).copy_(tensor, non_blocking=True)
