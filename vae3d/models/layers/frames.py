"""Running an image network on the frames of a video, and padding videos to a network's strides."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def per_frame(fn: Callable[[Tensor], Tensor], video: Tensor, frame_batch: int | None) -> Tensor:
    """Apply `fn` ([N, C, H, W] -> [N, C', H', W']) to every frame of [B, C, T, H, W].

    frame_batch: frames at a time; None: all. Exact for networks that normalise per image.
    """
    frames = rearrange(video, "b c t h w -> (b t) c h w")
    outputs = [fn(batch) for batch in frames.split(frame_batch or len(frames))]
    return rearrange(torch.cat(outputs), "(b t) c h w -> b c t h w", b=video.shape[0])


def pad_space(video: Tensor, stride: int) -> Tensor:
    """Repeat the last row and column of [B, C, T, H, W] until both sides are multiples of `stride`."""
    height, width = video.shape[-2:]
    bottom, right = -height % stride, -width % stride
    if not bottom and not right:
        return video
    return F.pad(video, (0, right, 0, bottom, 0, 0), mode="replicate")


def extend_time(video: Tensor, frames: int) -> Tensor:
    """Repeat the last frame of [B, C, T, H, W] up to `frames` frames. Longer videos are returned unchanged."""
    missing = frames - video.shape[2]
    return torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2) if missing > 0 else video
