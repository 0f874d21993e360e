"""Tiny networks, and networks that know the answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vae3d.diffusion.gaussian import GaussianDiffusion
from vae3d.diffusion.processes import Process

TINY: dict[str, dict[str, Any]] = {
    "unet": {"_target_": "vae3d.diffusion.unet.LatentUNet", "width": 16, "head_channels": 16, "blocks": 1},
    "transformer": {"_target_": "vae3d.diffusion.transformer.VideoTransformer", "width": 24, "heads": 2, "depth": 2},
    "factorised": {
        "_target_": "vae3d.diffusion.transformer.VideoTransformer",
        "width": 24,
        "heads": 2,
        "depth": 2,
        "attention": "factorised",
    },
    "wan": {"_target_": "vae3d.diffusion.wan.WanTransformer", "width": 24, "heads": 2, "depth": 2},
}
IMAGE, CLIP = (4, 1, 8, 8), (4, 3, 6, 8)


def shape_of(name: str) -> tuple[int, int, int, int]:
    return IMAGE if name == "unet" else CLIP


def shaken(network: nn.Module, size: float = 0.1) -> nn.Module:
    """The network as if it had been trained: no weight is zero any more."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return network


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


class Oracle(nn.Module):
    """The best prediction for data that are N(mean, std^2) in every value; a class moves the mean by its number.

    calls: (number of samples, times, labels) of every evaluation.
    """

    num_classes = 10

    def __init__(self, process: Process, mean: float | Tensor = 0.0, std: float = 0.0) -> None:
        super().__init__()
        self.process, self.mean, self.std = process, mean, std
        self.calls: list[tuple[int, list[float], Any]] = []

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        self.calls.append((len(x), time.tolist(), None if labels is None else labels.tolist()))
        mean = self.mean if labels is None else self.mean + labels.view(-1, 1, 1, 1, 1)
        if isinstance(self.process, GaussianDiffusion):
            kept = self.process.alphas_cumprod[time].view(-1, 1, 1, 1, 1).double()
            signal, spread = kept.sqrt(), (1 - kept).sqrt()
        else:
            spread = (time / 1000).view(-1, 1, 1, 1, 1).double()
            signal = 1 - spread
        left = (x - signal * mean) / (signal**2 * self.std**2 + spread**2)
        noise, z = spread * left, mean + signal * self.std**2 * left
        if not isinstance(self.process, GaussianDiffusion):
            return (noise - z).float()
        out = noise if self.process.prediction == "epsilon" else signal * noise - spread * z
        return torch.cat([out, -torch.ones_like(out)], 1).float() if self.process.learned_sigma else out.float()
