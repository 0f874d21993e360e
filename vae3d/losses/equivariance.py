"""Latents that transform like the pixels they stand for, so that a diffusion model finds images in them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vae3d.losses.objective import Error, numel_per_frame, require_pixels
from vae3d.losses.weights import mean_one
from vae3d.seeding import seed_of
from vae3d.types import Clip, Reconstruction

NORMS = {"l1": torch.abs, "l2": torch.square}


class Transform(NamedTuple):
    """Of every frame: scaled down to `scale`, mirrored, turned by `quarters` of 90 degrees, in this order."""

    scale: float
    flip: bool
    quarters: int

    def __call__(self, video: Tensor, size: Sequence[int]) -> Tensor:
        """video: [1, C, T, H, W]. size: its height and width when scaled; see `scaled`."""
        if tuple(size) != tuple(video.shape[-2:]):
            frames = rearrange(video, "b c t h w -> (b t) c h w")
            # Both papers scale so, but without `antialias`, with which no pixel goes unseen at scales below a half.
            frames = F.interpolate(frames, tuple(size), mode="bilinear", antialias=True)
            video = rearrange(frames, "(b t) c h w -> b c t h w", b=len(video))
        return torch.rot90(video.flip(-1) if self.flip else video, self.quarters, (-2, -1))

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Sides of latents after scaling, whole numbers."""
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))


class Equivariance:
    """|decode(tau z) - tau x| for a spatial transform tau of the latents z of a clip x, decoded by the same network:
    EQ-VAE (arXiv 2502.09509) and scale equivariance (arXiv 2502.14831), which do as well for videos.

    Encoder and decoder learn from it. For every clip one tau is drawn, from `scales` x (mirrored, with `flip`) x
    `rotations` (quarter turns) without the identity, with `probability`; a clip that draws none counts 0. The draw is a
    function of `seed` and the clip's position alone, and a rehearsal (a position below 0) draws what costs most.
    Scaled latents are whole, and their target has `stride` times their sides. norm: l1 or l2. The clip's weight is
    transformed with it, and pixels into which one that is not valid was mixed do not count. Turned panoramas are none:
    give them rotations=[0].
    Clips pass through the decoder one by one: their sizes differ.
    Raises ValueError for arguments that make no sense, and where the stride does not divide a clip's sides.
    """

    needs_pixels = True

    def __init__(
        self,
        *,
        scales: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        rotations: Sequence[int] = (0, 1, 2, 3),
        flip: bool = False,
        probability: float = 0.5,
        norm: str = "l1",
        seed: int = 0,
    ) -> None:
        if not all(0 < scale <= 1 for scale in scales):
            raise ValueError(f"scales are {list(scales)}; each must be above 0 and at most 1")
        if not set(rotations) <= {0, 1, 2, 3}:
            raise ValueError(f"rotations are {list(rotations)}; give quarter turns, of 0, 1, 2, 3")
        if not 0 < probability <= 1:
            raise ValueError(f"probability is {probability}; it must be above 0 and at most 1")
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}; use one of {', '.join(NORMS)}")
        every = product(map(float, scales), (False, True) if flip else (False,), rotations)
        self.transforms = [Transform(*told) for told in every if told != (1.0, False, 0)]
        if not self.transforms:
            raise ValueError("scales and rotations leave the identity alone; give another scale or rotation")
        self.probability, self.norm, self.seed = probability, NORMS[norm], seed

    def __call__(self, clip: Clip, out: Reconstruction) -> Error:
        if out.decode is None:
            raise ValueError("equivariance decodes transformed latents, and Reconstruction.decode is None; set it")
        drawn = [self.draw(position) for position in clip.positions.tolist()]
        # Nothing drawn is 0 times the reconstruction: every rank then has a gradient of every parameter.
        nothing = require_pixels(out).sum() * 0.0
        errors = [nothing if tau is None else self._error(tau, clip, out, i) for i, tau in enumerate(drawn)]
        return Error(torch.stack(errors).view(-1, 1, 1, 1, 1), numel_per_frame(clip.video))

    def draw(self, position: int) -> Transform | None:
        """The transform of the clip at a position of the training order."""
        if position < 0:
            return max(self.transforms)
        rng = random.Random(seed_of(self.seed, "equivariance", position))
        return rng.choice(self.transforms) if rng.random() < self.probability else None

    def _error(self, tau: Transform, clip: Clip, out: Reconstruction, index: int) -> Tensor:
        """Mean over the elements of one clip."""
        one = slice(index, index + 1)
        z, video = out.z[one].float(), clip.video[one]
        stride = _stride(video, z)
        small = tau.scaled(*z.shape[-2:])
        size = [side * stride for side in small]
        target = tau(video, size)
        errors = self.norm(out.decode(tau(z, small), target).float() - target)
        if clip.weight is not None:
            weight = clip.weight.expand(len(clip.video), -1, video.shape[2], *video.shape[-2:])[one]
            weight = tau(weight, size)
            if clip.valid is not None:
                weight = weight * (tau(clip.valid[one].float(), size) > 1 - 1e-4)
            errors = errors * mean_one(weight)
        return errors.mean()


def _stride(video: Tensor, z: Tensor) -> int:
    height, width = video.shape[-2:]
    stride = height // z.shape[-2]
    if (height, width) != (stride * z.shape[-2], stride * z.shape[-1]):
        raise ValueError(
            f"equivariance needs sides that the model's stride divides; {height}x{width} pixels have latents of "
            f"{z.shape[-2]}x{z.shape[-1]}"
        )
    return stride
