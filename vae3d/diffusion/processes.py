"""Training losses of a diffusion process, and label dropout.

Latents are normalised: mean 0 and standard deviation 1 per channel. All processes have the same interface:

    timesteps = process.sample_timesteps(generators)                        # [B]
    x = process.add_noise(z, noise, timesteps)
    output = network(x, process.model_timesteps(timesteps), labels)
    process.losses(output, z, noise, timesteps)["loss"]                     # [B]
    process.sampler(Sampling(steps=50))                                     # see base.Sampler
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vae3d.diffusion.base import Generators
from vae3d.diffusion.flow import RectifiedFlow
from vae3d.diffusion.gaussian import GaussianDiffusion
from vae3d.seeding import randn_like

QUARTILES = 4

Process = GaussianDiffusion | RectifiedFlow


def training_losses(
    network: Callable[..., Tensor], process: Process, z: Tensor, generators: Generators, labels: Tensor | None = None
) -> dict[str, Tensor]:
    """Losses of normalised latents [B, C, t, h, w], [B] each: loss, mse, with learned_range vlb, and t_normalised.

    Timesteps and noise come from the generators, one per sample.
    """
    timesteps = process.sample_timesteps(generators)
    noise = randn_like(z, generators)
    output = network(process.add_noise(z, noise, timesteps), process.model_timesteps(timesteps), labels)
    losses = process.losses(output.float(), z, noise, timesteps)
    return losses | {"t_normalised": process.t_normalised(timesteps)}


def drop_labels(labels: Tensor, rate: float, num_classes: int, generators: Generators) -> Tensor:
    """Replace each of the labels [B] by the null class with probability `rate` (arXiv 2207.12598, algorithm 1)."""
    draws = torch.stack([torch.rand((), generator=g, device=g.device) for g in generators])
    return torch.where(draws.to(labels.device) < rate, num_classes, labels)


def quartile_sums(values: Tensor, t_normalised: Tensor) -> Tensor:
    """Sum and count of the values [B] in each quarter of t, from low noise to high: [4, 2] fp64.

    Sums of batches and ranks add up; sum / count are guided-diffusion's loss_q0..loss_q3.
    """
    quarters = (t_normalised * QUARTILES).long().clamp(max=QUARTILES - 1)
    values = values.detach().double()
    sums = torch.zeros(QUARTILES, 2, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, quarters, torch.stack([values, torch.ones_like(values)], 1))
