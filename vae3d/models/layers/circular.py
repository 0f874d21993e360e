"""Circular width for networks of other libraries, which pad by themselves: 360 degree panoramas without a seam.

Their code stays as it is. While it runs, torch's convolutions and F.pad take the columns beyond the left and right edge
from the opposite side; rows and frames are padded as before.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = (torch.conv2d, torch.conv3d)
_thread = threading.local()  # `on` within a forward that is circular already: gradient checkpointing has other threads


def make_circular(network: nn.Module) -> None:
    """Make the width of all modules of a network circular, in place. State-dict keys stay.

    Exact where only convolutions and F.pad see the edges: rolling the input by a multiple of the network's stride then
    rolls its output. Every module is changed, since gradient checkpointing runs some of them again in backward.
    """
    for module in network.modules():
        cls = type(module)
        if not isinstance(module, nn.ModuleList | nn.ModuleDict | CircularBlock):
            module.__class__ = type(cls.__name__, (CircularBlock, cls), {"__module__": cls.__module__})


class CircularBlock(nn.Module):
    """Mixin of make_circular: forward of the next class, with a circular width.

    torch.compile leaves it as it is: it would lose the circle without an error.
    """

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(_thread, "on", False):
            return super().forward(*args, **kwargs)
        _thread.on = True
        try:
            with CircularWidth():
                return super().forward(*args, **kwargs)
        finally:
            _thread.on = False


class CircularWidth(TorchFunctionMode):
    """Within it, 2D and 3D convolutions and F.pad are circular along the last axis of [N, C, (T,) H, W]."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.pad:
            return _pad(*args, **kwargs)
        if func in CONVOLUTIONS:
            return _convolve(func, *args, **kwargs)
        return func(*args, **kwargs)


def _pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    if input.ndim < 4:  # of sequences
        return F.pad(input, pad, mode, value)
    left, right, *others = pad
    padded = _wrap(input, max(left, 0), max(right, 0))
    others = [min(left, 0), min(right, 0), *others]
    return F.pad(padded, others, mode, value) if any(others) else padded


def _convolve(
    func: Any, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, *args: Any, **kw: Any
) -> Tensor:
    if isinstance(padding, str):
        raise ValueError(f"the width of a convolution with padding={padding!r} cannot be made circular")
    *others, columns = [padding] * (weight.ndim - 2) if isinstance(padding, int) else padding
    return func(_wrap(input, columns, columns), weight, bias, stride, (*others, 0), *args, **kw)


def _wrap(x: Tensor, left: int, right: int) -> Tensor:
    """x with columns from the opposite side in front and behind."""
    width = x.shape[-1]
    if max(left, right) > width:
        raise ValueError(f"{max(left, right)} columns beyond the edge are more than the {width} there are")
    return torch.cat([x[..., width - left :], x, x[..., :right]], -1) if left or right else x
