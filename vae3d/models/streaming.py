"""Coding arbitrarily long videos piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from vae3d.models.layers.frames import extend_time, pad_space
from vae3d.models.layers.taehv_frames import FrameRule, Plan, between, shown
from vae3d.seeding import Generators
from vae3d.types import Delta, LatentSpec, Posterior, Reconstruction

if TYPE_CHECKING:
    from vae3d.models.interface import VideoAutoencoder


class IndependentChunks:
    """A stream of pieces that know nothing of each other. size: frames of a piece; None: the whole video."""

    lookahead = 0

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

    lookahead = 0

    def __init__(self, coder: ChunkCoder, chunk_latents: int) -> None:
        self.coder, self.chunk_latents = coder, chunk_latents
        self._encoder_cache = self._decoder_cache = None

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
    """What PlannedStream drives; see TAEHV."""

    spec: LatentSpec
    rule: FrameRule

    def plan(self, frames: int) -> Plan: ...

    def encode_planned(
        self, video: Tensor, plan: Plan, start: int, stop: int, memory: object
    ) -> tuple[Tensor, object]: ...

    def decode_planned(self, z: Tensor, plan: Plan, start: int, memory: object) -> tuple[Tensor, object]: ...


class PlannedStream:
    """A stream for models whose latents stand for frames by a rule that must know the video's length.

    It gives what the whole video would give, in memory that does not depend on its length. Where latents see frames
    after those that they let show, these come with the piece, are encoded then, and come again with the next.
    """

    def __init__(self, coder: PlannedCoder, chunk_latents: int) -> None:
        self.coder, self.chunk_latents = coder, chunk_latents
        self.lookahead = coder.spec.time_stride - 1 if coder.rule.looks_ahead else 0
        self._pieces: Iterator[tuple[int, int]] = iter(())
        self._shown = self._read = self._latents = 0
        self._encoder_memory = self._decoder_memory = None

    def chunks(self, frames: int) -> list[int]:
        """Begins a video of so many frames, and ends the one before."""
        self._plan = plan = self.coder.plan(frames)
        stride, ends = self.coder.spec.time_stride, {}
        for latents in [*range(self.chunk_latents, plan.latents, self.chunk_latents), plan.latents]:
            ends[min(frames, shown(plan, stride, latents))] = latents
        lengths = [end - start for start, end in pairwise([0, *ends])]
        self._pieces = iter(list(zip(lengths, ends.values(), strict=True)))
        self._shown = self._read = self._latents = 0
        self._encoder_memory = self._decoder_memory = None
        return lengths

    def __call__(self, video: Tensor, *, sample: bool = False, generator: Generators = None) -> Reconstruction:
        """Raises ValueError for more pieces than `chunks` told, and for one that is too short."""
        frames, latents = next(self._pieces, (0, 0))
        height, width = video.shape[-2:]
        if not frames <= video.shape[2] <= frames + self.lookahead or not frames:
            raise ValueError(
                f"{video.shape[2]} frames came; by chunks() the next piece has {frames}, and at most {self.lookahead} "
                "of those after it"
            )
        z = self._encode(pad_space(video, self.coder.spec.space_stride), latents)
        rec, self._decoder_memory = self.coder.decode_planned(z, self._plan, self._latents, self._decoder_memory)
        self._shown, self._latents = self._shown + frames, latents
        return Reconstruction(rec[:, :, :frames, :height, :width], Delta(z), z)

    def _encode(self, video: Tensor, latents: int) -> Tensor:
        """Latents up to `latents`; video begins with the first frame that was not yet shown."""
        stride, plan = self.coder.spec.time_stride, self._plan
        wanted = sum(frames for _, _, frames in between(plan.encoder, stride, self._latents, latents))
        new = video[:, :, self._read - self._shown :]
        if not new.shape[2]:
            new = video[:, :, -1:]
        new = extend_time(new, wanted)[:, :, :wanted]
        self._read += wanted
        z, self._encoder_memory = self.coder.encode_planned(new, plan, self._latents, latents, self._encoder_memory)
        return z


def chunk_lengths(frames: int, chunk_latents: int, time_stride: int) -> list[int]:
    """Pieces of `chunk_latents` latents each: the first has 1 + n * time_stride frames, the last may be shorter."""
    size = chunk_latents * time_stride
    ends = [*range(size - time_stride + 1, frames, size), frames]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
