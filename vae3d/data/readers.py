"""Reading just the wanted frames of a video or image file, through PyAV or decord behind one interface.

Frames are [T, H, W, 3] uint8 RGB, turned and mirrored as the file's display matrix says. They are
numbered in the order in which a decoder puts them out.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from vae3d.data.dataset_rows import is_row, open_row
from vae3d.data.images import IMAGE_SUFFIXES, ImageReader, SequenceReader, image_info, is_sequence
from vae3d.data.media import MediaError, MediaInfo, Reader, Size, check_indices
from vae3d.data.video_index import BLOCK, FRAME, KEYS_BACK, FrameSource, VideoIndex, check_frame, open_index, to_rgb

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts"),
    *(".wmv", ".asf", ".flv", ".ogv", ".gif"),
)


def open_media(path: str | Path, reader: str = "auto", threads: int = 1) -> Reader:
    """Open a video or image, told apart by its extension, with a `*` in its name the images numbered so, or a row of
    a dataset (see dataset_rows).

    reader: pyav, decord, or auto: pyav, which reads everything that decord does, faster. threads: for decoding.
    Raises MediaError if it is missing, empty, not what its extension says,
    or holds what cannot be decoded faithfully.
    """
    path = Path(path)
    if is_row(path):
        return ImageReader(path, open_row(path))
    if is_sequence(path):
        return SequenceReader(path)
    _require_file(path)
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return ImageReader(path)
    if suffix not in VIDEO_SUFFIXES:
        raise MediaError(path, f"unknown extension {suffix!r}; known: {' '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}")
    return READERS[reader](path, threads)


def media_info(path: str | Path) -> MediaInfo:
    """Facts of what open_media takes; of an image from its header, in 50 microseconds. Raises MediaError."""
    path = Path(path)
    if is_row(path):
        return image_info(path, open_row(path))
    if is_image(path):
        _require_file(path)
        return image_info(path)
    with closing(open_media(path)) as reader:
        return reader.info


def is_image(path: str | Path) -> bool:
    """Whether open_media takes it for a single image."""
    return is_row(path) or (str(path).lower().endswith(IMAGE_SUFFIXES) and not is_sequence(path))


def _require_file(path: Path) -> None:
    if not os.path.exists(path):  # False, and no error, of a name that is too long
        raise MediaError(path, "no such file")
    if not os.path.isfile(path):
        raise MediaError(
            path, "is a folder, not a file" if os.path.isdir(path) else "is a pipe or a device, not a file"
        )
    if path.stat().st_size == 0:
        raise MediaError(path, "is empty (0 bytes)")


class VideoReader(Reader, Protocol):
    times: np.ndarray  # [frames] seconds since the first frame


class PyAVReader:
    """Reads the packets of the wanted frames from the key frame before them on, wherever they lie in the file.

    The index of the file comes from the cache; see video_index. Raises MediaError.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.path = path
        self.index = open_index(path)
        self.header, self.info = self.index.header, self.index.header.info
        self._source = FrameSource(path, self.index, threads)
        self._convert = VideoReformatter()
        self._rows, self._block = np.empty(0, FRAME), 0  # a part of the index, and where it begins
        self._restart(self.header.first)
        self._last: tuple[int, np.ndarray] | None = None  # number and pixels of the frame that was read last

    @property
    def times(self) -> np.ndarray:
        return self.index.times()

    def read(self, indices: Sequence[int], size: Size | None = None) -> np.ndarray:
        check_indices(self.path, indices, self.info.num_frames)
        frames = {i: self._upright(self._pixels(i), size) for i in sorted(set(indices))}
        return np.stack([frames[i] for i in indices])

    def close(self) -> None:
        self._run = iter(())
        self._source.close()
        self.index.close()

    def _pixels(self, index: int) -> np.ndarray:
        """[H, W, 3] uint8 of a frame as stored."""
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        frame = self._frame(index)
        check_frame(self.path, frame, index, self.header.stored)
        self._last = index, to_rgb(self.path, frame, self._convert)
        return self._last[1]

    def _frame(self, index: int) -> VideoFrame:
        """Decode on from the last frame if that is the shorter way, else from where the index says; if the frame does
        not come out whole from there, as where a picture is refreshed bit by bit, from key frames before that."""
        packet, start = self._row(index)
        behind = self._last is not None and self._last[0] < index
        if not behind or start > self._fed + 1:
            self._restart(start)
        problem = f"is damaged: frame {index} of {self.info.num_frames} does not decode"
        for earlier in itertools.chain([None], self._keys_before(start)):
            if earlier is not None:
                self._restart(earlier)
            try:
                frame = self._find(packet)
            except MediaError as error:
                problem = error.reason
            else:
                if frame is not None and not frame.is_corrupt:
                    return frame
        raise MediaError(self.path, problem)

    def _find(self, packet: int) -> VideoFrame | None:
        """The frame that comes from a packet, if it comes out."""
        while True:
            while self._waiting:
                number, frame = self._waiting.popleft()
                if number == packet:
                    return frame
            fed = next(self._run, None)
            if fed is None or self._fed > packet + self.header.late:
                return None
            self._fed, frames = fed
            self._waiting.extend(frames)

    def _restart(self, packet: int) -> None:
        self._run, self._fed = self._source.decode(packet), packet - 1  # which packet was decoded last
        self._waiting: deque[tuple[int, VideoFrame]] = deque()
        self._last = None

    def _row(self, index: int) -> tuple[int, int]:
        if not self._block <= index < self._block + len(self._rows):
            self._rows, self._block = self.index.rows("frames", index, BLOCK), index
        return self._rows[index - self._block].tolist()

    def _keys_before(self, packet: int) -> Iterator[int]:
        keys = np.flatnonzero(self.index.rows("packets", 0, packet)["key"])
        yield from keys[keys >= self.header.first][: -KEYS_BACK - 1 : -1].tolist()

    def _upright(self, pixels: np.ndarray, size: Size | None) -> np.ndarray:
        exchange, rows, columns = self.header.orientation
        if exchange:
            pixels = pixels.swapaxes(0, 1)
        pixels = pixels[:: -1 if rows else 1, :: -1 if columns else 1]
        return pixels if size is None else resize(pixels, size)


