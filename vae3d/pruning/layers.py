"""What the steps of pruning ask of a layer, and how they run a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vae3d.errors import UserError
from vae3d.models.interface import VideoAutoencoder

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)


class PruningError(UserError):
    """A student that a larger model cannot be pruned to."""


def sizes_of(name: str, layer: nn.Module) -> tuple[int, int]:
    """Channels that a layer reads and writes. Raises PruningError for a layer of another kind."""
    if isinstance(layer, CONVS) and (layer.groups == 1 or is_per_channel(layer)):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if is_per_channel(layer):
        size = max(p.numel() for p in layer._parameters.values() if p is not None)
        return size, size
    raise PruningError(f"{name} is a {type(layer).__name__}, whose channels cannot be pruned; give the smaller model "
                       "the same widths there")  # fmt: skip


def is_per_channel(layer: nn.Module) -> bool:
    """Whether each output channel depends on the input channel of the same index alone, but for statistics."""
    if isinstance(layer, CONVS):
        return layer.groups == layer.in_channels == layer.out_channels > 1
    if isinstance(layer, NORMS):
        return True
    own = [p for p in layer._parameters.values() if p is not None]
    return bool(own) and all(max(p.shape, default=1) == p.numel() for p in own)


def channel_axis(layer: nn.Module) -> int:
    """The axis of the channels in a layer's input and output."""
    return -1 if isinstance(layer, nn.Linear | nn.LayerNorm | nn.RMSNorm) else 1


def is_rms(layer: nn.Module) -> bool:
    """Whether it divides by the root mean square of its channels, which the number of channels changes."""
    return is_per_channel(layer) and "rms" in type(layer).__name__.lower()


def owns(layer: nn.Module) -> bool:
    return any(p is not None for p in layer._parameters.values())


def run(model: VideoAutoencoder, video: Tensor) -> Tensor:
    """The reconstruction, without gradients. Gradient mode stays on: without it TAEHV runs frame by frame on a CPU."""
    with torch.enable_grad():
        return model(video.detach(), sample=False).video.detach()


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any], before: bool = False) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
