"""Rectified flow: Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vae3d.arguments import Range, check_fields
from vae3d.diffusion import base
from vae3d.diffusion.base import Generators, Sampler, Sampling
from vae3d.diffusion.layers import from_diffusers


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight paths x_t = (1 - t) z + t noise, t in [0, 1]; the network predicts the velocity, noise - z.

    logit_mean, logit_std: normal distribution of logit t in training (arXiv 2403.03206, section 3.1). A mean of ln s
    trains at the times where a sampler with shift s spends its steps.
    """

    logit_mean: Annotated[float, Range(-100, 100)] = 0.0
    logit_std: Annotated[float, Range(1e-6, 100)] = 1.0
    learned_sigma = False

    def __post_init__(self) -> None:
        check_fields(vars(self), type(self))

    def sample_timesteps(self, generators: Generators) -> Tensor:
        """[B] in (0, 1), logit-normal."""
        normal = torch.stack([torch.randn((), generator=g, device=g.device) for g in generators])
        return torch.sigmoid(self.logit_mean + self.logit_std * normal)

    def t_normalised(self, timesteps: Tensor) -> Tensor:
        """[B] in [0, 1]."""
        return timesteps

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """[B] in [0, 1000], as the network embeds them."""
        return 1000 * timesteps

    def add_noise(self, z: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        t = base.per_sample(timesteps, z)
        return (1 - t) * z + t * noise

    def losses(self, output: Tensor, z: Tensor, noise: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        """Per sample, [B]: mse of the velocity, and loss, the same. Raises ValueError for wrong channels."""
        base.check_channels(output, z, self.learned_sigma)
        mse = base.mean_square(output, noise - z)
        return {"loss": mse, "mse": mse}

    def sampler(self, sampling: Sampling) -> Sampler:
        """Euler steps by diffusers' FlowMatchEulerDiscreteScheduler, of equal size before the shift.

        Raises ValueError for another method, and for eta.
        """
        base.choose_method(sampling.method, ("euler",))
        base.check_unused("rectified flow", eta=sampling.eta != 0)
        scheduler = from_diffusers("FlowMatchEulerDiscreteScheduler")(shift=sampling.shift)
        sigmas = torch.linspace(1, 1 / sampling.steps, sampling.steps)  # the scheduler's own would be shifted twice
        scheduler.set_timesteps(sigmas=sigmas.tolist())
        timesteps, t = scheduler.timesteps, scheduler.sigmas.tolist()
        clip = sampling.clip

        def step(output: Tensor, index: int, z: Tensor, generators: Generators) -> Tensor:
            base.check_channels(output, z, self.learned_sigma)
            if clip is not None:
                predicted = (z - t[index] * output).clamp(-clip, clip)
                output = (z - predicted) / t[index]
            return scheduler.step(output, timesteps[index], z).prev_sample

        return Sampler(timesteps.tolist(), t[:-1], step)
