"""GAN losses by name, and regularisers of the discriminator.

Logits are per patch and of any shape; a high logit means real. Every function returns the mean over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


class Criterion(NamedTuple):
    """Losses of (real logits, fake logits). paired: the generator's loss uses both."""

    generator: Loss
    discriminator: Loss
    paired: bool = False


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator: 1/2 E[relu(1 - D(x)) + relu(1 + D(y))], arXiv 1705.02894. The half is from taming-transformers
    `taming/modules/losses/vqperceptual.py`."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator: 1/2 E[softplus(-D(x)) + softplus(D(y))], `vanilla_d_loss` of taming-transformers."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def hinge_g(real: Tensor, fake: Tensor) -> Tensor:
    """Generator: -E D(y)."""
    return -fake.mean()


def non_saturating(real: Tensor, fake: Tensor) -> Tensor:
    """Generator: E softplus(-D(y)), arXiv 1406.2661, section 3."""
    return F.softplus(-fake).mean()


def relativistic_d(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator: E softplus(-(D(x) - D(y))), per patch; arXiv 1807.00734, `R3GAN/Trainer.py` of brownvc/R3GAN
    (arXiv 2501.05441). There x and y are independent samples; here y is the reconstruction of x."""
    return F.softplus(fake - real).mean()


def relativistic_g(real: Tensor, fake: Tensor) -> Tensor:
    """Generator: E softplus(-(D(y) - D(x)))."""
    return relativistic_d(fake, real)


CRITERIA = {
    "hinge": Criterion(hinge_g, hinge),
    "vanilla": Criterion(hinge_g, cross_entropy),
    "non_saturating": Criterion(non_saturating, cross_entropy),
    "relativistic": Criterion(relativistic_g, relativistic_d, paired=True),
    # microsoft/VidTok `vidtok/modules/losses.py`, which takes softplus of each image's mean logit.
    "hinge_non_saturating": Criterion(non_saturating, hinge),
}


def over_scales(loss: Loss, real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Mean of a loss over the scales of a discriminator."""
    return torch.stack([loss(x, y) for x, y in zip(real, fake, strict=True)]).mean()


def lecam(real: Tensor, fake: Tensor, real_average: Tensor, fake_average: Tensor) -> Tensor:
    """E relu(D(x) - avg D(y))^2 + E relu(avg D(x) - D(y))^2 with running averages of logits: LeCAM, arXiv 2104.03310,
    equation 4, in the one-sided form of google/lecam-gan and VidTok."""
    return F.relu(real - fake_average).square().mean() + F.relu(real_average - fake).square().mean()


def gradient_penalty(logits: Sequence[Tensor], images: Tensor) -> Tensor:
    """Differentiable squared norm of dD(x)/dx, mean over images [N, ...]: R1 on real and R2 on fake images,
    arXiv 1801.04406, section 4.1.

    logits: of each scale; the result is their mean. D(x) is the sum of an image's patch logits, and its penalty is
    divided by their number: the penalty per patch if patches did not overlap; for a single logit that of StyleGAN2.
    Not for batch norm, which mixes images.
    """
    penalties = []
    for patches in logits:
        (gradient,) = torch.autograd.grad(patches.sum(), images, create_graph=True)
        penalties.append(gradient.square().flatten(1).sum(1).mean() / patches[0].numel())
    return torch.stack(penalties).mean()
