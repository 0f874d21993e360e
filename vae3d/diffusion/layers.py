"""Helpers of the networks, and access to diffusers, an optional dependency."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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


def class_ids(labels: Tensor | None, batch: int, num_classes: int, device: torch.device) -> Tensor | None:
    """Class embedding indices [B] in [0, num_classes]; labels=None selects the null class, num_classes, for all.

    None for a network without classes (num_classes 0).
    Raises ValueError for labels without classes, and for any other number of labels than samples.
    """
    if labels is None:
        return torch.full((batch,), num_classes, device=device) if num_classes else None
    if not num_classes:
        raise ValueError("labels are given to a network without classes; build it with num_classes, or pass no labels")
    if labels.shape != (batch,):
        raise ValueError(f"labels have shape {tuple(labels.shape)}; pass one for each of the {batch} samples")
    return labels.to(device)


def from_diffusers(name: str, module: str = "diffusers") -> Any:
    """Import a class of diffusers. Raises UserError if diffusers is not installed, or is too old to have it."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UserError(f"{name} needs diffusers, which is not installed: pip install -e '.[diffusers]'") from error
    except AttributeError as error:
        raise UserError(f"the installed diffusers has no {name}: pip install --upgrade diffusers") from error
