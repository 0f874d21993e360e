"""Gaussian diffusion: Ho et al., arXiv 2006.11239; Nichol and Dhariwal, arXiv 2102.09672; as openai/guided-diffusion
(MIT) does it, `gaussian_diffusion.py` and `respace.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from torch import Tensor

from vae3d.arguments import Range, check_fields
from vae3d.diffusion.base import (
    Generators,
    Sampler,
    Sampling,
    check_channels,
    mean_square,
    not_for,
    one_of,
    per_sample,
)
from vae3d.diffusion.library import from_diffusers


@dataclass(frozen=True)
class GaussianDiffusion:
    """A chain of `steps` noising steps, and its inverse.

    schedule: linear (betas 1e-4..0.02 at 1000 steps) or cosine. prediction: of the noise (epsilon), or of
    v = sqrt(abar) noise - sqrt(1 - abar) z (Salimans and Ho, arXiv 2202.00512). Latents predicted by the noise carry
    its error times 1 / sqrt(abar), at the last time 157 (linear) or 20000 (cosine): samples of a network that is not
    trained well explode, unless Sampling.clip bounds them. v has no such factor.
    variance: of the inverse steps: fixed_small, that of the posterior; fixed_large, beta; or learned_range, which the
    network's second half of channels interpolates between them, in logarithms.
    rescale_learned_sigmas: weigh the variational bound by steps / 1000, as guided-diffusion's flag does.
    min_snr: cap of the signal-to-noise ratio that weighs the squared error (Hang et al., arXiv 2303.09556), often 5.
    Raises ValueError for another schedule, prediction or variance, and for too few steps.
    """

    steps: Annotated[int, Range(2, 100_000)] = 1000
    schedule: str = "linear"
    prediction: str = "epsilon"
    variance: str = "fixed_small"
    rescale_learned_sigmas: bool = True
    min_snr: Annotated[float, Range(1e-6, 1e6)] | None = None

    def __post_init__(self) -> None:
        check_fields(vars(self), type(self))
        one_of("schedule", self.schedule, ("linear", "cosine"))
        one_of("prediction", self.prediction, ("epsilon", "v"))
        one_of("variance", self.variance, ("fixed_small", "fixed_large", "learned_range"))
        least = 21 if self.schedule == "linear" else 2
        if self.steps < least:  # else a beta of the linear schedule would be 1 or more
            raise ValueError(f"steps is {self.steps}; a {self.schedule} chain has at least {least}")

    @property
    def learned_sigma(self) -> bool:
        return self.variance == "learned_range"

    @cached_property
    def betas(self) -> Tensor:
        """[steps] fp64."""
        if self.schedule == "linear":
            scale = 1000 / self.steps
            return torch.linspace(scale * 1e-4, scale * 0.02, self.steps, dtype=torch.float64)
        share = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        remaining = torch.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - remaining[1:] / remaining[:-1]).clamp(max=0.999)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """[steps] fp64: the share of the data's variance that is left, abar."""
        return (1 - self.betas).cumprod(0)

    def draw_times(self, generators: Generators) -> Tensor:
        """[B] int64 in [0, steps), uniform."""
        return torch.stack([torch.randint(self.steps, (), generator=g, device=g.device) for g in generators])

    def levels(self, times: Tensor) -> Tensor:
        """[B] in [0, 1)."""
        return times / self.steps

    def network_times(self, times: Tensor) -> Tensor:
        return times

    def noisy(self, z: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t = sqrt(abar) z + sqrt(1 - abar) noise."""
        signal, spread = self._roots(times, z)
        return signal * z + spread * noise

    def losses(self, output: Tensor, z: Tensor, noise: Tensor, times: Tensor) -> dict[str, Tensor]:
        """[B] each: mse, of the prediction; loss, what is trained; with learned_range also vlb, the term of the
        variational bound at this time, in bits per latent value.

        loss = mse (weighted, with min_snr) + vlb, which does not train the mean (arXiv 2102.09672, section 3.1).
        vlb: KL of the posterior and the inverse step; at time 0 the negative log-likelihood under a Gaussian, since
        latents are continuous. (guided-diffusion takes that of 8-bit pixels.)
        Raises ValueError if the output has not the channels that `variance` asks for.
        """
        prediction, fraction = self._split(output, z)
        signal, spread = self._roots(times, z)
        target = noise if self.prediction == "epsilon" else signal * noise - spread * z
        mse = mean_square(prediction, target)
        loss = mse if self.min_snr is None else self._snr_weight(times).to(mse) * mse
        if fraction is None:
            return {"loss": loss, "mse": mse}
        vlb = self._bound((target - prediction).detach(), fraction, times)
        scale = self.steps / 1000 if self.rescale_learned_sigmas else 1.0
        return {"loss": loss + scale * vlb, "mse": mse, "vlb": vlb}

    def sampler(self, sampling: Sampling) -> Sampler:
        """From noise to latents by diffusers' schedulers.

        method: ddpm, ancestral sampling over times spread evenly from 0 to T - 1 (guided-diffusion's respacing N, which
        may round halves otherwise); or ddim, at multiples of a whole stride (its respacing ddimN; Song et al., arXiv
        2010.02502).
        Raises ValueError for another method, for steps that the chain cannot be divided into, and for shift.
        """
        method = one_of("method", sampling.method or "ddpm", ("ddpm", "ddim"))
        not_for("Gaussian diffusion", shift=sampling.shift != 1)
        not_for("ddpm", eta=method == "ddpm" and sampling.eta != 0)
        self._check_steps(sampling.steps, method)
        scheduler = self._scheduler(method, sampling.clip)
        scheduler.set_timesteps(sampling.steps)
        times = scheduler.timesteps.tolist()

        def step(output: Tensor, index: int, z: Tensor, generators: Generators) -> Tensor:
            prediction, _ = self._split(output, z)
            given: dict[str, Any] = {"generator": list(generators)}
            if method == "ddim":  # which does not know of learned variances
                given |= {"eta": sampling.eta, "use_clipped_model_output": sampling.clip is not None}
            return scheduler.step(output if method == "ddpm" else prediction, times[index], z, **given).prev_sample

        return Sampler(times, [t / self.steps for t in times], step)

    def _check_steps(self, steps: int, method: str) -> None:
        """One step would be that from the least noise, and ddim needs a whole stride."""
        fits = [n for n in range(2, self.steps + 1) if method == "ddpm" or self.steps % n == 0]
        if steps not in fits:
            near = ", ".join(map(str, sorted(sorted(fits, key=lambda n: abs(n - steps))[:3])))
            raise ValueError(f"steps is {steps}, into which {method} cannot divide {self.steps}; use e.g. {near}")

    def _scheduler(self, method: str, clip: float | None) -> Any:
        given: dict[str, Any] = {
            "num_train_timesteps": self.steps,
            "trained_betas": self.betas.tolist(),
            "prediction_type": {"epsilon": "epsilon", "v": "v_prediction"}[self.prediction],
            "clip_sample": clip is not None,
            "clip_sample_range": clip or 1.0,
        }
        if method == "ddpm":
            given |= {"variance_type": self.variance, "timestep_spacing": "linspace"}
            scheduler = from_diffusers("DDPMScheduler")(**given)
        else:
            scheduler = from_diffusers("DDIMScheduler")(**given, timestep_spacing="leading", steps_offset=0)
        scheduler.alphas_cumprod = self.alphas_cumprod  # fp64: in fp32 the small betas of the first steps lose digits
        return scheduler

    def _split(self, output: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction, and the variance's place in its range, about [-1, 1]."""
        check_channels(output, z, self.learned_sigma)
        prediction, *fraction = output.split(z.shape[1], 1)
        return prediction, fraction[0] if fraction else None

    def _bound(self, error: Tensor, fraction: Tensor, times: Tensor) -> Tensor:
        """error: what is missing to the true noise, or v."""
        betas, kept = self.betas, self.alphas_cumprod
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        posterior = betas * (1 - before) / (1 - kept)
        posterior[0] = posterior[1]  # zero otherwise, without a logarithm
        low, high = self._at(posterior.log(), times, error), self._at(betas.log(), times, error)
        # The mean of the inverse step is linear in the latents predicted, and those in the prediction: so far apart are
        # the means per error.
        slope = betas * (before / (1 - kept) / (kept if self.prediction == "epsilon" else 1)).sqrt()
        logvar = low + (fraction + 1) / 2 * (high - low)
        miss = (self._at(slope, times, error) * error).square() * (-logvar).exp()
        kl = 0.5 * (logvar - low + (low - logvar).exp() - 1 + miss)
        nll = 0.5 * (math.log(2 * math.pi) + logvar + miss)
        first = (times == 0).view(-1, *[1] * (error.ndim - 1))
        return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)

    def _snr_weight(self, times: Tensor) -> Tensor:
        snr = (self.alphas_cumprod / (1 - self.alphas_cumprod)).to(times.device)[times]
        return snr.clamp(max=self.min_snr) / (snr if self.prediction == "epsilon" else snr + 1)

    def _roots(self, times: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._at(self.alphas_cumprod.sqrt(), times, z), self._at((1 - self.alphas_cumprod).sqrt(), times, z)

    @staticmethod
    def _at(table: Tensor, times: Tensor, z: Tensor) -> Tensor:
        return per_sample(table.to(times.device)[times], z)
