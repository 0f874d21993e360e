from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vae3d.metrics import registry
from vae3d.metrics.networks import Networks


class Drift(nn.Module):
    """Takes the whole frame to move right as it brightens: smooth motion, the same forwards and backwards."""

    def __init__(self, pixels: float = 40.0) -> None:
        super().__init__()
        self.pixels = pixels
        self.seen: list[Tensor] = []

    def forward(self, frames: Tensor) -> Tensor:
        self.seen.append(frames)
        return self.flow(frames[:-1], frames[1:])

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        motion = (second - first).mean((1, 2, 3)) * self.pixels
        return torch.stack([motion, 0 * motion], 1)[:, :, None, None].expand(-1, -1, *first.shape[-2:])


class Colours(nn.Module):
    """Stands for Inception and I3D: features of a frame, or of all frames of a video, are means of its quarters."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, frames: Tensor) -> Tensor:
        self.seen.append(frames)
        return nn.functional.adaptive_avg_pool2d(frames, 2).flatten(1)

    def features(self, video: Tensor) -> Tensor:
        self.seen.append(video)
        return nn.functional.adaptive_avg_pool2d(video.mean(2), 2).flatten(1)


class QuickNetworks(Networks):
    """LPIPS and PWC-Net with random weights, loaded once; small stand-ins for what takes seconds per frame."""

    def __init__(self, real: Networks) -> None:
        super().__init__()
        self.real = real

    def lpips(self, net: str) -> nn.Module:
        return self.real.lpips(net)

    def flow(self, name: str) -> nn.Module:
        return self.real.flow(name) if name == "pwc" else self._load_once(name, Drift)

    def inception(self) -> nn.Module:
        return self._load_once("inception", Colours)

    def i3d(self) -> nn.Module:
        return self._load_once("i3d", Colours)


@pytest.fixture(scope="session")
def real_networks(all_weights: Path) -> Networks:
    return Networks()


@pytest.fixture
def networks(real_networks: Networks) -> Networks:
    """Of which RAFT, Inception and I3D are stand-ins."""
    return QuickNetworks(real_networks)


@pytest.fixture
def quick(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> Networks:
    """The same, given to the metrics that `build_metrics` makes."""
    monkeypatch.setattr(registry, "Networks", lambda *_: networks)
    return networks
