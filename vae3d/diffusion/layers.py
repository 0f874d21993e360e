"""What the networks share."""

from __future__ import annotations

from torch import nn


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer, with weight and bias of zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def head_width(width: int, heads: int) -> int:
    """Channels of an attention head, over which rotary positions of three axes can be spread. Raises ValueError."""
    channels, left = divmod(width, heads)
    if left or channels % 2 or channels < 6:
        raise ValueError(f"width is {width} for {heads} heads; give each an even number of channels, at least 6")
    return channels
