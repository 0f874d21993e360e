"""Classes as the condition of a network: the null class, label dropout and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def class_ids(labels: Tensor | None, batch: int, num_classes: int, device: torch.device) -> Tensor | None:
    """What a network embeds: [B] labels in [0, num_classes], where num_classes is the null class, which stands for no
    label and which labels=None gives all samples; None of a network without classes (num_classes 0).

    Raises ValueError if a network without classes is given labels, or if there is not one label for each sample.
    """
    if labels is None:
        return torch.full((batch,), num_classes, device=device) if num_classes else None
    if not num_classes:
        raise ValueError("labels are given to a network without classes; build it with num_classes, or give none")
    if labels.shape != (batch,):
        raise ValueError(f"labels have shape {tuple(labels.shape)}; give one for each of the {batch} samples")
    return labels.to(device)


def drop_labels(labels: Tensor, rate: float, num_classes: int, generators: Sequence[torch.Generator]) -> Tensor:
    """[B] labels, each of which is replaced by the null class with probability `rate`, so that one network learns the
    conditional and the unconditional distribution (Ho and Salimans, arXiv 2207.12598, algorithm 1).

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
    """(z, time, noise level) -> output in fp32, with classifier-free guidance.

    The output for no label is moved by `scale` towards and beyond that for the label:
    u + scale (c - u), all channels alike (arXiv 2207.12598, equation 6, with w = scale - 1). Scale 1 is the conditional
    network itself, bit for bit, and 0 the unconditional one. Variances that a network gives beside its prediction are
    those of the conditional one: they are interpolation weights, which cannot be extrapolated.
    interval: noise levels in [0, 1], t / T, between which there is guidance, both included; elsewhere scale 1
    (Kynkäänniemi et al., arXiv 2404.07724).
    Raises ValueError for guidance without classes, without labels, or with labels that the network does not have.
    """
    classes = network.num_classes
    if scale != 1.0 and (labels is None or not classes):
        raise ValueError(f"guidance scale is {scale:g}, which needs a network with classes, and labels; use 1")
    if labels is not None and classes and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
        raise ValueError(f"labels are {int(labels.min())}..{int(labels.max())}; the network has 0..{classes - 1}")

    def evaluate(z: Tensor, time: Tensor, level: float) -> Tensor:
        if scale == 1.0 or not interval[0] <= level <= interval[1]:
            return network(z, time, labels).float()
        both = torch.cat([labels, torch.full_like(labels, classes)])
        with_label, without = network(torch.cat([z, z]), torch.cat([time, time]), both).float().chunk(2)
        channels = z.shape[1]
        mean = without[:, :channels] + scale * (with_label[:, :channels] - without[:, :channels])
        return torch.cat([mean, with_label[:, channels:]], 1)

    return evaluate
