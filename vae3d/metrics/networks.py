"""Pretrained networks of the metrics, each loaded once, in fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vae3d.layout import place
from vae3d.metrics.base import Chunk
from vae3d.pretrained import i3d, inception, lpips, pwcnet, raft

# Files that each network can be loaded from: alternatives.
FLOWS = {"pwc": pwcnet.FILES} | {net: (file,) for net, file in raft.FILES.items()}
LPIPS = {net: (file,) for net, (_, file, _) in lpips.TRUNKS.items()}
INCEPTION = (inception.FILE,)
I3D = i3d.FILES
MAX_BATCH_PIXELS = 2**20  # of one pass through a network: 16 frames of 256x256, one of 720p


class Networks:
    """Networks on one device, loaded on first use. pwc_warp: see pretrained.pwcnet.PWCNet."""

    def __init__(self, device: torch.device | str = "cpu", pwc_warp: str = "flolpips") -> None:
        self.device, self.pwc_warp = torch.device(device), pwc_warp
        self._loaded: dict[str, nn.Module] = {}

    def lpips(self, net: str) -> nn.Module:
        return self._load_once(f"lpips_{net}", lambda: lpips.LPIPSNet(net).load())

    def flow(self, name: str) -> nn.Module:
        """name: a key of FLOWS."""
        if name == "pwc":
            return self._load_once(name, lambda: pwcnet.PWCNet(self.pwc_warp).load())
        return self._load_once(name, lambda: raft.Raft(name).load())

    def inception(self) -> nn.Module:
        return self._load_once("inception", lambda: inception.InceptionV3().load())

    def i3d(self) -> nn.Module:
        return self._load_once("i3d", i3d.load_i3d)

    def _load_once(self, key: str, load: Callable[[], nn.Module]) -> nn.Module:
        if key not in self._loaded:
            self._loaded[key] = place(load(), self.device)
        return self._loaded[key]


def batch_frames(frames: Tensor) -> int:
    """Batch size for frames [T, 3, H, W] of this resolution."""
    return max(1, MAX_BATCH_PIXELS // (frames.shape[-2] * frames.shape[-1]))


def lpips_features(chunk: Chunk, net: nn.Module, which: str) -> list[Tensor]:
    """Features of all frames, of each layer and normalised; see LPIPSNet. which: ref or rec."""
    frames = getattr(chunk, which)

    def compute() -> list[Tensor]:
        batches = [net.unit_features(part * 2 - 1) for part in frames.split(batch_frames(frames))]
        return [torch.cat(layer) for layer in zip(*batches, strict=True)]

    return chunk.cached(("lpips", net.net, which), compute)


def flow(chunk: Chunk, networks: Networks, name: str, which: str) -> Tensor:
    """Optical flow from each frame of the chunk to the next, [T-1, 2, H, W] in pixels."""
    net, frames = networks.flow(name), getattr(chunk, which)
    step = batch_frames(frames)

    def compute() -> Tensor:
        return torch.cat([net(frames[i : i + step + 1]) for i in range(0, len(frames) - 1, step)])

    return chunk.cached(("flow", name, which), compute)
