"""Weights of a colour model for a model of other channels: RGBA, depth, or any number.

More channels: the first three are the colours. Weights that read the others start at 0, so that the latents and the
colours of the reconstruction are those of the colour model, bit for bit. The others are constant at first: the fourth
is 1, an opaque alpha, and the rest are mid-grey.
One channel (grey or depth): the first layer reads it as three equal colours, and the last writes the mean of the three,
as Marigold does (arXiv 2312.02145); it needs no copies.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vae3d.errors import UserError
from vae3d.models.interface import VideoAutoencoder

RGB = 3
OPAQUE = 1.0


def fit_channels(model: VideoAutoencoder, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The state dict for model.pixel_channels, and what was done, in words; unchanged, and "", if it fits already.

    Raises UserError for a state of other than three channels, and for a model of two.
    """
    own, channels, fitted = model.state_dict(), model.pixel_channels, dict(state)
    if channels == RGB:
        return fitted, ""
    layers = model.pixel_layers()
    names = [name for name in (*layers.inputs, *layers.outputs) if name in state and name in own]
    axes = {name: int(name in layers.inputs) for name in names}
    changed = [name for name in names if state[name].shape[axes[name]] != own[name].shape[axes[name]]]
    if not changed:
        return fitted, ""
    if channels == 2:
        raise UserError(
            "pixel_channels is 2, which weights of colours do not fit: use 1 or at least 4, or start from random"
        )
    constants = next(name for name in layers.outputs if name.endswith("bias"))  # of one layer: several add up
    for name in changed:
        axis, size = axes[name], own[name].shape[axes[name]]
        if state[name].shape[axis] * channels != size * RGB:
            raise UserError(
                f"{name} has {state[name].shape[axis]} of axis {axis}, for which pixel_channels={channels} needs "
                f"{size // channels * RGB}, those of a model of colours, or {size}"
            )
        colours = state[name].unflatten(axis, (RGB, -1))
        if channels == 1:
            fitted[name] = colours.sum(axis) if axis else colours.mean(axis)
            continue
        more = torch.zeros_like(colours.narrow(axis, 0, 1)).repeat_interleave(channels - RGB, axis)
        if name == constants:
            more.fill_(layers.grey)[:1] = OPAQUE
        fitted[name] = torch.cat([colours, more], axis).flatten(axis, axis + 1)
    return fitted, f"its first and last layers were changed from 3 to {channels} channels of pixels"
