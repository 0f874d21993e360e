"""The mean and standard deviation of an autoencoder's latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LatentNormMixin(nn.Module):
    """A network that knows the mean (`shift`) and deviation (`scale`) of its latents, per channel."""

    shift: Tensor
    scale: Tensor

    def register_latent_stats(
        self, shift: Sequence[float] | None, scale: Sequence[float] | None, channels: int, *, persistent: bool = False
    ) -> dict[str, tuple[float, ...]]:
        """Keep them as buffers, by default beside the weights and not among them, and return them for a LatentSpec.

        None: 0 and 1. Raises ValueError if they are not as many as the channels.
        """
        shift = [0.0] * channels if shift is None else shift
        scale = [1.0] * channels if scale is None else scale
        if not len(shift) == len(scale) == channels:
            raise ValueError(f"shift and scale have {len(shift)} and {len(scale)} entries; give {channels} each")
        for name, values in (("shift", shift), ("scale", scale)):
            buffer = torch.tensor(values, dtype=torch.float32)[None, :, None, None, None]
            self.register_buffer(name, buffer, persistent=persistent)
        return {"shift": tuple(shift), "scale": tuple(scale)}

    def normalize(self, z: Tensor) -> Tensor:
        return (z - self.shift) / self.scale

    def denormalize(self, z: Tensor) -> Tensor:
        return z * self.scale + self.shift
