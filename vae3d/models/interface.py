"""The interface of every video autoencoder, and of the streams that code long videos in chunks.

Training, inference, evaluation and latent caches call these methods; docs/extend.md shows how to add a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from vae3d.seeding import Generators
from vae3d.types import Delta, LatentSpec, Posterior, Reconstruction


@runtime_checkable
class VideoAutoencoder(Protocol):
    """Maps video [B, 3, T, H, W] in [-1, 1] to latents [B, C, t, h, w] and back.

    `forward` takes any number of frames and any size and returns the same. A model pads what its network cannot take
    and crops the result; its docstring says how.
    """

    spec: LatentSpec

    def encode(self, video: Tensor) -> Posterior | Delta:
        """Posterior over raw (not normalised) latents. Raises PixelError as pixels.check_video does."""

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Decode raw latents to num_frames frames, not clamped. Raises PixelError as pixels.check_latents does."""

    def forward(
        self,
        video: Tensor,
        *,
        latents: Tensor | None = None,
        encode: bool = False,
        sample: bool = True,
        pixels: bool = True,
        generator: Generators = None,
        noise: float = 0.0,
    ) -> Reconstruction:
        """Encode and decode. A training step calls this once per micro-batch, through the wrapper (DeepSpeed's engine);
        terms that decode again (`Reconstruction.decode`) call the network itself.

        latents: decode these instead of encoding `video`. encode: with `latents`, encode as well, for the posterior.
        sample: sample the posterior, or take its mode. generator: one for the batch, or one per clip.
        pixels: False skips the pixel decoder, where no loss reads its output. noise: see forward.add_latent_noise.
        """

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        """Modules that a stage may train, by name. Parts may overlap."""

    def last_layers(self) -> list[nn.Parameter]:
        """Weights of the layers that output pixels, the last one first. A stage may freeze some of them."""

    def frames_valid(self, frames: int) -> bool:
        """Whether a clip of this length needs no padding."""

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of the latents of a clip of this size."""

    def stream(self, height: int, width: int, memory_gib: float | None = None) -> Stream:
        """A Stream for one video of this size. memory_gib: about how much memory a chunk may take, where it varies."""

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latents to about zero mean and unit variance, as a diffusion model takes them."""

    def denormalize(self, z: Tensor) -> Tensor:
        """Inverse of normalize."""


class Stream(Protocol):
    """Reconstructs one video chunk by chunk.

    lookahead: how many frames beyond its chunk a call must be given, as far as the video has them.
    """

    lookahead: int

    def chunks(self, frames: int) -> list[int]:
        """Start a video of this many frames and return the lengths of its chunks. Call once, before the first chunk."""

    def __call__(self, video: Tensor, *, sample: bool = False, generator: Generators = None) -> Reconstruction:
        """Reconstruct the next chunk of [B, 3, T, H, W], without its lookahead."""


def share_frames(a: VideoAutoencoder, b: VideoAutoencoder, frames: int, height: int, width: int) -> bool:
    """Whether both models take clips of this size without padding time, to latents of the same shape."""
    valid = a.frames_valid(frames) and b.frames_valid(frames)
    return valid and a.latent_shape(frames, height, width) == b.latent_shape(frames, height, width)


def nearest_frames(frames: int, is_valid: Callable[[int], bool]) -> list[int]:
    """Up to four valid frame counts nearest to `frames`, ascending."""
    return sorted(sorted(filter(is_valid, range(1, frames + 36)), key=lambda n: abs(n - frames))[:4])
