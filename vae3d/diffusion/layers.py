"""Helpers of the networks, and access to diffusers, an optional dependency."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vae3d.errors import UserError

MIN_SIDE_OF_PATCHES = 16  # latents with a shorter side of at least this get patches of 2 x 2


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


def infer_patch(config: Mapping[str, Any], latent_shape: Sequence[int]) -> dict[str, Any]:
    """Fill in `patch`, if a transformer's configuration has none, for latents (C, t, h, w)."""
    return {**config, "patch": config.get("patch") or (2 if min(latent_shape[2:]) >= MIN_SIDE_OF_PATCHES else 1)}


def from_diffusers(name: str, module: str = "diffusers") -> Any:
    """Import a class of diffusers. Raises UserError if diffusers is not installed, or is too old to have it."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UserError(f"{name} needs diffusers, which is not installed: pip install -e .[diffusion]") from error
    except AttributeError as error:
        raise UserError(f"the installed diffusers has no {name}: pip install --upgrade diffusers") from error
