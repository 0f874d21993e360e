"""Clips as batches of images, each of several frames one above another in the channels, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def images_of(video: Tensor, frames: int) -> Tensor:
    """[B, 3, T, H, W] -> [B * ceil(T / frames), frames * 3, H, W], clip by clip and frame by frame.

    What misses behind the last frame is taken from the first on, round and round, as
    madebyollin/seraena `TAEHV_Training_Example.ipynb` fills 9 frames to 12 with the first 3.
    """
    count = video.shape[2]
    order = torch.arange(-(-count // frames) * frames, device=video.device) % count
    return video.transpose(1, 2)[:, order].reshape(-1, frames * video.shape[1], *video.shape[3:])


def video_of(images: Tensor, clips: int, count: int) -> Tensor:
    """[clips, 3, count, H, W] of what `images_of` grouped; what it added is dropped."""
    frames = images.reshape(clips, -1, 3, *images.shape[2:])
    return frames[:, :count].transpose(1, 2)


def context_of(z: Tensor, groups: int, *, nearest: bool) -> Tensor:
    """Latents [B, C, t, h, w] -> [B * groups, C, h, w], one for every image of a clip.

    Their mean over time, as published, where no latent belongs to a frame. nearest: for each image the mean of those
    latents only that its share of the clip overlaps.
    """
    if not nearest:
        return z.mean(2).repeat_interleave(groups, 0)
    return F.adaptive_avg_pool3d(z, (groups, *z.shape[3:])).transpose(1, 2).flatten(0, 1)
