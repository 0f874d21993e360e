"""Running an image network on the frames of a video, and padding videos to a network's strides."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def frames_of(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B * T, C, H, W], without a copy in channels-last memory."""
    return x.transpose(1, 2).flatten(0, 1)


def clips_of(frames: Tensor, batch: int) -> Tensor:
    """Inverse of frames_of."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


def per_frame(fn: Callable[[Tensor], Tensor], video: Tensor, frame_batch: int | None) -> Tensor:
    """Apply `fn` ([N, C, H, W] -> [N, C', H', W']) to every frame of [B, C, T, H, W].

    frame_batch: frames at a time; None: all. Exact for networks that normalise per image.
    """
    frames = frames_of(video)
    outputs = fn(frames) if frame_batch is None else torch.cat([fn(batch) for batch in frames.split(frame_batch)])
    return clips_of(outputs, len(video))


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
