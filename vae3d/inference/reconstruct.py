"""Reconstructing files in bounded memory: read a chunk, code it, write it, score it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vae3d.data.clips import to_tensor
from vae3d.data.images import is_sequence
from vae3d.data.readers import MediaError, MediaInfo, Reader, Size, open_media
from vae3d.data.segments import WHOLE, Bounds, Segment
from vae3d.data.transforms import resize_crop_params
from vae3d.inference.video import VideoWriter, write_image
from vae3d.metrics import MetricSet, VideoResult
from vae3d.models.interface import Stream
from vae3d.pixels import NotFiniteError, as_unit, to_uint8
from vae3d.seeding import generator_of
from vae3d.types import Reconstruction

KINDS = ("ori", "rec", "spatial", "compare")  # of folders; compare: see inference.comparison
Piece = tuple[np.ndarray, int]  # frames of a video, [T, H, W, 3] uint8, and how many of them are to be coded now


@dataclass(frozen=True)
class Selection:
    """Which frames of a file, at which size.

    height, width: resize and centre-crop, or None for the file's own size. fps: thin faster videos out to this
    rate.
    """

    start: int = 0
    num_frames: int | None = None
    stride: int = 1
    fps: float | None = None
    height: int | None = None
    width: int | None = None
    reader: str = "auto"


@dataclass
class Done:
    """One reconstructed file, as index.csv tells of it. start: its first frame in the source. pad_*: frames
    behind, rows below and columns right that the network needed and that were cut off again. enlarged: whether the
    source has fewer pixels a side."""

    id: str
    source: str
    start: int
    frames: int
    fps: float
    height: int
    width: int
    pad_frames: int
    pad_bottom: int
    pad_right: int
    enlarged: bool
    result: VideoResult

    def row(self) -> dict[str, str | float | bool | None]:
        facts = {fact.name: getattr(self, fact.name) for fact in fields(self) if fact.name != "result"}
        return facts | {column: score.value for column, score in self.result.scores.items()}


def identifier(row: int, source: str) -> str:
    """Name of a file's outputs: its row and its stem (of numbered images with their folders, since these tell rooms
    apart), with what a file name should not hold replaced."""
    path = Path(source)
    stem = path.stem
    if is_sequence(path):
        stem = "-".join([*path.parts[-4:-1], stem.replace("*", "").rstrip("_-")])
    stem = re.sub(r"[^\w.-]+", "-", stem)
    return f"{row:06d}_{stem}"


def overflow_hint(precision: str) -> str:
    """What to do about NaN, computed in a precision such as fp16 or torch.float16."""
    if precision in ("fp16", "torch.float16"):
        return "fp16 holds values up to 65504 only: use precision=bf16 or precision=fp32"
    return f"computed in {precision}; do the weights hold NaN?"


class Reconstructor:
    """Writes <prefix>_ori, _rec and, for two-stage models, _spatial: what the inner 2D VAE alone would give.

    sample: draw latents (seeded by `seed` and the file's row) instead of taking the posterior's mode.
    dtype: of autocast, or None for fp32. codec: see inference.video. metrics: scored on the 8-bit pixels, before
    any codec. memory_gib: about what a streaming model may take, beside its weights. open_stream:
    what codes a video, by default the model's own stream.
    """

    def __init__(
        self,
        model: nn.Module,
        prefix: str,
        selection: Selection,
        *,
        codec: str = "lossless",
        sample: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        metrics: MetricSet | None = None,
        memory_gib: float | None = None,
        open_stream: Callable[[int, int, float | None], Stream] | None = None,
    ) -> None:
        self.model, self.prefix, self.selection = model, prefix, selection
        self.codec, self.sample, self.seed, self.dtype = codec, sample, seed, dtype
        self.metrics = metrics or MetricSet([])
        self.memory_gib, self.open_stream = memory_gib, open_stream or model.stream
        self.device = next(model.parameters()).device

    def folder(self, kind: str) -> Path:
        return Path(f"{self.prefix}_{kind}")

    def file(self, source: str, row: int, bounds: Bounds = WHOLE) -> Done:
        """Reconstruct one file, or the part of it between two times, which all that selects frames counts from.

        Raises MediaError if it cannot be read, or if the model makes NaN of it; nothing half-written is left.
        """
        self.metrics.reset()
        reader = self._open(source, bounds)
        try:
            info = reader.info
            indices, fps, target = self._wanted(source, info)
            stream = self._stream(source, target)
            chunks = self._chunks(reader, indices, target, stream)
            name = identifier(row, source)
            if info.fps:
                self._video(stream, chunks, name, fps, row)
            else:
                self._image(stream, chunks, name, row)
        except NotFiniteError as error:
            hint = overflow_hint(str(self.dtype or torch.float32))
            raise MediaError(source, f"the model's pixels: {error.reason}; {hint}") from None
        finally:
            reader.close()
        stride = self.model.spec.space_stride
        padding = (self._pad_frames(len(indices)), -target[0] % stride, -target[1] % stride)
        first, result = reader.first + indices[0], self.metrics.result()
        size = info.size_to_scale(target)
        enlarged = resize_crop_params(*size, target).size > size
        return Done(name, source, first, len(indices), fps, *target, *padding, enlarged, result)

    def _pad_frames(self, frames: int) -> int:
        return next(more for more in count() if self.model.frames_valid(frames + more))

    def _open(self, source: str, bounds: Bounds) -> Segment:
        return Segment(open_media(source, self.selection.reader, threads=0), source, bounds)

    def first_chunk(self, source: str, bounds: Bounds = WHOLE) -> Tensor:
        """What the network gets first of a file, [1, 3, T, H, W] in [-1, 1]. Raises MediaError."""
        with closing(self._open(source, bounds)) as reader:
            indices, _, target = self._wanted(source, reader.info)
            stream = self._stream(source, target)
            frames, length = next(self._chunks(reader, indices, target, stream))
            return self.to_video(frames[:length])

    def opening(self, source: str, bounds: Bounds, count: Callable[[int], int]) -> tuple[np.ndarray, float, int]:
        """The first frames of those that a file is reconstructed from, [T, H, W, 3] uint8, their rate (0 of an image),
        and how many there are. count: from that to how many are wanted. Raises MediaError."""
        with closing(self._open(source, bounds)) as reader:
            indices, fps, target = self._wanted(source, reader.info)
            crop = resize_crop_params(*reader.info.size_to_scale(target), target)
            return crop.crop(reader.read(indices[: count(len(indices))], crop.size)), fps, len(indices)

    def _stream(self, source: str, target: Size) -> Stream:
        try:
            return self.open_stream(*target, self.memory_gib)
        except ValueError as error:
            raise MediaError(source, f"cannot be coded at {target[0]}x{target[1]}: {error}") from error

    def _wanted(self, source: str, info: MediaInfo) -> tuple[list[int], float, Size]:
        """Which frames, at which rate and size."""
        indices, fps = self._frames(source, info.num_frames, info.fps)
        return indices, fps, (self.selection.height or info.height, self.selection.width or info.width)

    def _chunks(self, reader: Reader, indices: list[int], target: Size, stream: Stream) -> Iterator[Piece]:
        """Every piece of the stream, with the frames after it that the stream wants to see; none is read twice."""
        crop = resize_crop_params(*reader.info.size_to_scale(target), target)
        held, read = np.empty((0, *target, 3), np.uint8), 0
        for length in stream.chunks(len(indices)):
            new = indices[read : read + length + stream.lookahead - len(held)]
            if new:
                frames = crop.crop(reader.read(new, crop.size))
                held = np.concatenate([held, frames]) if len(held) else frames
                read += len(new)
            yield held, length
            held = held[length:]

    def to_video(self, frames: np.ndarray) -> Tensor:
        """[T, H, W, 3] uint8 -> [1, 3, T, H, W] in [-1, 1], on the model's device."""
        return to_tensor(frames)[None].to(self.device).float() / 127.5 - 1.0

    def _frames(self, source: str, count: int, fps: float) -> tuple[list[int], float]:
        """Numbers of the wanted frames and their rate."""
        chosen = self.selection
        step = chosen.stride * (max(1.0, fps / chosen.fps) if chosen.fps and fps else 1.0)
        if chosen.start >= count:
            raise MediaError(source, f"has {count} frames; start={chosen.start} is behind its end")
        possible = math.ceil((count - chosen.start) / step)
        wanted = possible if chosen.num_frames is None else chosen.num_frames
        if wanted > possible:
            raise MediaError(source, f"gives {possible} frames from start={chosen.start}; num_frames={wanted}")
        return [chosen.start + int(i * step) for i in range(wanted)], fps / step

    def _video(self, stream: Stream, chunks: Iterator[Piece], name: str, fps: float, row: int) -> None:
        writers: dict[str, VideoWriter] = {}
        try:
            done = 0
            for number, chunk in enumerate(chunks):
                for kind, frames in self._code(stream, chunk, row, number, done).items():
                    if kind not in writers:
                        writers[kind] = VideoWriter(self.folder(kind) / f"{name}.mp4", fps, self.codec)
                    writers[kind].write(frames)
                done += chunk[1]
            for writer in writers.values():
                writer.close()
        finally:
            for writer in writers.values():
                writer.abandon()

    def _image(self, stream: Stream, chunks: Iterator[Piece], name: str, row: int) -> None:
        for kind, frames in self._code(stream, next(chunks), row, 0, 0).items():
            write_image(self.folder(kind) / f"{name}.png", frames[0])

    @torch.inference_mode()
    def _code(self, stream: Stream, piece: Piece, row: int, number: int, start: int) -> dict[str, np.ndarray]:
        """8-bit frames of every kind, and their scores added to the metrics. start: number of the first frame.

        Raises NotFiniteError.
        """
        frames, length = piece
        video = self.to_video(frames)
        generator = generator_of(self.seed, row, number, device=self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            out = stream(video, sample=self.sample, generator=generator)
            spatial = self._spatial(out, video)
        coded = {"ori": frames[:length], "rec": to_uint8(out.video[0], start=start)}
        if spatial is not None:
            coded["spatial"] = to_uint8(spatial[0], start=start)
        self.metrics.update(as_unit(coded["ori"], self.device), as_unit(coded["rec"], self.device))
        return coded

    def _spatial(self, out: Reconstruction, video: Tensor) -> Tensor | None:
        if out.spatial is None:
            return None
        height, width = video.shape[-2:]
        return self.model.decode_spatial(out.spatial.latent)[..., :height, :width]
