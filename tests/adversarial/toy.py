"""Adversaries and clips small enough for a test."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vae3d.adversarial.gan import Gan
from vae3d.adversarial.seraena import Seraena
from vae3d.types import ClipBatch, Reconstruction

SETTINGS = {"context_channels": 4, "channels": [8, 8, 16, 16], "buffer_length": 10, "diagnostics_every": 2}
GAN = {"channels": 8, "layers": 1, "groups": 4, "adaptive": False, "lr": 1e-3}


def seraena(seed: int = 0, rank: int = 0, **settings: Any) -> Seraena:
    adversary = Seraena(**{**SETTINGS, **settings})
    adversary.load(nn.Identity(), torch.device("cpu"), seed, rank)
    return adversary


def gan(seed: int = 0, **settings: Any) -> Gan:
    adversary = Gan(**{**GAN, **settings})
    adversary.load(nn.Identity(), torch.device("cpu"), seed, 0)
    return adversary


def frames_of(video: torch.Tensor) -> torch.Tensor:
    """[B, 3, T, H, W] -> [B * T, 3, H, W]."""
    return video.transpose(1, 2).flatten(0, 1)


def blur(video: torch.Tensor) -> torch.Tensor:
    return F.avg_pool3d(video, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)


def pair(
    seed: int = 0, batch: int = 2, frames: int = 5, side: int = 16, channels: int = 4
) -> tuple[ClipBatch, Reconstruction]:
    """Noise, and the same blurred, with latents that contain its mean colour only."""
    video = torch.rand((batch, 3, frames, side, side), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    z = F.adaptive_avg_pool3d(video, (1 + frames // 4, side // 8, side // 8)).mean(1, keepdim=True)
    z = z.repeat(1, channels, 1, 1, 1).requires_grad_()
    out = Reconstruction(blur(video).requires_grad_(), None, z)
    return ClipBatch(video, torch.arange(batch), [""] * batch), out


def train(adversary: Seraena, steps: range, accumulate: int = 1) -> list[float]:
    """Train the discriminator alone, on clips of its rank; returns its losses."""
    losses = []
    for step in steps:
        for i in range(accumulate):
            clip, out = pair(seed=1000 * adversary.rank + accumulate * step + i)
            loss, _ = adversary.discriminator_loss(clip, out, step)
            (loss / accumulate).backward()
            losses.append(loss.item())
        adversary.step(float(adversary.average_gradients()))
    return losses


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
