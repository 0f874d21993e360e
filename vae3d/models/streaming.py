"""Coding arbitrarily long videos piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from vae3d.models.layers.frames import pad_space
from vae3d.seeding import Generators
from vae3d.types import LatentSpec, Posterior, Reconstruction

if TYPE_CHECKING:
    from vae3d.models.base import VideoAutoencoder


class Stream(Protocol):
    """One video, called with one piece after another."""

    def chunks(self, frames: int) -> list[int]:
        """Lengths of the pieces of a video of so many frames."""

    def __call__(self, video: Tensor, *, sample: bool = False, generator: Generators = None) -> Reconstruction:
        """Reconstruct the next piece, [B, 3, T, H, W]."""


class IndependentChunks:
    """A stream of pieces that know nothing of each other. size: frames of a piece; None: the whole video."""

    def __init__(self, model: VideoAutoencoder, size: int | None) -> None:
        self.model, self.size = model, size

    def chunks(self, frames: int) -> list[int]:
        size = self.size or frames
        return [min(size, frames - start) for start in range(0, frames, size)]

    def __call__(self, video: Tensor, *, sample: bool = False, generator: Generators = None) -> Reconstruction:
        return self.model(video, sample=sample, generator=generator)


class ChunkCoder(Protocol):
    """What CausalStream drives: a causal model, or one that works in tiles; see WanVAE.encode_chunk."""

    spec: LatentSpec

    def encode_chunk(self, video: Tensor, cache: object) -> tuple[Posterior, object]: ...

    def decode_chunk(self, z: Tensor, cache: object) -> tuple[Tensor, object]: ...


class CausalStream:
    """A stream that gives what the whole video would give, in memory that does not depend on its length.

    A last piece that is too short for the network is extended by repeating its last frame, sides that its space stride
    does not divide by repeating their edge; the reconstruction is cut to what was given.
    """

    def __init__(self, coder: ChunkCoder, chunk_latents: int) -> None:
        self.coder, self.chunk_latents = coder, chunk_latents
        self._encoder_cache = self._decoder_cache = None

    def chunks(self, frames: int) -> list[int]:
        return chunk_lengths(frames, self.chunk_latents, self.coder.spec.time_stride)

    def __call__(self, video: Tensor, *, sample: bool = False, generator: Generators = None) -> Reconstruction:
        frames, height, width = video.shape[2:]
        missing = -(frames - (self._encoder_cache is None)) % self.coder.spec.time_stride
        if missing:
            video = torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2)
        video = pad_space(video, self.coder.spec.space_stride)
        posterior, self._encoder_cache = self.coder.encode_chunk(video, self._encoder_cache)
        z = posterior.sample(generator) if sample else posterior.mode()
        rec, self._decoder_cache = self.coder.decode_chunk(z, self._decoder_cache)
        return Reconstruction(rec[:, :, :frames, :height, :width], posterior, z)


def chunk_lengths(frames: int, chunk_latents: int, time_stride: int) -> list[int]:
    """Pieces of `chunk_latents` latents each: the first has 1 + n * time_stride frames, the last may be shorter."""
    size = chunk_latents * time_stride
    ends = [*range(size - time_stride + 1, frames, size), frames]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
