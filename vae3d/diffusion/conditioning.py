"""Class conditioning: the null class, label dropout and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def class_ids(labels: Tensor | None, batch: int, num_classes: int, device: torch.device) -> Tensor | None:
    """Class embedding indices [B] in [0, num_classes]; labels=None selects the null class, num_classes, for all.

    None for a network without classes (num_classes 0).
    Raises ValueError for labels without classes, and for any other number of labels than samples.
    """
    if labels is None:
        return torch.full((batch,), num_classes, device=device) if num_classes else None
    if not num_classes:
        raise ValueError("labels are given to a network without classes; build it with num_classes, or pass no labels")
    if labels.shape != (batch,):
        raise ValueError(f"labels have shape {tuple(labels.shape)}; pass one for each of the {batch} samples")
    return labels.to(device)


def drop_labels(labels: Tensor, rate: float, num_classes: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Replace each of the labels [B] by the null class with probability `rate` (arXiv 2207.12598, algorithm 1).

    generators: one per sample.
    """
    draws = torch.stack([torch.rand((), generator=g, device=g.device) for g in generators])
    return torch.where(draws.to(labels.device) < rate, num_classes, labels)


def guided(
    network: nn.Module,
    labels: Tensor | None,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Wrap a network in classifier-free guidance: (z, timesteps [B], t in [0, 1]) -> output in fp32.

    output = u + scale (c - u), with the conditional output c and the unconditional u (arXiv 2207.12598, equation 6,
    with w = scale - 1). Scale 1 is the conditional network, bit for bit. Learned variances are those of c: they are
    interpolation weights, which cannot be extrapolated.
    interval: t between which guidance applies, both included; elsewhere the scale is 1 (arXiv 2404.07724).
    Raises ValueError for guidance without classes or labels, and for labels out of range.
    """
    classes = network.num_classes
    if scale != 1.0 and (labels is None or not classes):
        raise ValueError(f"guidance scale is {scale:g}, which needs a network with classes, and labels; use 1")
    if labels is not None and classes and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
        raise ValueError(f"labels are {int(labels.min())}..{int(labels.max())}; the network has 0..{classes - 1}")

    def evaluate(z: Tensor, timesteps: Tensor, t: float) -> Tensor:
        if scale == 1.0 or not interval[0] <= t <= interval[1]:
            return network(z, timesteps, labels).float()
        both = torch.cat([labels, torch.full_like(labels, classes)])
        output = network(torch.cat([z, z]), torch.cat([timesteps, timesteps]), both).float()
        conditional, unconditional = output.chunk(2)
        channels = z.shape[1]
        prediction, base = conditional[:, :channels], unconditional[:, :channels]
        return torch.cat([base + scale * (prediction - base), conditional[:, channels:]], 1)

    return evaluate
