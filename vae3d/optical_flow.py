"""Optical flow without a network, by OpenCV, and warping along a flow."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.pixels import quantize

MIN_SIDE = 12  # pixels; DIS matches patches of 8


def dis_flow(first: Tensor, second: Tensor) -> Tensor:
    """Flow from `first` to `second`, frames [N, 3, H, W] in [0, 1]; [N, 2, H, W] in pixels, (x, y).

    Dense inverse search (Kroeger et al., arXiv 1603.03590) on grey frames of 8 bits, on the CPU. Zeros on the meta
    device and for fake tensors. Raises ValueError for frames below MIN_SIDE.
    """
    if min(first.shape[-2:]) < MIN_SIDE:
        raise ValueError(
            f"optical flow by DIS needs frames of at least {MIN_SIDE} pixels; these are "
            f"{first.shape[-2]}x{first.shape[-1]}"
        )
    if type(first) is not Tensor or first.is_meta:
        return first.new_zeros(len(first), 2, *first.shape[-2:])
    import cv2

    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    pairs = zip(grey_frames(first), grey_frames(second), strict=True)
    flows = np.stack([search.calc(a, b, None) for a, b in pairs])
    return torch.from_numpy(flows).permute(0, 3, 1, 2).to(first.device)


def grey_frames(frames: Tensor) -> list[np.ndarray]:
    """[N, 3, H, W] in [0, 1] -> N images [H, W], uint8."""
    import cv2

    rgb = quantize(frames, "unit").permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in rgb]


def warp(images: Tensor, motion: Tensor) -> Tensor:
    """Backward warp: [N, C, H, W] sampled bilinearly at each pixel plus its flow [N, 2, H, W]; edges are replicated."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device, dtype=motion.dtype)[:, None]
    columns = torch.arange(width, device=images.device, dtype=motion.dtype)
    x = (columns + motion[:, 0]) * 2 / max(width - 1, 1) - 1
    y = (rows + motion[:, 1]) * 2 / max(height - 1, 1) - 1
    return F.grid_sample(images, torch.stack([x, y], -1), padding_mode="border", align_corners=True)
