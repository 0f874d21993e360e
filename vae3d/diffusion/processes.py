"""How noise is added to latents, what a network learns of it, and how it is taken away again.

Latents are normalised: mean 0 and standard deviation 1 per channel. Every process has the same methods, so that
training and sampling need not know which it is:

    times = process.draw_times(generators)                            # [B]
    output = network(process.noisy(z, noise, times), process.network_times(times), labels)
    process.losses(output, z, noise, times)["loss"]                   # [B]
    process.sampler(Sampling(steps=50))                               # see base.Sampler
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
    """The losses of normalised latents [B, C, t, h, w] at times and with noise from each sample's own generator, on z's
    device: [B] each of loss, mse, with learned_range vlb, and level, the times in [0, 1]."""
    times = process.draw_times(generators)
    noise = randn_like(z, generators)
    output = network(process.noisy(z, noise, times), process.network_times(times), labels)
    return process.losses(output.float(), z, noise, times) | {"level": process.levels(times)}


def quartile_sums(values: Tensor, levels: Tensor) -> Tensor:
    """[4, 2] fp64: the sum and the count of [B] values in each quarter of the levels [0, 1], from little noise to much.
    Those of batches and ranks add up; their quotients are guided-diffusion's loss_q0..loss_q3."""
    quarters = (levels * QUARTILES).long().clamp(max=QUARTILES - 1)
    values = values.detach().double()
    sums = torch.zeros(QUARTILES, 2, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, quarters, torch.stack([values, torch.ones_like(values)], 1))
