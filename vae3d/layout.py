"""Channels-last memory, in which tensor cores and cuDNN's fast kernels work."""

from __future__ import annotations

from itertools import chain
from typing import TypeVar

import torch
from torch import nn

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dimensions of a weight

Network = TypeVar("Network", bound=nn.Module)


def prefers_channels_last(device: torch.device) -> bool:
    """Whether all convolutions are to run channels-last on `device`.

    On a CPU that depends on the network: those that gain there lay out their input themselves.
    """
    return device.type == "cuda"


def place(network: Network, device: torch.device | str) -> Network:
    """Move a network to a device, in the layout that is fastest there; returns it.

    Convolutions with channels-last weights give channels-last outputs, so inputs need no conversion. Values, names and
    shapes stay as they are; checkpoints and exports hold contiguous tensors or copy into the layout of the network.
    """
    network.to(device)
    if prefers_channels_last(torch.device(device)):
        for tensor in chain(network.parameters(), network.buffers()):
            if tensor.ndim in FORMATS:
                tensor.data = tensor.data.contiguous(memory_format=FORMATS[tensor.ndim])
    return network
