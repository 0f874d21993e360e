"""LPIPS as a training loss, frame by frame."""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vae3d import weights
from vae3d.features.lpips import LPIPSNet
from vae3d.losses.objective import Error, numel_per_frame, require_pixels
from vae3d.types import Clip, Reconstruction


class LPIPS:
    """LPIPS of every frame. The trunk is frozen and runs in fp32.

    net: vgg (as in Open-Sora and latent-diffusion) or alex. path: the trunk's file, by default found by its name.
    frame_batch: frames that pass at once. gradient_checkpointing: keep only the frames and recompute the trunk's
    activations in backward.
    """

    needs_pixels = True

    def __init__(
        self,
        *,
        net: str = "vgg",
        path: str | Path | None = None,
        frame_batch: int = 4,
        gradient_checkpointing: bool = True,
    ) -> None:
        self.network = LPIPSNet(net)
        self.path = path
        self.frame_batch = frame_batch
        self.gradient_checkpointing = gradient_checkpointing

    def find_weights(self) -> Path:
        """Where the trunk's file is. Raises WeightsMissing if it is nowhere."""
        return weights.find(self.network.file, path=self.path)

    def load(self, device: torch.device | str) -> None:
        self.network.load(self.path).to(device)

    def __call__(self, clip: Clip, out: Reconstruction) -> Error:
        rec = rearrange(require_pixels(out), "b c t h w -> (b t) c h w")
        ori = rearrange(clip.video, "b c t h w -> (b t) c h w")
        pairs = zip(ori.split(self.frame_batch), rec.split(self.frame_batch), strict=True)
        distances = torch.cat([self._distance(x, y) for x, y in pairs])  # [B*T, 1, 1, 1]
        distances = rearrange(distances, "(b t) c h w -> b c t h w", b=len(clip.video))
        return Error(distances, numel_per_frame(clip.video))

    def _distance(self, ori: Tensor, rec: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled() and rec.requires_grad:
            return checkpoint(self.network, ori, rec, use_reentrant=False, preserve_rng_state=False)
        return self.network(ori, rec)
