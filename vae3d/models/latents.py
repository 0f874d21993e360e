"""Normalisation of latents by their mean and standard deviation per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LatentNormMixin(nn.Module):
    """Adds buffers latents_mean and latents_std, [1, C, 1, 1, 1], and normalisation by them."""

    latents_mean: Tensor
    latents_std: Tensor

    def register_latent_stats(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int, *, persistent: bool = False
    ) -> dict[str, tuple[float, ...]]:
        """Register the buffers (None: 0 and 1) and return them as arguments of LatentSpec.

        persistent: save them in the state dict. Raises ValueError unless there is one of each per channel.
        """
        mean = [0.0] * channels if mean is None else mean
        std = [1.0] * channels if std is None else std
        if not len(mean) == len(std) == channels:
            raise ValueError(
                f"latents_mean and latents_std have {len(mean)} and {len(std)} entries; give {channels} each"
            )
        for name, values in (("latents_mean", mean), ("latents_std", std)):
            buffer = torch.tensor(values, dtype=torch.float32)[None, :, None, None, None]
            self.register_buffer(name, buffer, persistent=persistent)
        return {"latents_mean": tuple(mean), "latents_std": tuple(std)}

    def normalize(self, z: Tensor) -> Tensor:
        return (z - self.latents_mean) / self.latents_std

    def denormalize(self, z: Tensor) -> Tensor:
        return z * self.latents_std + self.latents_mean


def latent_space(model: nn.Module) -> str:
    """raw: encode returns the VAE's own latents. normalized: it returns those that a diffusion model sees."""
    return getattr(model, "latent", "raw")


def convert_latents(z: Tensor, source: nn.Module, target: nn.Module) -> Tensor:
    """Convert latents from the space of `source` to that of `target`, with the statistics of the raw one."""
    if latent_space(source) == latent_space(target):
        return z
    return source.normalize(z) if latent_space(source) == "raw" else target.denormalize(z)
