"""Reconstruct files in bounded memory: read a chunk, encode and decode it, write it, score it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from vae3d.data.batches.clips import ClipSettings, read_resized, resize_crop_params, to_video
from vae3d.data.decoding.images import is_sequence
from vae3d.data.decoding.readers import open_media
from vae3d.data.media import MediaError, MediaInfo, Reader, Size
from vae3d.data.storage.paths import is_stored, name_of
from vae3d.data.table.segments import WHOLE, Bounds, Segment
from vae3d.inference.pictures import scorable
from vae3d.inference.video import VideoWriter, video_suffix, write_image
from vae3d.metrics import MetricSet, VideoResult
from vae3d.models.interface import Stream
from vae3d.pixels import NotFiniteError, Quantized, as_unit, no_waiting_checks, quantize_unchecked
from vae3d.precision import autocast
from vae3d.seeding import generator_of
from vae3d.text import plural
from vae3d.transfer import on_host

if TYPE_CHECKING:
    from vae3d.config.schema import InferConfig

KINDS = ("ori", "rec", "spatial")  # folders <save_dir>_<kind> of outputs
SUFFIXES = (".mp4", ".mkv", ".png")  # of outputs
PAGES = ("report", "compare")  # folders <save_dir>_<kind> of pages; see inference.page and inference.comparison
MAX_STEM = 160  # bytes; with the row, suffixes and the affixes of temporary files, names have at most 255
Chunk = tuple[np.ndarray, int]  # frames [T, H, W, 3 or 4] uint8, of which the first so many are coded now; see Stream


@dataclass
class FileResult:
    """One reconstructed file, a row of index.csv.

    start: its first frame in the source. pad_*: frames at the end, rows below and columns on the right that the network
    needed; they are cut off again. enlarged: whether the source is smaller.
    """

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

    def facts(self) -> dict[str, str | float | bool]:
        """Everything but the scores."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "result"}

    def row(self) -> dict[str, str | float | bool | None]:
        return self.facts() | {column: score.value for column, score in self.result.scores.items()}


def identifier(row: int, source: str) -> str:
    """Name of a file's outputs: its row and its stem, without special characters and at most MAX_STEM bytes long.

    Numbered images get the names of their folders too, because these differ between rooms.
    """
    path = Path(name_of(source))
    stem = path.stem
    if is_sequence(path) and not is_stored(source):
        stem = "-".join([*path.parts[-4:-1], stem.replace("*", "").rstrip("_-")])
    stem = re.sub(r"[^\w.-]+", "-", stem).encode()[:MAX_STEM].decode(errors="ignore")
    return f"{row:06d}_{stem}"


def overflow_hint(precision: str) -> str:
    """Hint for NaN in fp32, bf16 or fp16."""
    if precision == "fp16":
        return "fp16 holds values up to 65504 only: use precision=bf16 or precision=fp32"
    return f"computed in {precision}; do the weights hold NaN?"


def read_chunks(reader: Reader, indices: Sequence[int], size: Size, stream: Stream) -> Iterator[Chunk]:
    """The chunks in which `stream` codes these frames, each with its lookahead, at `size`; each frame is read once."""
    buffer = np.empty((0, *size, 3), np.uint8)
    read = 0
    for length in stream.chunks(len(indices)):
        new = indices[read : read + length + stream.lookahead - len(buffer)]
        if new:
            frames = read_resized(reader, new, size)
            buffer = np.concatenate([buffer, frames]) if len(buffer) else frames
            read += len(new)
        yield buffer, length
        buffer = buffer[length:]


@dataclass(frozen=True)
class CodedChunk:
    """frames: [T, H, W, 3 or 4] uint8, as read. start: index of the first. decoded: kind -> frames."""

    frames: np.ndarray
    start: int
    decoded: dict[str, Quantized]

    def outputs(self) -> dict[str, np.ndarray]:
        """Kind -> [T, H, W, 3 or 4] uint8, from host memory. Raises NotFiniteError."""
        return {"ori": self.frames} | {kind: pixels.numpy(start=self.start) for kind, pixels in self.decoded.items()}


