"""Geometry of equirectangular panoramas (ERP): frames [..., H, W] of the whole sphere.

Pixel (i, j) has latitude pi/2 - (i + 0.5) pi / H and longitude (j + 0.5) 2 pi / W - pi: row 0 is at the zenith, row
H - 1 at the nadir, and the image centre looks ahead.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.transfer import to_device

# Cube face -> directions of its centre, its right and its top; x is right, y up, z ahead. Faces are seen from inside
# the cube: `up` continues the front face over its top edge, `down` over its bottom edge.
FACES = {
    "front": ((0, 0, 1), (1, 0, 0), (0, 1, 0)),
    "right": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "back": ((0, 0, -1), (-1, 0, 0), (0, 1, 0)),
    "left": ((-1, 0, 0), (0, 0, 1), (0, 1, 0)),
    "up": ((0, 1, 0), (1, 0, 0), (0, 0, -1)),
    "down": ((0, -1, 0), (1, 0, 0), (0, 0, 1)),
}
SIDES = slice(0, 4)
UP = 4
DOWN = 5


def latitude_weights(height: int, device: torch.device | str = "cpu") -> Tensor:
    """[H] cosines of the rows' latitudes, cos((j + 0.5 - H/2) pi / H), in fp64 (WS-PSNR, Sun et al. 2017)."""
    rows = torch.arange(height, dtype=torch.float64, device=device)
    return torch.cos((rows + 0.5 - height / 2) * math.pi / height)


def roll(frames: Tensor, columns: int | None = None) -> Tensor:
    """Rotate the camera: column j moves to j + columns. By default half a turn, which moves the seam to the centre."""
    return frames.roll(frames.shape[-1] // 2 if columns is None else columns, -1)


def wrap(frames: Tensor, columns: int, rows: int = 0) -> Tensor:
    """Pad to [..., H + 2 rows, W + 2 columns] across the seam and over the poles.

    Beyond a pole the same rows continue, rotated by half a turn. Raises ValueError if the frame is too small.
    """
    height, width = frames.shape[-2:]
    if columns > width or rows > height:
        raise ValueError(f"frames of {height}x{width} cannot be padded by {rows} rows and {columns} columns")
    if rows:
        frames = torch.cat([_beyond(frames[..., :rows, :]), frames, _beyond(frames[..., height - rows :, :])], -2)
    if columns:
        frames = torch.cat([frames[..., width - columns :], frames, frames[..., :columns]], -1)
    return frames


def _beyond(rows: Tensor) -> Tensor:
    """Rows next to a pole as they continue beyond it. Half a turn of an odd width averages two columns."""
    rows = rows.flip(-2)
    width = rows.shape[-1]
    return (rows.roll(width // 2, -1) + rows.roll((width + 1) // 2, -1)) / 2


def cube_faces(frames: Tensor, size: int | None = None) -> Tensor:
    """Six views of 90 degrees, [N, C, H, W] -> [N, 6, C, size, size] in the order of FACES.

    Bilinear, differentiable, without artefacts at the panorama's borders. size: by default H / 2, the panorama's own
    resolution. Raises ValueError for a panorama of one row.
    """
    height, width = frames.shape[-2:]
    size = height // 2 if size is None else size
    if size < 1:
        raise ValueError(f"a panorama of {height}x{width} has no cube faces; it needs at least two rows")
    grid = _face_grid(height, width, size, frames.device).to(frames.dtype).expand(len(frames), -1, -1, -1)
    faces = F.grid_sample(wrap(frames, 1, 1), grid, "bilinear", "zeros", align_corners=True)
    return faces.unflatten(2, (6, size)).transpose(1, 2)


def _face_grid(height: int, width: int, size: int, device: torch.device) -> Tensor:
    """[1, 6 size, size, 2]: grid_sample coordinates (align_corners=True) of the faces' pixels in a panorama padded by
    one pixel on each side."""
    steps = (torch.arange(size, dtype=torch.float64, device=device) + 0.5) * 2 / size - 1
    axes = to_device(torch.tensor(list(FACES.values()), dtype=torch.float64), device)
    centre, right, top = axes[:, :, None, None, :].unbind(1)  # each [6, 1, 1, 3]
    x, y, z = (centre + steps[None, None, :, None] * right - steps[None, :, None, None] * top).unbind(-1)
    column = (torch.atan2(x, z) / (2 * math.pi) + 0.5) * width + 0.5
    row = (0.5 - torch.atan2(y, torch.hypot(x, z)) / math.pi) * height + 0.5
    grid = torch.stack([column * 2 / (width + 1) - 1, row * 2 / (height + 1) - 1], -1)
    return grid.reshape(1, 6 * size, size, 2)
