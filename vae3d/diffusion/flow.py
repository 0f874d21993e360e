"""Rectified flow: Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vae3d.arguments import Range, check_fields
from vae3d.diffusion.base import Generators, Sampler, Sampling, check_channels, mean_square, not_for, one_of, per_sample
from vae3d.diffusion.library import from_diffusers


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight paths x_t = (1 - t) z + t noise, t in [0, 1]; the network predicts their velocity, noise - z.

    logit_mean, logit_std: of the normal distribution that logit t is drawn from in training (arXiv 2403.03206, section
    3.1). A mean of ln s trains at the times that a sampler's shift of s spends its steps on.
    """

    logit_mean: Annotated[float, Range(-100, 100)] = 0.0
    logit_std: Annotated[float, Range(1e-6, 100)] = 1.0
    learned_sigma = False

    def __post_init__(self) -> None:
        check_fields(vars(self), type(self))

    def draw_times(self, generators: Generators) -> Tensor:
        """[B] in (0, 1), logit-normal."""
        normal = torch.stack([torch.randn((), generator=g, device=g.device) for g in generators])
        return torch.sigmoid(self.logit_mean + self.logit_std * normal)

    def levels(self, times: Tensor) -> Tensor:
        return times

    def network_times(self, times: Tensor) -> Tensor:
        """[B] in [0, 1000], the range that a network embeds."""
        return 1000 * times

    def noisy(self, z: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        t = per_sample(times, z)
        return (1 - t) * z + t * noise

    def losses(self, output: Tensor, z: Tensor, noise: Tensor, times: Tensor) -> dict[str, Tensor]:
        """[B] each: mse, of the velocity, and loss, the same. Raises ValueError for another number of channels."""
        check_channels(output, z, self.learned_sigma)
        mse = mean_square(output, noise - z)
        return {"loss": mse, "mse": mse}

    def sampler(self, sampling: Sampling) -> Sampler:
        """From noise to latents in Euler steps of diffusers' FlowMatchEulerDiscreteScheduler, which are equal before
        the shift. Raises ValueError for another method, and for eta."""
        one_of("method", sampling.method or "euler", ("euler",))
        not_for("rectified flow", eta=sampling.eta != 0)
        scheduler = from_diffusers("FlowMatchEulerDiscreteScheduler")(shift=sampling.shift)
        equal = torch.linspace(1, 1 / sampling.steps, sampling.steps)  # its own choice would be shifted twice
        scheduler.set_timesteps(sigmas=equal.tolist())
        times, levels, clip = scheduler.timesteps, scheduler.sigmas.tolist(), sampling.clip

        def step(output: Tensor, index: int, z: Tensor, generators: Generators) -> Tensor:
            check_channels(output, z, self.learned_sigma)
            if clip is not None:
                output = (z - (z - levels[index] * output).clamp(-clip, clip)) / levels[index]
            return scheduler.step(output, times[index], z).prev_sample

        return Sampler(times.tolist(), levels[:-1], step)
