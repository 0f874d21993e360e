"""Helpers that the networks share."""

from __future__ import annotations

from torch import nn


def zero_module(layer: nn.Module) -> nn.Module:
    """Set weight and bias to zero, and return the layer (guided-diffusion, nn.py)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def head_dim(width: int, heads: int) -> int:
    """Channels per attention head. Raises ValueError if three-axis RoPE needs another number."""
    channels, rest = divmod(width, heads)
    if rest or channels % 2 or channels < 6:
        raise ValueError(f"width is {width} for {heads} heads; use an even number of channels per head, at least 6")
    return channels
