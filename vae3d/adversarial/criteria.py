"""What discriminator and generator make of logits: losses by name, and what regularises the discriminator.

Logits are of patches and have any shape; high is real. Every function returns a mean over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


class Criterion(NamedTuple):
    """Losses of (logits of real pixels, logits of their reconstructions). paired: the generator's reads both."""

    generator: Loss
    discriminator: Loss
    paired: bool = False


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Of the discriminator, 1/2 E[relu(1 - D(x)) + relu(1 + D(y))]: arXiv 1705.02894; the half as in
    taming-transformers `taming/modules/losses/vqperceptual.py`."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    """Of the discriminator, 1/2 E[softplus(-D(x)) + softplus(D(y))], `vanilla_d_loss` of taming-transformers."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def hinge_g(real: Tensor, fake: Tensor) -> Tensor:
    """Of the generator, -E D(y)."""
    return -fake.mean()


def non_saturating(real: Tensor, fake: Tensor) -> Tensor:
    """Of the generator, E softplus(-D(y)): arXiv 1406.2661, section 3."""
    return F.softplus(-fake).mean()


def relativistic_d(better: Tensor, worse: Tensor) -> Tensor:
    """E softplus(-(D(better) - D(worse))), patch by patch: the discriminator's relativistic loss of (real, fake), and
    with the two exchanged the generator's. arXiv 1807.00734; `R3GAN/Trainer.py` of brownvc/R3GAN, arXiv 2501.05441,
    where the two are drawn apart; here each is the reconstruction of the other."""
    return F.softplus(worse - better).mean()


def relativistic_g(real: Tensor, fake: Tensor) -> Tensor:
    return relativistic_d(fake, real)


CRITERIA = {
    "hinge": Criterion(hinge_g, hinge),
    "vanilla": Criterion(hinge_g, cross_entropy),
    "non_saturating": Criterion(non_saturating, cross_entropy),
    "relativistic": Criterion(relativistic_g, relativistic_d, paired=True),
    # microsoft/VidTok `vidtok/modules/losses.py`, where softplus is of the mean logit of each image.
    "hinge_non_saturating": Criterion(non_saturating, hinge),
}


def over_scales(loss: Loss, real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Mean of a loss over the logits of several sizes, so that its weight does not depend on how many there are."""
    return torch.stack([loss(x, y) for x, y in zip(real, fake, strict=True)]).mean()


def lecam(real: Tensor, fake: Tensor, real_average: Tensor, fake_average: Tensor) -> Tensor:
    """E relu(D(x) - average D(y))^2 + E relu(average D(x) - D(y))^2, with running averages of logits: LeCAM,
    arXiv 2104.03310, equation 4, in the one-sided form of google/lecam-gan and VidTok."""
    return F.relu(real - fake_average).square().mean() + F.relu(real_average - fake).square().mean()


def gradient_penalty(logits: Sequence[Tensor], images: Tensor) -> Tensor:
    """Squared norm of d D(x) / d x, mean over images [N, ...], to be differentiated on: R1 of real and R2 of fake
    images, arXiv 1801.04406, section 4.1.

    D(x) is the sum of an image's patch logits, and its penalty is divided by their number: the penalty that each patch
    would have if patches did not overlap, and for a single logit that of StyleGAN2. Of several sizes it is their mean.
    Where a norm mixes images, this is none of D's gradients: not for batch norms.
    """
    penalties = []
    for each in logits:
        (gradient,) = torch.autograd.grad(each.sum(), images, create_graph=True)
        penalties.append(gradient.square().flatten(1).sum(1).mean() / each[0].numel())
    return torch.stack(penalties).mean()
