"""Losses of panoramas on the six faces of the cube around the camera: what a viewer sees, where straight lines are
straight and nothing is stretched.

The clip's pixel weight does not apply: every face counts a sixth, as it does of the sphere. Within a face a corner has
5.2 times the pixels per solid angle that the middle has. Pixels that are not valid count nothing here either.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from vae3d import panorama
from vae3d.losses.objective import Error, numel_per_frame, require_pixels
from vae3d.losses.perceptual import LPIPS, frames_of
from vae3d.losses.weights import mean_one
from vae3d.types import Clip, Reconstruction


class CubeL1:
    """|reconstruction - clip| on cube faces. size: of a face, by default half the panorama's height."""

    needs_pixels = True

    def __init__(self, size: int | None = None) -> None:
        self.size = size

    def __call__(self, clip: Clip, out: Reconstruction) -> Error:
        # Sampling is linear, so the faces of the error are the error of the faces.
        errors = panorama.cube_faces(frames_of(require_pixels(out) - clip.video), self.size).abs()
        weight = _face_weight(clip, self.size)
        errors = (errors if weight is None else errors * weight).mean((1, 2, 3, 4))
        return Error(errors.view(len(clip.video), 1, -1, 1, 1), numel_per_frame(clip.video))


class CubeLPIPS(LPIPS):
    """LPIPS of cube faces, the mean of the six of each frame.

    size: of a face, by default half the panorama's height; at least 16 for vgg and 31 for alex. Other arguments as in
    LPIPS; frame_batch counts faces. Raises ValueError for smaller faces.
    """

    smallest = {"vgg": 16, "alex": 31}

    def __init__(
        self,
        *,
        size: int | None = None,
        net: str = "vgg",
        path: str | Path | None = None,
        frame_batch: int = 24,
        gradient_checkpointing: bool = True,
    ) -> None:
        super().__init__(net=net, path=path, frame_batch=frame_batch, gradient_checkpointing=gradient_checkpointing)
        self.size = size

    def __call__(self, clip: Clip, out: Reconstruction) -> Error:
        height, net = clip.video.shape[-2], self.network.net
        size, smallest = self.size or height // 2, self.smallest[net]
        if size < smallest:
            raise ValueError(
                f"LPIPS with the {net} trunk needs cube faces of at least {smallest} pixels; these have {size}: train "
                f"on panoramas of at least {2 * smallest} rows, or set the term's `size`"
            )
        ori, rec = (
            panorama.cube_faces(frames_of(video), size).flatten(0, 1) for video in (clip.video, require_pixels(out))
        )
        weight = _face_weight(clip, size)
        weight = None if weight is None else weight.flatten(0, 1)
        values = self.distances(ori, rec, weight, len(clip.video))  # [B, 1, T * 6, 1, 1]
        frames = values.unflatten(2, (-1, 6)).mean(3)
        return Error(frames, numel_per_frame(clip.video))


def _face_weight(clip: Clip, size: int | None) -> Tensor | None:
    """[B * T, 6, 1, size, size] of mean 1 over each clip, 0 where nothing is valid; None where all is."""
    if clip.valid is None:
        return None
    faces = panorama.cube_faces(frames_of(clip.valid.float()), size)
    return mean_one(faces.unflatten(0, (len(clip.video), -1))).flatten(0, 1)
