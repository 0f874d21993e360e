"""What the processes share: the choices of a sampler, and the steps that it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Generators = Sequence[torch.Generator]  # one per sample, so that no sample depends on the batch that it is in


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    steps: of the sampler, which is one forward pass each, or two with guidance. method: ddpm or ddim of Gaussian
    diffusion, euler of rectified flow; None for the first of them.
    guidance, interval: see conditioning.guided. clip: bound of the latents that are predicted at each step, in standard
    deviations; a percentile of the latents that were trained on is a good one.
    eta: noise of ddim. shift: of rectified flow, t -> shift t / (1 + (shift - 1) t): above 1 for more steps where there
    is much noise, as larger latents need (arXiv 2403.03206, section 5.3.2).
    Raises ValueError for values out of range.
    """

    steps: int = 50
    method: str | None = None
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    clip: float | None = None
    eta: float = 0.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; give at least 1")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip is {self.clip}; give standard deviations above 0, or none")
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"interval is {tuple(self.interval)}; give two noise levels in [0, 1], ascending")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; give 0 (no noise) to 1 (as much as ddpm)")
        if self.shift <= 0:
            raise ValueError(f"shift is {self.shift}; give a factor above 0")


@dataclass
class Sampler:
    """A way from noise to latents, to be gone once.

    times: what the network is given at each step, from noise to data; levels: the same in [0, 1], as t / T.
    step: (output, index into times, z [B, C, t, h, w], generators) -> the next z.
    """

    times: list[float]
    levels: list[float]
    step: Callable[[Tensor, int, Tensor, Generators], Tensor]


def one_of(name: str, value: str, known: Sequence[str]) -> str:
    """value. Raises ValueError if it is not among the known."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; use {' or '.join(known)}")
    return value


def not_for(process: str, **settings: bool) -> None:
    """Raises ValueError for settings (name -> whether it was changed) that mean nothing to a process."""
    if changed := [name for name, given in settings.items() if given]:
        raise ValueError(f"{' and '.join(changed)} mean nothing to {process}; leave them out")


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], on like's device, in its type."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """[B]: over all but the batch."""
    return (a - b).square().flatten(1).mean(1)


def check_channels(output: Tensor, z: Tensor, learned_sigma: bool) -> None:
    """Raises ValueError if a network gives variances that nobody asked for, or none where they are needed."""
    needed = z.shape[1] * (2 if learned_sigma else 1)
    if output.shape[1] != needed:
        raise ValueError(
            f"the network gives {output.shape[1]} channels for latents of {z.shape[1]}, the process needs {needed}; "
            f"build the network with learned_sigma={str(learned_sigma).lower()}"
        )
