"""Equivariance of latents: a scaled, mirrored or rotated latent must decode to the transformed clip."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.arguments import Range
from vae3d.losses.objective import ErrorMap, Term, numel_per_frame
from vae3d.losses.pixel_weights import mean_one
from vae3d.models.layers.frames import clips_of, frames_of
from vae3d.seeding import seed_of
from vae3d.types import ClipBatch, Reconstruction

NORMS = {"l1": torch.abs, "l2": torch.square}
Share = Annotated[float, Range(1e-30, 1)]


class Transform(NamedTuple):
    """Scales every frame down by `scale`, mirrors it if `flip`, and rotates it by quarter_turns * 90 degrees."""

    scale: float
    flip: bool
    quarter_turns: int

    def __call__(self, video: Tensor, size: Sequence[int]) -> Tensor:
        """Transform video [1, C, T, H, W]. size: its height and width after scaling."""
        if tuple(size) != tuple(video.shape[-2:]):
            # As in both papers, but with antialias: otherwise scales below 1/2 skip pixels.
            frames = F.interpolate(frames_of(video), tuple(size), mode="bilinear", antialias=True)
            video = clips_of(frames, len(video))
        return torch.rot90(video.flip(-1) if self.flip else video, self.quarter_turns, (-2, -1))


@dataclass(kw_only=True, eq=False)
class Equivariance(Term):
    """|decode(tau z) - tau x| for a spatial transform tau of a clip x and its latents z.

    EQ-VAE (arXiv 2502.09509) and scale equivariance (arXiv 2502.14831). Trains encoder and decoder. Each
    clip draws, with `probability`, one tau of `scales` x (mirrored, with `flip`) x `rotations` (quarter turns), without
    the identity; a clip without a draw counts 0. The draw is a pure function of `seed` and the clip's position; in the
    preflight (positions below 0) it is the most expensive tau.
    Sides of scaled latents are rounded; their target has `stride` times these sides. norm: l1 or l2. The clip's weight
    is transformed as well, and pixels mixed with an invalid one do not count. Use rotations=[0] for panoramas: rotated
    ones are not panoramas. Clips are decoded one by one, since their sizes differ.
    Raises ValueError for invalid arguments, and if the stride does not divide a clip's sides.
    """

    scales: Sequence[Share] = (0.25, 0.5, 0.75, 1.0)
    rotations: Sequence[Literal[0, 1, 2, 3]] = (0, 1, 2, 3)
    flip: bool = False
    probability: Share = 0.5
    norm: Literal["l1", "l2"] = "l1"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        combinations = product(map(float, self.scales), (False, True) if self.flip else (False,), self.rotations)
        self.transforms = [Transform(*settings) for settings in combinations if settings != (1.0, False, 0)]
        if not self.transforms:
            raise ValueError("scales and rotations contain only the identity; add another scale or rotation")

    def __call__(self, batch: ClipBatch, out: Reconstruction) -> ErrorMap:
        if out.decode is None:
            raise ValueError("equivariance needs Reconstruction.decode; see models.interface.attach_decoder")
        transforms = [self.draw(position) for position in batch.positions.tolist()]
        # Without a transform 0 times the reconstruction, so that every rank has a gradient of every parameter.
        zero = out.video.float().sum() * 0.0
        errors = [zero if tau is None else self._error(tau, batch, out, i) for i, tau in enumerate(transforms)]
        return ErrorMap(torch.stack(errors).view(-1, 1, 1, 1, 1), numel_per_frame(batch.video))

    def draw(self, position: int) -> Transform | None:
        """Transform of the clip at a position of the training order, or None."""
        if position < 0:
            return max(self.transforms)
        rng = random.Random(seed_of(self.seed, "equivariance", position))
        return rng.choice(self.transforms) if rng.random() < self.probability else None

    def _error(self, tau: Transform, batch: ClipBatch, out: Reconstruction, index: int) -> Tensor:
        """Mean error of one clip."""
        one = slice(index, index + 1)
        z, video = out.z[one].float(), batch.video[one]
        stride = video.shape[-2] // z.shape[-2]
        if video.shape[-2:] != tuple(side * stride for side in z.shape[-2:]):
            height, width = video.shape[-2:]
            raise ValueError(
                f"equivariance needs height and width that are multiples of the model's stride; {height}x{width} "
                f"pixels have latents of {z.shape[-2]}x{z.shape[-1]}"
            )
        latent_size = [max(1, round(side * tau.scale)) for side in z.shape[-2:]]
        size = [side * stride for side in latent_size]
        target = tau(video, size)
        errors = NORMS[self.norm](out.decode(tau(z, latent_size), target).float() - target)
        if batch.weight is not None:
            weight = batch.weight.expand(len(batch.video), -1, video.shape[2], *video.shape[-2:])[one]
            weight = tau(weight, size)
            if batch.valid is not None:
                weight = weight * (tau(batch.valid[one].float(), size) > 1 - 1e-4)
            errors = errors * mean_one(weight)
        return errors.mean()