@dataclass
class Reconstructor:
    """Writes <save_dir>_ori, <save_dir>_rec and, for two-stage models, <save_dir>_spatial, coded by the inner 2D VAE.

    metrics: computed on the 8-bit pixels, before the codec. open_stream: (height, width, memory_gib) -> Stream.
    """

    model: nn.Module
    config: InferConfig
    metrics: MetricSet
    open_stream: Callable[[int, int, float | None], Stream]

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device

    def folder(self, kind: str) -> Path:
        return Path(f"{self.config.save_dir}_{kind}")

    def outputs(self, name: str) -> list[tuple[str, Path]]:
        """Kind and path of every output of a file that is there. name: see identifier."""
        paths = [(kind, self.folder(kind) / f"{name}{suffix}") for kind in KINDS for suffix in SUFFIXES]
        return [(kind, path) for kind, path in paths if path.is_file()]

    def file(self, source: str, row: int, bounds: Bounds = WHOLE) -> FileResult:
        """Reconstruct one file, or the part between two times; the selection then counts from the first.

        Raises MediaError if it cannot be read or the reconstruction has NaN; unfinished outputs are deleted.
        """
        self.metrics.reset()
        reader = self._open(source, bounds)
        try:
            info = reader.info
            indices, fps, target = self._select(source, info)
            stream = self._stream(source, target)
            chunks = read_chunks(reader, indices, target, stream)
            name = identifier(row, source)
            if info.fps:
                self._video(stream, chunks, name, fps, row)
            else:
                self._image(stream, chunks, name, row)
        except NotFiniteError as error:
            hint = overflow_hint(self.config.precision)
            raise MediaError(source, f"the model's pixels: {error.reason}; {hint}") from None
        finally:
            reader.close()
        (height, width), stride, source_size = target, self.model.spec.space_stride, info.size_to_scale(target)
        return FileResult(
            id=name,
            source=source,
            start=reader.first + indices[0],
            frames=len(indices),
            fps=fps,
            height=height,
            width=width,
            pad_frames=next(extra for extra in count() if self.model.frames_valid(len(indices) + extra)),
            pad_bottom=-height % stride,
            pad_right=-width % stride,
            enlarged=resize_crop_params(*source_size, target).size > source_size,
            result=self.metrics.result(),
        )

    def _open(self, source: str, bounds: Bounds) -> Segment:
        alpha = self.model.pixel_channels == 4
        return Segment(open_media(source, self.config.reader, threads=0, alpha=alpha), source, bounds)

    def first_chunk(self, source: str, bounds: Bounds = WHOLE) -> Tensor:
        """The first chunk of a file, [1, 3, T, H, W] in [-1, 1]. Raises MediaError."""
        with closing(self._open(source, bounds)) as reader:
            indices, _, target = self._select(source, reader.info)
            frames, length = next(read_chunks(reader, indices, target, self._stream(source, target)))
            return to_video(frames[:length], self.device)

    def read_head(self, source: str, bounds: Bounds, count: Callable[[int], int]) -> tuple[np.ndarray, float, int]:
        """The first of the selected frames, [T, H, W, 3] uint8; their rate (0 for an image); the number selected.

        count: number selected -> number to read. Raises MediaError.
        """
        with closing(self._open(source, bounds)) as reader:
            indices, fps, target = self._select(source, reader.info)
            return read_resized(reader, indices[: count(len(indices))], target), fps, len(indices)

    def _stream(self, source: str, target: Size) -> Stream:
        try:
            return self.open_stream(*target, self.config.memory_gib)
        except ValueError as error:
            raise MediaError(source, f"cannot be encoded at {target[0]}x{target[1]}: {error}") from error

    def _select(self, source: str, info: MediaInfo) -> tuple[list[int], float, Size]:
        """Indices, rate and size of the selected frames."""
        config = self.config
        thinning = ClipSettings(1, 1, config.stride, config.fps)  # the size does not matter here
        if config.start >= info.num_frames:
            raise MediaError(source, f"has {plural(info.num_frames, 'frame')}; start={config.start} is past its end")
        step = float(thinning.step(info.fps))
        available = int(thinning.length(info.num_frames - config.start, info.fps))
        wanted = available if config.num_frames is None else config.num_frames
        if wanted > available:
            raise MediaError(
                source, f"gives {plural(available, 'frame')} from start={config.start}; num_frames={wanted}"
            )
        indices = [config.start + int(i * step) for i in range(wanted)]
        return indices, info.fps / step, (config.height or info.height, config.width or info.width)

    def _video(self, stream: Stream, chunks: Iterator[Chunk], name: str, fps: float, row: int) -> None:
        writers: dict[str, VideoWriter] = {}
        with ExitStack() as stack:
            for coded in on_host(self._code(stream, chunks, row), self.device):
                outputs = coded.outputs()
                for kind, frames in outputs.items():
                    if kind not in writers:
                        file = f"{name}{video_suffix(frames.shape[-1])}"
                        writer = VideoWriter(self.folder(kind) / file, fps, self.config.codec)
                        writers[kind] = stack.enter_context(writer)
                    writers[kind].write(frames)
                self._score(outputs)

    def _image(self, stream: Stream, chunks: Iterator[Chunk], name: str, row: int) -> None:
        for coded in on_host(self._code(stream, islice(chunks, 1), row), self.device):
            outputs = coded.outputs()
            for kind, frames in outputs.items():
                write_image(self.folder(kind) / f"{name}.png", frames[0])
            self._score(outputs)

    @torch.inference_mode()
    def _code(self, stream: Stream, chunks: Iterator[Chunk], row: int) -> Iterator[CodedChunk]:
        """Encode and decode the chunks of file number `row`, without waiting for a GPU."""
        start = 0
        for index, (frames, length) in enumerate(chunks):
            video = to_video(frames, self.device)
            generator = generator_of(self.config.seed, row, index, device=self.device)
            with autocast(self.device, self.config.precision), no_waiting_checks(self.device):
                out = stream(video, sample=self.config.sample, generator=generator)
                if out.spatial is not None:
                    height, width = video.shape[-2:]
                    spatial = self.model.decode_spatial(out.spatial.latent)[..., :height, :width]
            decoded = {"rec": quantize_unchecked(out.video[0])}
            if out.spatial is not None:
                decoded["spatial"] = quantize_unchecked(spatial[0])
            yield CodedChunk(frames[:length], start, decoded)
            start += length

    def _score(self, outputs: dict[str, np.ndarray]) -> None:
        """Update the metrics with frames of a chunk."""
        self.metrics.update(*(as_unit(scorable(outputs[kind]), self.device) for kind in ("ori", "rec")))
