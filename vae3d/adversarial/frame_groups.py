"""Clips as batches of images, each of one or more frames stacked along channels, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_frames(video: Tensor, frames: int) -> Tensor:
    """[B, 3, T, H, W] -> [B * ceil(T / frames), frames * 3, H, W].

    The last group is filled with frames from the first on, cyclically, as `TAEHV_Training_Example.ipynb` of
    madebyollin/seraena fills 9 frames to 12 with the first 3.
    """
    count = video.shape[2]
    order = torch.arange(-(-count // frames) * frames, device=video.device) % count
    return video.transpose(1, 2)[:, order].reshape(-1, frames * video.shape[1], *video.shape[3:])


def ungroup_frames(images: Tensor, clips: int, count: int) -> Tensor:
    """Inverse of group_frames, [clips, 3, count, H, W], without the frames that filled the last group."""
    frames = images.reshape(clips, -1, 3, *images.shape[2:])
    return frames[:, :count].transpose(1, 2)


def group_latents(z: Tensor, groups: int, *, nearest: bool) -> Tensor:
    """Latents [B, C, t, h, w] -> [B * groups, C, h, w], one for every group of frames.

    Their mean over time, as published. nearest: for each group the mean of the latents that it overlaps in time.
    """
    if not nearest:
        return z.mean(2).repeat_interleave(groups, 0)
    return F.adaptive_avg_pool3d(z, (groups, *z.shape[3:])).transpose(1, 2).flatten(0, 1)