class DecordReader:
    """decord, which decodes batches in C++; its last release is of 2021. Refuses what it would decode wrongly."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        import decord

        with closing(PyAVReader(path)) as reader:  # knows what decord does not, and refuses what both must refuse
            _check_for_decord(path, reader.index)
            self.info, self.times = reader.info, reader.times
        try:
            self.video = decord.VideoReader(str(path), num_threads=threads)
        except (decord.DECORDError, RuntimeError) as error:
            raise MediaError(path, f"decord cannot open it: {_one_line(error)}") from error
        self.path, self.error = path, decord.DECORDError
        if len(self.video) != self.info.num_frames:
            raise MediaError(path, f"decord counts {len(self.video)} frames, its packets {self.info.num_frames}")

    def read(self, indices: Sequence[int], size: Size | None = None) -> np.ndarray:
        check_indices(self.path, indices, self.info.num_frames)
        try:
            frames = self.video.get_batch(list(indices)).asnumpy()
        except (self.error, RuntimeError) as error:
            raise MediaError(self.path, f"decord cannot decode it: {_one_line(error)}") from error
        return np.stack([resize(frame, size or (self.info.height, self.info.width)) for frame in frames])

    def close(self) -> None:
        del self.video


def _check_for_decord(path: Path, index: VideoIndex) -> None:
    header = index.header
    reordered = (np.diff(index.rows("frames")["packet"].astype(int)) < 0).any()
    stored = VideoFormat(header.info.pixels, *header.stored[::-1])
    unordered = (np.diff(index.times()) <= 0).any()
    if header.info.bits > 8:
        reason = f"has {header.info.bits} bits per channel, which decord turns into other colours"
    elif any(side % 2 for side in header.stored) and stored.chroma_width() < stored.width:
        reason = "has an odd number of rows or columns, of which decord gives other colours"
    elif header.first or not header.contiguous or unordered or (header.ordered != "times" and reordered):
        reason = f"has no reliable timestamps ({header.container}), so that decord gives wrong frames"
    elif header.open_gop:
        reason = "has open groups of pictures, of which decord gives wrong frames"
    elif sum(header.orientation) % 2:
        reason = "is mirrored, which decord ignores"
    else:
        return
    raise MediaError(path, f"{reason}; use reader=pyav")


READERS: dict[str, Callable[[Path, int], Reader]] = {"auto": PyAVReader, "pyav": PyAVReader, "decord": DecordReader}


def resize(frame: np.ndarray, size: Size) -> np.ndarray:
    """[H, W, 3] uint8 -> size, bicubic and antialiased: as Pillow does to within one level, but faster."""
    if frame.shape[:2] == tuple(size):
        return frame
    planes = torch.from_numpy(np.require(frame, requirements=["C", "W"])).permute(2, 0, 1)[None]
    scaled = F.interpolate(planes, tuple(size), mode="bicubic", align_corners=False, antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
