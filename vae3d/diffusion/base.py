"""Sampling settings, the sampler interface, and helpers that both processes use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vae3d.arguments import Range, check_fields

Noise = Annotated[float, Range(0, 1)]
Generators = Sequence[torch.Generator]  # one per sample, so that a sample does not depend on its batch


@dataclass(frozen=True)
class Sampling:
    """Sampling settings.

    steps: network evaluations, each of twice the batch with guidance.
    method: ddpm or ddim for Gaussian diffusion, euler for rectified flow; None: the first of them.
    guidance, interval: see sampling.guided.
    clip: bound of the predicted latents at each step, in standard deviations, such as a high percentile of the training
    latents.
    eta: noise of ddim, 0 (none) to 1 (as much as ddpm).
    shift: of rectified flow, t -> shift t / (1 + (shift - 1) t); above 1 spends more steps at high noise, as larger
    latents need (arXiv 2403.03206, section 5.3.2).
    Raises ValueError for values out of range.
    """

    steps: Annotated[int, Range(1, 1e6)] = 50
    method: str | None = None
    guidance: float = 1.0
    interval: tuple[Noise, Noise] = (0.0, 1.0)
    clip: Annotated[float, Range(1e-6, 1e6)] | None = None
    eta: Noise = 0.0
    shift: Annotated[float, Range(1e-6, 1e6)] = 1.0

    def __post_init__(self) -> None:
        check_fields(vars(self), type(self))
        if self.interval[0] > self.interval[1]:
            raise ValueError(f"interval is {tuple(self.interval)}; use two noise levels in [0, 1], ascending")


@dataclass
class Sampler:
    """The steps from noise to latents; use it for one trajectory only.

    timesteps: inputs of the network, from noise to data. t_normalised: the same in [0, 1].
    step: (output, index into timesteps, z [B, C, t, h, w], generators) -> next z.
    """

    timesteps: list[float]
    t_normalised: list[float]
    step: Callable[[Tensor, int, Tensor, Generators], Tensor]


def choose_method(method: str | None, choices: Sequence[str]) -> str:
    """The method of sampling; the first of `choices` for None. Raises ValueError if it is not among them."""
    if method not in (None, *choices):
        raise ValueError(f"method is {method!r}; use {' or '.join(choices)}")
    return method or choices[0]


def check_unused(process: str, **changed: bool) -> None:
    """Raises ValueError for settings that the process does not have. changed: setting -> differs from its default."""
    if names := [name for name, differs in changed.items() if differs]:
        raise ValueError(f"{process} has no {' and '.join(names)}; leave out {' and '.join(names)}")


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], with the device, dtype and number of dimensions of `like`."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each sample, [B]."""
    return (a - b).square().flatten(1).mean(1)


def check_channels(output: Tensor, z: Tensor, learned_sigma: bool) -> None:
    """Raises ValueError if the network predicts variances and the process has fixed ones, or the other way round."""
    expected = z.shape[1] * (2 if learned_sigma else 1)
    if output.shape[1] != expected:
        raise ValueError(
            f"the network outputs {output.shape[1]} channels, the process needs {expected}; "
            f"build the network with learned_sigma={str(learned_sigma).lower()}"
        )
