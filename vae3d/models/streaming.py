"""Streams: coding videos of any length chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from vae3d.models.interface import VideoAutoencoder
from vae3d.models.layers.frames import extend_time, pad_space
from vae3d.models.layers.taehv_frames import FramePlan, FrameRule, frames_shown, split_runs
from vae3d.seeding import Generators
from vae3d.types import Delta, LatentSpec, Posterior, Reconstruction

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
    """What CausalStream needs: WanVAE, or Tiled around one. See WanVAE.encode_chunk."""

    spec: LatentSpec

    def encode_chunk(self, video: Tensor, cache: object) -> tuple[Posterior, object]: ...

    def decode_chunk(self, z: Tensor, cache: object) -> tuple[Tensor, object]: ...


class CausalStream:
    """Codes chunks with a cache of past frames: equal to coding the whole video, in memory independent of its length.

    A last chunk that is too short for the network is extended by repeating its last frame, and height and width by
    repeating their edge. The reconstruction is cropped back.
    """

    lookahead = 0

    def __init__(self, coder: ChunkCoder, chunk_latents: int) -> None:
        self.coder = coder
        self.chunk_latents = chunk_latents
        self._encoder_cache = None
        self._decoder_cache = None

    def chunks(self, frames: int) -> list[int]:
        return chunk_lengths(frames, self.chunk_latents, self.coder.spec.time_stride)

    def __call__(self, video: Tensor, *, sample: bool = False, generator: Generators = None) -> Reconstruction:
        frames, height, width = video.shape[2:]
        missing = -(frames - (self._encoder_cache is None)) % self.coder.spec.time_stride
        video = pad_space(extend_time(video, frames + missing), self.coder.spec.space_stride)
        posterior, self._encoder_cache = self.coder.encode_chunk(video, self._encoder_cache)
        z = posterior.sample(generator) if sample else posterior.mode()
        rec, self._decoder_cache = self.coder.decode_chunk(z, self._decoder_cache)
        return Reconstruction(rec[:, :, :frames, :height, :width], posterior, z)


class PlannedCoder(Protocol):
    """What PlannedStream needs; see TAEHV."""

    spec: LatentSpec
    rule: FrameRule

    def plan(self, frames: int) -> FramePlan: ...

    def encode_planned(
        self, video: Tensor, plan: FramePlan, start: int, stop: int, cache: object
    ) -> tuple[Tensor, object]: ...

    def decode_planned(self, z: Tensor, plan: FramePlan, start: int, cache: object) -> tuple[Tensor, object]: ...


class PlannedStream:
    """Like CausalStream, for models whose frame rule depends on the video's length.

    Where latents depend on frames after those that they are decoded to, each chunk comes with these frames
    (`lookahead`). They are encoded at once, and the next call, which is given them again, skips them.
    """

    def __init__(self, coder: PlannedCoder, chunk_latents: int) -> None:
        self.coder = coder
        self.chunk_latents = chunk_latents
        self.lookahead = coder.spec.time_stride - 1 if coder.rule.looks_ahead else 0
        self._chunks: Iterator[tuple[int, int]] = iter(())  # (frames, latents up to the chunk's end)

    def chunks(self, frames: int) -> list[int]:
        stride = self.coder.spec.time_stride
        self._plan = plan = self.coder.plan(frames)
        ends = {}  # frame -> latent
        for latents in [*range(self.chunk_latents, plan.latents, self.chunk_latents), plan.latents]:
            ends[min(frames, frames_shown(plan, stride, latents))] = latents
        lengths = [end - start for start, end in pairwise([0, *ends])]
        self._chunks = iter(list(zip(lengths, ends.values(), strict=True)))
        self._shown = 0  # frames
        self._encoded = 0  # frames
        self._latents = 0
        self._encoder_cache = None
        self._decoder_cache = None
        return lengths

    def __call__(self, video: Tensor, *, sample: bool = False, generator: Generators = None) -> Reconstruction:
        """Raises ValueError for more chunks than `chunks` returned, and for a chunk of another length."""
        frames, latents = next(self._chunks, (0, 0))
        height, width = video.shape[-2:]
        if not frames or not frames <= video.shape[2] <= frames + self.lookahead:
            raise ValueError(
                f"the chunk has {video.shape[2]} frames; chunks() gave it {frames}, with at most {self.lookahead} more "
                "as lookahead"
            )
        z = self._encode(pad_space(video, self.coder.spec.space_stride), latents)
        rec, self._decoder_cache = self.coder.decode_planned(z, self._plan, self._latents, self._decoder_cache)
        self._shown += frames
        self._latents = latents
        return Reconstruction(rec[:, :, :frames, :height, :width], Delta(z), z)

    def _encode(self, video: Tensor, latents: int) -> Tensor:
        """Encode up to the latent `latents`. video: from the first frame that has not been shown."""
        stride, plan = self.coder.spec.time_stride, self._plan
        count = sum(frames for _, _, frames in split_runs(plan.encoder, stride, self._latents, latents))
        new = video[:, :, self._encoded - self._shown :]
        if not new.shape[2]:
            new = video[:, :, -1:]
        new = extend_time(new, count)[:, :, :count]
        self._encoded += count
        z, self._encoder_cache = self.coder.encode_planned(new, plan, self._latents, latents, self._encoder_cache)
        return z


def chunk_lengths(frames: int, chunk_latents: int, time_stride: int) -> list[int]:
    """Frames of each chunk of `chunk_latents` latents: 1 + n * time_stride in the first, the rest in the last."""
    size = chunk_latents * time_stride
    ends = [*range(size - time_stride + 1, frames, size), frames]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def chunk_within(memory_gib: float | None, chunk_memory: Callable[[int], int], max_latents: int) -> int:
    """The most latents, up to max_latents and at least 1, whose chunk_memory (bytes) stays in memory_gib."""
    budget = (memory_gib or DEFAULT_MEMORY) * 2**30
    return max((n for n in range(1, max_latents + 1) if chunk_memory(n) <= budget), default=1)
