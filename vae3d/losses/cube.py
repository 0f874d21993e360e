"""Losses on the six cube faces of a panorama: perspective views of 90 degrees, without the distortion near the poles.

The clip's pixel weight does not apply: each face is a sixth of the sphere. Within a face, a corner has 5.2 times the
pixels per solid angle of the centre. Invalid pixels have weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from vae3d import panorama
from vae3d.arguments import Count
from vae3d.losses.objective import PixelTerm
from vae3d.losses.perceptual import LPIPS
from vae3d.losses.pixel_weights import mean_one
from vae3d.models.layers.frames import frames_of
from vae3d.pixels import as_rgb
from vae3d.types import ClipBatch


@dataclass(eq=False)
class CubeL1(PixelTerm):
    """|reconstruction - clip| on cube faces. size: pixels of a face's side, by default half the panorama's height."""

    size: Count | None = None

    def errors(self, rec: Tensor, batch: ClipBatch) -> Tensor:
        # Sampling is linear: the faces of the error equal the error of the faces.
        errors = panorama.cube_faces(frames_of(rec - batch.video), self.size).abs()
        weight = _face_weight(batch, self.size)
        errors = (errors if weight is None else errors * weight).mean((1, 2, 3, 4))
        return errors.view(len(batch.video), 1, -1, 1, 1)


class CubeLPIPS(LPIPS):
    """LPIPS on cube faces, averaged over the six of each frame.

    size: pixels of a face's side, by default half the panorama's height; at least 16 for vgg and 31 for alex. Other
    arguments as for LPIPS; frame_batch counts faces. Raises ValueError for smaller faces.
    """

    min_size = {"vgg": 16, "alex": 31}
    size: Count | None

    def __init__(
        self,
        *,
        size: int | None = None,
        net: Literal["vgg", "alex"] = "vgg",
        path: str | Path | None = None,
        frame_batch: int = 24,
        gradient_checkpointing: bool = True,
    ) -> None:
        self.size = size  # before LPIPS checks all fields
        super().__init__(net=net, path=path, frame_batch=frame_batch, gradient_checkpointing=gradient_checkpointing)

    def errors(self, rec: Tensor, batch: ClipBatch) -> Tensor:
        size = self.size or batch.video.shape[-2] // 2
        min_size = self.min_size[self.net]
        if size < min_size:
            raise ValueError(
                f"LPIPS with the {self.net} trunk needs cube faces of at least {min_size} pixels; these have {size}: "
                f"train on panoramas of at least {2 * min_size} rows, or set the term's `size`"
            )
        ori, rec = (panorama.cube_faces(frames_of(as_rgb(video)), size).flatten(0, 1) for video in (batch.video, rec))
        weight = _face_weight(batch, size)
        weight = None if weight is None else weight.flatten(0, 1)
        values = self.distances(ori, rec, weight, len(batch.video))  # [B, 1, T * 6, 1, 1]
        return values.unflatten(2, (-1, 6)).mean(3)


def _face_weight(batch: ClipBatch, size: int | None) -> Tensor | None:
    """[B * T, 6, 1, size, size] of mean 1 per clip, 0 where pixels are invalid; None if all are valid."""
    if batch.valid is None:
        return None
    faces = panorama.cube_faces(frames_of(batch.valid.float()), size)
    return mean_one(faces.unflatten(0, (len(batch.video), -1))).flatten(0, 1)
