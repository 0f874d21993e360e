"""LPIPS as a training loss, frame by frame."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d import panorama
from vae3d.arguments import Count, Range
from vae3d.losses.objective import NetworkTerm, PixelTerm
from vae3d.models.layers.checkpointing import maybe_checkpoint
from vae3d.models.layers.frames import clips_of, frames_of
from vae3d.pixels import as_rgb
from vae3d.pretrained.lpips import LPIPSNet
from vae3d.types import ClipBatch


@dataclass(kw_only=True, eq=False)
class LPIPS(NetworkTerm, PixelTerm):
    """LPIPS of every frame, of the colours of other than three channels (pixels.as_rgb). The trunk is frozen, in fp32.

    net: vgg (as in Open-Sora and latent-diffusion) or alex. path: the trunk's file, by default found by its name.
    frame_batch: frames at a time. gradient_checkpointing: recompute the trunk's activations in backward. wrap: columns
    of a panorama to pad with from beyond the seam, instead of zeros; their errors do not count. 32 to 64 suffice;
    multiples of 16 align with VGG's deepest features.
    The clip's weight applies inside each layer, at its size; see LPIPSNet.
    """

    net: Literal["vgg", "alex"] = "vgg"
    path: str | Path | None = None
    frame_batch: Count = 4
    gradient_checkpointing: bool = True
    wrap: Annotated[int, Range(0, 4096)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.network = LPIPSNet(self.net)

    def errors(self, rec: Tensor, batch: ClipBatch) -> Tensor:
        ori, rec = frames_of(as_rgb(batch.video)), frames_of(as_rgb(rec))
        weight = batch.weight
        if self.wrap:
            ori, rec = panorama.wrap(ori, self.wrap), panorama.wrap(rec, self.wrap)
            # 0 in the padding, and still of mean 1
            width = batch.video.shape[-1]
            weight = batch.video.new_ones(1, 1, 1, 1, 1) if weight is None else weight
            weight = weight.expand(-1, -1, -1, batch.video.shape[-2], width)
            weight = F.pad(weight, (self.wrap, self.wrap)) * (1 + 2 * self.wrap / width)
        if weight is not None:
            clips, frames = batch.video.shape[0], batch.video.shape[2]
            weight = frames_of(weight.expand(clips, 1, frames, -1, -1))
        return self.distances(ori, rec, weight, len(batch.video))

    def distances(self, ori: Tensor, rec: Tensor, weight: Tensor | None, clips: int) -> Tensor:
        """[clips, 1, N / clips, 1, 1] for images [N, 3, H, W], with weights [N, 1, H, W] where H or W may be 1."""
        tensors = [ori, rec] if weight is None else [ori, rec, weight]
        batches = zip(*(tensor.split(self.frame_batch) for tensor in tensors), strict=True)
        recompute = self.gradient_checkpointing and rec.requires_grad
        return clips_of(torch.cat([maybe_checkpoint(self.network, *b, enabled=recompute) for b in batches]), clips)
