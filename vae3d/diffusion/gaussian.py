"""Gaussian diffusion: Ho et al., arXiv 2006.11239; Nichol and Dhariwal, arXiv 2102.09672.

Follows openai/guided-diffusion (MIT), gaussian_diffusion.py and respace.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from vae3d.arguments import Range, check_fields
from vae3d.diffusion import base
from vae3d.diffusion.base import Generators, Sampler, Sampling
from vae3d.diffusion.layers import from_diffusers
from vae3d.transfer import to_device


@dataclass(frozen=True)
class GaussianDiffusion:
    """A Markov chain of `steps` noising steps, and its reverse.

    schedule: linear (betas 1e-4..0.02 at 1000 steps) or cosine.
    prediction: epsilon (the noise), or v = sqrt(abar) noise - sqrt(1 - abar) z (arXiv 2202.00512). An error in the
    predicted noise reaches the latents times 1 / sqrt(abar), 157 (linear) or 20000 (cosine) at the last timestep:
    samples of a poorly trained network explode, unless Sampling.clip bounds them. v has no such factor.
    variance: of the reverse steps: fixed_small (posterior variance), fixed_large (beta), or learned_range, where the
    second half of the output channels interpolates between their logarithms.
    rescale_learned_sigmas: weight the variational bound by steps / 1000, as guided-diffusion's flag does.
    min_snr: upper bound of the signal-to-noise ratio in the loss weight (arXiv 2303.09556), often 5.
    Raises ValueError for unknown choices, and for too few steps.
    """

    steps: Annotated[int, Range(2, 100_000)] = 1000
    schedule: Literal["linear", "cosine"] = "linear"
    prediction: Literal["epsilon", "v"] = "epsilon"
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"
    rescale_learned_sigmas: bool = True
    min_snr: Annotated[float, Range(1e-6, 1e6)] | None = None

    def __post_init__(self) -> None:
        check_fields(vars(self), type(self))
        min_steps = 21 if self.schedule == "linear" else 2  # with fewer, the last beta would be 1 or more
        if self.steps < min_steps:
            raise ValueError(f"steps is {self.steps}; a {self.schedule} schedule needs at least {min_steps}")

    @property
    def learned_sigma(self) -> bool:
        return self.variance == "learned_range"

    @cached_property
    def betas(self) -> Tensor:
        """[steps] fp64."""
        if self.schedule == "linear":
            scale = 1000 / self.steps
            return torch.linspace(scale * 1e-4, scale * 0.02, self.steps, dtype=torch.float64)
        t = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        alphas_cumprod = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2  # arXiv 2102.09672, equation 17
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """abar, [steps] fp64: the fraction of the data's variance that remains."""
        return (1 - self.betas).cumprod(0)

    def sample_timesteps(self, generators: Generators) -> Tensor:
        """[B] int64 in [0, steps), uniform."""
        return torch.stack([torch.randint(self.steps, (), generator=g, device=g.device) for g in generators])

    def t_normalised(self, timesteps: Tensor) -> Tensor:
        """[B] in [0, 1)."""
        return timesteps / self.steps

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """[B], as the network embeds them."""
        return timesteps

    def add_noise(self, z: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar) z + sqrt(1 - abar) noise."""
        signal, sigma = self._signal_and_sigma(timesteps, z)
        return signal * z + sigma * noise

    def losses(self, output: Tensor, z: Tensor, noise: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        """Per sample, [B]: mse of the prediction, loss to train, and with learned_range vlb: the term of the
        variational bound, in bits per latent value.

        loss = mse (weighted, with min_snr) + vlb, whose gradient does not reach the mean (arXiv 2102.09672, section
        3.1). vlb: KL of the posterior and the reverse step; at timestep 0 a Gaussian negative log-likelihood, since
        latents are continuous (guided-diffusion discretises to 8-bit pixels).
        Raises ValueError for a number of channels that does not fit `variance`.
        """
        prediction, fraction = self._split(output, z)
        signal, sigma = self._signal_and_sigma(timesteps, z)
        target = noise if self.prediction == "epsilon" else signal * noise - sigma * z
        mse = base.mean_square(prediction, target)
        loss = mse if self.min_snr is None else self._snr_weight(timesteps).to(mse) * mse
        if fraction is None:
            return {"loss": loss, "mse": mse}
        vlb = self._variational_bound((target - prediction).detach(), fraction, timesteps)
        scale = self.steps / 1000 if self.rescale_learned_sigmas else 1.0
        return {"loss": loss + scale * vlb, "mse": mse, "vlb": vlb}

    def sampler(self, sampling: Sampling) -> Sampler:
        """Steps of diffusers' schedulers.

        method: ddpm, ancestral sampling at timesteps spread evenly from 0 to T - 1 (guided-diffusion's respacing N,
        which may round halves differently); or ddim, at multiples of an integer stride (its respacing ddimN;
        arXiv 2010.02502).
        Raises ValueError for another method, for steps that do not divide the chain, and for shift.
        """
        method = base.choose_method(sampling.method, ("ddpm", "ddim"))
        base.check_unused("Gaussian diffusion", shift=sampling.shift != 1)
        base.check_unused("ddpm", eta=method == "ddpm" and sampling.eta != 0)
        # A single step would be the one from the least noise; ddim needs an integer stride.
        possible = [n for n in range(2, self.steps + 1) if method == "ddpm" or self.steps % n == 0]
        if sampling.steps not in possible:
            nearest = sorted(sorted(possible, key=lambda n: abs(n - sampling.steps))[:3])
            raise ValueError(
                f"steps is {sampling.steps}; {method} cannot divide {self.steps} timesteps by it, use for example "
                f"{', '.join(map(str, nearest))}"
            )
        scheduler = self._scheduler(method, sampling.clip)
        scheduler.set_timesteps(sampling.steps)
        timesteps = scheduler.timesteps.tolist()

        def step(output: Tensor, index: int, z: Tensor, generators: Generators) -> Tensor:
            prediction, _ = self._split(output, z)
            options: dict[str, Any] = {"generator": list(generators)}
            if method == "ddim":  # has no learned variances
                options |= {"eta": sampling.eta, "use_clipped_model_output": sampling.clip is not None}
            output = output if method == "ddpm" else prediction
            return scheduler.step(output, timesteps[index], z, **options).prev_sample

        return Sampler(timesteps, [t / self.steps for t in timesteps], step)

    def _scheduler(self, method: str, clip: float | None) -> Any:
        options: dict[str, Any] = {
            "num_train_timesteps": self.steps,
            "trained_betas": self.betas.tolist(),
            "prediction_type": {"epsilon": "epsilon", "v": "v_prediction"}[self.prediction],
            "clip_sample": clip is not None,
            "clip_sample_range": clip or 1.0,
        }
        if method == "ddpm":
            options |= {"variance_type": self.variance, "timestep_spacing": "linspace"}
            scheduler = from_diffusers("DDPMScheduler")(**options)
        else:
            scheduler = from_diffusers("DDIMScheduler")(**options, timestep_spacing="leading", steps_offset=0)
        scheduler.alphas_cumprod = self.alphas_cumprod  # fp64: fp32 loses digits of the first, small betas
        return scheduler

    def _split(self, output: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Prediction, and with learned_range the interpolation between the log variances, about [-1, 1]."""
        base.check_channels(output, z, self.learned_sigma)
        prediction, *fraction = output.split(z.shape[1], 1)
        return prediction, fraction[0] if fraction else None

    def _variational_bound(self, error: Tensor, fraction: Tensor, timesteps: Tensor) -> Tensor:
        """[B] bits per value. error: target minus prediction."""
        low = self._at("low", timesteps, error)
        high = self._at("high", timesteps, error)
        logvar = low + (fraction + 1) / 2 * (high - low)
        squared_error = (self._at("slope", timesteps, error) * error).square() * (-logvar).exp()
        kl = 0.5 * (logvar - low + (low - logvar).exp() - 1 + squared_error)
        nll = 0.5 * (math.log(2 * math.pi) + logvar + squared_error)
        first = (timesteps == 0).view(-1, *[1] * (error.ndim - 1))
        return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)

    def _snr_weight(self, timesteps: Tensor) -> Tensor:
        snr = self._tables_on(timesteps.device)["snr"][timesteps]
        return snr.clamp(max=self.min_snr) / (snr if self.prediction == "epsilon" else snr + 1)

    def _signal_and_sigma(self, timesteps: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._at("signal", timesteps, z), self._at("sigma", timesteps, z)

    def _at(self, table: str, timesteps: Tensor, z: Tensor) -> Tensor:
        return base.per_sample(self._tables_on(timesteps.device)[table][timesteps], z)

    def _tables_on(self, device: torch.device) -> dict[str, Tensor]:
        """The tables by timestep, which are copied to a device once."""
        if device not in self._by_device:
            self._by_device[device] = {name: to_device(table, device) for name, table in self._tables.items()}
        return self._by_device[device]

    @cached_property
    def _by_device(self) -> dict[torch.device, dict[str, Tensor]]:
        return {}

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        """[steps] fp64 each.

        signal, sigma: of x_t. snr: their ratio, squared. low, high: bounds of the reverse steps' log-variance. slope:
        the mean of a reverse step is linear in the predicted latents, and these in the prediction; this is the distance
        of the means per error.
        """
        betas, alphas_cumprod = self.betas, self.alphas_cumprod
        previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        posterior_variance[0] = posterior_variance[1]  # else 0, which has no logarithm
        root = alphas_cumprod if self.prediction == "epsilon" else 1
        return {
            "signal": alphas_cumprod.sqrt(),
            "sigma": (1 - alphas_cumprod).sqrt(),
            "snr": alphas_cumprod / (1 - alphas_cumprod),
            "low": posterior_variance.log(),
            "high": betas.log(),
            "slope": betas * (previous / (1 - alphas_cumprod) / root).sqrt(),
        }
