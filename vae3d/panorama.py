"""Geometry of equirectangular panoramas (ERP), frames [..., H, W] that show the whole sphere.

Row 0 is the zenith's, row H - 1 the nadir's; columns go round from left to right once, and the middle of the image
looks ahead. Pixel (i, j) looks to latitude pi/2 - (i + 0.5) pi / H and longitude (j + 0.5) 2 pi / W - pi.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Name of a cube's face -> directions of its middle, of its right and of its top; x is right, y up, z ahead. A face is
# seen from the centre of the cube: `up` continues the front face over its top edge, `down` over its bottom edge.
FACES = {
    "front": ((0, 0, 1), (1, 0, 0), (0, 1, 0)),
    "right": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "back": ((0, 0, -1), (-1, 0, 0), (0, 1, 0)),
    "left": ((-1, 0, 0), (0, 0, 1), (0, 1, 0)),
    "up": ((0, 1, 0), (1, 0, 0), (0, 0, -1)),
    "down": ((0, -1, 0), (1, 0, 0), (0, 0, 1)),
}
SIDES, UP, DOWN = slice(0, 4), 4, 5


def latitude_weights(height: int, device: torch.device | str = "cpu") -> Tensor:
    """[H] cosines of the rows' latitudes: w_j = cos((j + 0.5 - H/2) pi / H) (Sun et al. 2017), fp64."""
    rows = torch.arange(height, dtype=torch.float64, device=device)
    return torch.cos((rows + 0.5 - height / 2) * math.pi / height)


def roll(frames: Tensor, columns: int | None = None) -> Tensor:
    """Turn the camera: column j goes to j + columns. By default half a turn, which puts the seam into the middle."""
    return frames.roll(frames.shape[-1] // 2 if columns is None else columns, -1)


def wrap(frames: Tensor, columns: int, rows: int = 0) -> Tensor:
    """[..., H + 2 rows, W + 2 columns]: the frame continued across the seam, and over the poles.

    Beyond a pole lie the same rows half a turn away. Raises ValueError if the frame is too small for that.
    """
    height, width = frames.shape[-2:]
    if columns > width or rows > height:
        raise ValueError(f"frames of {height}x{width} cannot be continued by {rows} rows and {columns} columns")
    if rows:
        frames = torch.cat([_beyond(frames[..., :rows, :]), frames, _beyond(frames[..., height - rows :, :])], -2)
    if columns:
        frames = torch.cat([frames[..., width - columns :], frames, frames[..., :columns]], -1)
    return frames


def _beyond(rows: Tensor) -> Tensor:
    """Rows next to a pole as they follow beyond it. Half a turn of an odd width falls between two columns."""
    rows, width = rows.flip(-2), rows.shape[-1]
    return (rows.roll(width // 2, -1) + rows.roll((width + 1) // 2, -1)) / 2


def cube_faces(frames: Tensor, size: int | None = None) -> Tensor:
    """Six views of 90 degrees from the panorama's centre, [N, C, H, W] -> [N, 6, C, size, size] in the order of FACES.

    Bilinear and differentiable; no face sees a border of the panorama. size: by default H/2, which is the rows that
    the panorama has for 90 degrees; larger faces would only repeat pixels.
    Raises ValueError for a panorama of one row.
    """
    height, width = frames.shape[-2:]
    size = height // 2 if size is None else size
    if size < 1:
        raise ValueError(f"a panorama of {height}x{width} has no cube faces; it needs at least two rows")
    grid = _face_grid(height, width, size, frames.device).to(frames.dtype).expand(len(frames), -1, -1, -1)
    faces = F.grid_sample(wrap(frames, 1, 1), grid, "bilinear", "zeros", align_corners=True)
    return faces.unflatten(2, (6, size)).transpose(1, 2)


def _face_grid(height: int, width: int, size: int, device: torch.device) -> Tensor:
    """[1, 6 size, size, 2]: where every pixel of the faces lies in a panorama that is continued by one pixel on each
    side, from -1, the middle of the first pixel, to 1, that of the last."""
    steps = (torch.arange(size, dtype=torch.float64, device=device) + 0.5) * 2 / size - 1
    axes = torch.tensor(list(FACES.values()), dtype=torch.float64, device=device)
    middle, right, top = axes[:, :, None, None, :].unbind(1)  # each [6, 1, 1, 3]
    x, y, z = (middle + steps[None, None, :, None] * right - steps[None, :, None, None] * top).unbind(-1)
    column = (torch.atan2(x, z) / (2 * math.pi) + 0.5) * width + 0.5
    row = (0.5 - torch.atan2(y, torch.hypot(x, z)) / math.pi) * height + 0.5
    grid = torch.stack([column * 2 / (width + 1) - 1, row * 2 / (height + 1) - 1], -1)
    return grid.reshape(1, 6 * size, size, 2)
