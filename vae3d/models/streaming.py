"""Streams: coding videos of any length chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from vae3d.models.interface import VideoAutoencoder, choose_latents
from vae3d.models.layers.frames import extend_time, pad_space
from vae3d.seeding import Generators
from vae3d.types import LatentSpec, Posterior, Reconstruction

DEFAULT_MEMORY = 8.0  # GiB


class IndependentChunks:
    """Codes each chunk as a clip of its own. size: frames per chunk; None: the whole video."""

    lookahead = 0

    def __init__(self, model: VideoAutoencoder, size: int | None) -> None:
        self.model, self.size = model, size

    def chunks(self, frames: int) -> list[int]:
        size = self.size or frames
        return [min(size, frames - start) for start in range(0, frames, size)]

    def __call__(self, video: Tensor, *, sample: bool = False, generator: Generators = None) -> Reconstruction:
        return self.model(video, sample=sample, generator=generator)


class ChunkCoder(Protocol):
    """What CausalStream needs of a WanVAE. See WanVAE.encode_chunk."""

    spec: LatentSpec

    def encode_chunk(self, video: Tensor, cache: object) -> tuple[Posterior, object]: ...

    def decode_chunk(self, z: Tensor, cache: object) -> tuple[Tensor, object]: ...


class CausalStream:
    """Codes chunks with a cache of past frames: equal to coding the whole video, in memory independent of its length.

    The last chunk is extended, and cropped back, as clips are. fixed_chunks: the first chunk is one frame, and all
    others are extended to `chunk_latents`, so that the coder sees two shapes whatever the video's length.
    """

    lookahead = 0

    def __init__(self, coder: ChunkCoder, chunk_latents: int, fixed_chunks: bool = False) -> None:
        self.coder = coder
        self.chunk_latents = chunk_latents
        self.fixed_chunks = fixed_chunks
        self._encoder_cache = None
        self._decoder_cache = None

    def chunks(self, frames: int) -> list[int]:
        first = 1 if self.fixed_chunks else self.chunk_latents
        return chunk_lengths(frames, self.chunk_latents, self.coder.spec.time_stride, first)

    def __call__(self, video: Tensor, *, sample: bool = False, generator: Generators = None) -> Reconstruction:
        frames, height, width = video.shape[2:]
        stride = self.coder.spec.time_stride
        first = int(self._encoder_cache is None)  # this frame has a latent of its own
        latents = first + -(-(frames - first) // stride)
        coded = self.chunk_latents if self.fixed_chunks and not first else latents
        video = pad_space(extend_time(video, first + (coded - first) * stride), self.coder.spec.space_stride)
        posterior, self._encoder_cache = self.coder.encode_chunk(video, self._encoder_cache)
        posterior = posterior.first(latents)
        z = choose_latents(posterior, None, sample, generator)
        rec, self._decoder_cache = self.coder.decode_chunk(extend_time(z, coded), self._decoder_cache)
        return Reconstruction(rec[:, :, :frames, :height, :width], posterior, z)


def chunk_lengths(frames: int, chunk_latents: int, time_stride: int, first_latents: int | None = None) -> list[int]:
    """Frames of each chunk of `chunk_latents` latents: 1 + n * time_stride in the first, the rest in the last.

    first_latents: of the first chunk, by default as of the others.
    """
    first = 1 + ((first_latents or chunk_latents) - 1) * time_stride
    ends = [*range(first, frames, chunk_latents * time_stride), frames]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def chunk_within(memory_gib: float | None, chunk_memory: Callable[[int], int], max_latents: int) -> int:
    """The most latents, up to max_latents and at least 1, whose chunk_memory (bytes) stays in memory_gib."""
    budget = (memory_gib or DEFAULT_MEMORY) * 2**30
    return max((n for n in range(1, max_latents + 1) if chunk_memory(n) <= budget), default=1)
