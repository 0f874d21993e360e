"""Reading single frames of a video or image file, with PyAV, decord or torchcodec.

Frames are [T, H, W, 3] uint8 RGB, rotated and mirrored by the file's display matrix. Their indices count in the order
in which a decoder returns them.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from PIL import Image
from torch import Tensor

from vae3d.data.decoding.frame_source import KEYS_BACK, FrameSource, Wanted
from vae3d.data.decoding.frames import check_frame, has_alpha, to_rgb
from vae3d.data.decoding.images import (
    IMAGE_SUFFIXES,
    ImageReader,
    SequenceReader,
    image_info,
    is_sequence,
    resize_image,
)
from vae3d.data.decoding.kept_sources import keep_source, open_frame_source
from vae3d.data.decoding.video_index import VideoIndex
from vae3d.data.media import DataError, MediaError, MediaInfo, Reader, Size, check_indices, stat_reason
from vae3d.data.storage.files import FileRange, RangeFile, local_range, size_and_version
from vae3d.data.storage.paths import HF_IMAGE, HF_VIDEO, is_stored, suffix_of
from vae3d.text import one_line, plural

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts"),
    *(".wmv", ".asf", ".flv", ".ogv", ".gif"),
)
MAX_REORDER = 16  # frames that are shown later and decoded earlier than a frame, of any codec
AT_ONCE = 32  # frames that torchcodec decodes at full size before they are resized


def open_media(path: str | Path, reader: str = "auto", threads: int = 1, alpha: bool | None = False) -> Reader:
    """Open a video or image by its extension, or an image sequence (`*` in the name).

    path: a local file, a URL, a member of a tar, or a row of a dataset (see storage/paths.py).

    reader: pyav, decord, torchcodec, torchcodec_cuda, or auto, which is pyav: it reads all that the others read, and
    measures faster than those of the CPU (docs/speed.md). threads: for decoding.
    alpha: read colours and alpha, [T, H, W, 4], not premultiplied; None: if the file has alpha (see Reader.alpha).
    Raises MediaError if the file is missing, empty, not what its extension says, or cannot be decoded faithfully, and
    StorageError if a store does not answer.
    """
    if not is_stored(path):
        path = Path(path)
    if is_sequence(path):
        return SequenceReader(path, alpha)
    _require_file(path)
    suffix = suffix_of(path)
    if suffix in (*IMAGE_SUFFIXES, HF_IMAGE):
        return ImageReader(path, alpha=alpha)
    if suffix not in (*VIDEO_SUFFIXES, HF_VIDEO):
        raise MediaError(path, f"unknown extension {suffix!r}; known: {' '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}")
    return READERS[reader](path, threads, alpha)


def open_pair(first: str | Path, second: str | Path, threads: int = 1) -> tuple[Reader, Reader]:
    """Readers of two files that are compared: of RGBA if both have alpha, else of RGB.

    Raises MediaError as open_media does, also if one of them alone has transparent pixels.
    """
    readers: list[Reader] = []
    try:
        for path in (first, second):
            readers.append(open_media(path, threads=threads, alpha=None))
        if readers[0].alpha != readers[1].alpha:
            lone = 0 if readers[0].alpha else 1
            readers[lone].close()
            readers[lone] = open_media((first, second)[lone], threads=threads)
    except MediaError:
        for reader in readers:
            reader.close()
        raise
    return readers[0], readers[1]


def media_info(path: str | Path) -> MediaInfo:
    """Metadata of what open_media opens; of an image from its header, in 50 microseconds. Raises MediaError, though not
    for transparent pixels."""
    if not is_stored(path):
        path = Path(path)
    if is_image(path):
        _require_file(path)
        return image_info(path)
    with closing(open_media(path, alpha=None)) as reader:
        return reader.info


def is_image(path: str | Path) -> bool:
    """Whether open_media opens it as a single image."""
    text = str(path).lower()
    suffix = suffix_of(text) if "?" in text else text  # the query of a URL follows the name
    return suffix.endswith((*IMAGE_SUFFIXES, HF_IMAGE)) and not is_sequence(path)


def is_media(name: str | Path) -> bool:
    """Whether a name has the extension of a video or an image."""
    return suffix_of(name) in VIDEO_SUFFIXES + IMAGE_SUFFIXES


def _require_file(path: str | Path) -> None:
    if is_stored(path):
        if size_and_version(path)[0] == 0:
            raise MediaError(path, "is empty (0 bytes)")
        return
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: the name has the character NUL
        raise MediaError(path, stat_reason(path, error)) from error
    if not S_ISREG(found.st_mode):
        kind = "a folder" if S_ISDIR(found.st_mode) else "a pipe or a device"
        raise MediaError(path, f"is {kind}, not a file")
    if found.st_size == 0:
        raise MediaError(path, "is empty (0 bytes)")


class PyAVReader:
    """Decodes from the key frame before a frame, anywhere in the file. See video_index. Raises MediaError."""

    def __init__(self, path: str | Path | FileRange, threads: int = 1, alpha: bool | None = False) -> None:
        self.path = path
        self._source: FrameSource | None = open_frame_source(path, threads)
        self.index = self._source.index
        self.header, self.info, self.times = self.index.header, self.index.header.info, self.index.times
        stores_alpha = has_alpha(VideoFormat(self.info.pixels))
        self.alpha = stores_alpha if alpha is None else alpha
        self._convert = VideoReformatter()
        self._failed = False
        self._wanted = Wanted()
        self._read_to = len(self.index.frames)  # the last frame of the last read; no read goes on from here
        self._last: tuple[int, np.ndarray] | None = None  # index and pixels of the last frame
        self._restart(self.header.first)
        if not self.alpha and stores_alpha:
            try:
                self._pixels(0)  # raises for transparent pixels
            except MediaError:
                self.close()
                raise

    def read(self, indices: Sequence[int], size: Size | None = None) -> np.ndarray:
        check_indices(self.path, indices, self.info.num_frames)
        self._want(indices)
        frames = {i: self._upright(self._pixels(i), size) for i in sorted(set(indices))}
        return np.stack([frames[i] for i in indices])

    def _want(self, indices: Sequence[int]) -> None:
        """Set the frames that must not be skipped: these, and where the caller reads on, the frames after them whose
        packets come before the last of these. If one was skipped, the next read would decode from the key frame."""
        packets = self.index.frames["packet"]
        wanted = packets[np.asarray(indices, dtype=int)]
        if len(indices) and min(indices) > self._read_to:
            after = packets[max(indices) + 1 : max(indices) + 1 + MAX_REORDER]
            wanted = np.concatenate([wanted, after[after < wanted.max()]])
        self._read_to = max(indices, default=self._read_to)
        self._wanted.set(wanted.tolist())

    def close(self) -> None:
        """Keep the file open for the next reader of it, unless something failed."""
        self._decoding = iter(())
        source, self._source = self._source, None
        if source is None:
            return
        if self._failed:
            source.close()
        else:
            keep_source(source)

    def _pixels(self, index: int) -> np.ndarray:
        """[H, W, 3 or 4] uint8 of a frame as stored."""
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        frame = self._frame(index)
        check_frame(self.path, frame, index, self.header.stored)
        self._last = index, to_rgb(self.path, frame, self._convert, self.alpha)
        return self._last[1]

    def _frame(self, index: int) -> VideoFrame:
        """Continue decoding from the last frame if that is shorter, else start where the index says.

        If the frame is incomplete, as with periodic intra refresh, retry from earlier key frames.
        """
        packet, start = self.index.frames[index].tolist()
        is_ahead = self._last is not None and self._last[0] < index and packet not in self._wanted.skipped
        if not is_ahead or start > self._decoded + 1:
            self._restart(start)
        reason = f"is damaged: frame {index} of {self.info.num_frames} does not decode"
        for earlier in itertools.chain([None], self._starts_to_retry(start)):
            if earlier is not None:
                self._wanted.set(None)
                self._restart(earlier, fresh=True)
            try:
                frame = self._decode_until(packet)
            except MediaError as error:
                reason = error.reason
            else:
                if frame is not None and not frame.is_corrupt:
                    return frame
        self._failed = True
        raise MediaError(self.path, reason)

    def _decode_until(self, packet: int) -> VideoFrame | None:
        """Decode on until the frame of `packet` comes out; None if it does not."""
        while True:
            while self._pending:
                number, frame = self._pending.popleft()
                if number == packet:
                    return frame
            step = next(self._decoding, None)
            if step is None or self._decoded > packet + self.header.max_delay:
                return None
            self._decoded, frames = step
            self._pending.extend(frames)

    def _restart(self, packet: int, fresh: bool = False) -> None:
        """Start decoding at `packet`. fresh: with a new decoder."""
        self._wanted.skipped.clear()
        self._decoding = self._source.decode(packet, self._wanted, fresh)
        self._decoded = packet - 1  # the last decoded packet
        self._pending: deque[tuple[int, VideoFrame]] = deque()  # decoded frames, with the numbers of their packets
        self._last = None

    def _starts_to_retry(self, packet: int) -> Iterator[int]:
        """`packet` again, if frames were skipped or the decoder was not new; then earlier key packets."""
        if self._wanted.skipped or self._source.reused:
            yield packet
        keys = np.flatnonzero(self.index.packets["key"][:packet])
        yield from keys[keys >= self.header.first][: -KEYS_BACK - 1 : -1].tolist()

    def _upright(self, pixels: np.ndarray, size: Size | None) -> np.ndarray:
        transpose, flip_rows, flip_columns = self.header.orientation
        if transpose:
            pixels = pixels.swapaxes(0, 1)
        pixels = pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
        return pixels if size is None else resize(pixels, size)


class DecordReader:
    """decord (last release: 2021). Raises MediaError for files that it would decode wrongly."""

    alpha = False

    def __init__(self, path: str | Path | FileRange, threads: int = 1, alpha: bool | None = False) -> None:
        decord = _decord()
        self.path, self.error = path, decord.DECORDError
        self.info, self.times = _checked(path, "decord", alpha)
        try:
            self.video = decord.VideoReader(_file_for_library(path), num_threads=threads)
        except (decord.DECORDError, RuntimeError) as error:
            raise MediaError(path, f"decord cannot open it: {one_line(error, 200)}") from error
        _check_count(path, "decord", len(self.video), self.info)

    def read(self, indices: Sequence[int], size: Size | None = None) -> np.ndarray:
        check_indices(self.path, indices, self.info.num_frames)
        try:
            frames = self.video.get_batch(list(indices)).asnumpy()
        except (self.error, RuntimeError) as error:
            raise MediaError(self.path, f"decord cannot decode it: {one_line(error, 200)}") from error
        return np.stack([resize(frame, size or (self.info.height, self.info.width)) for frame in frames])

    def close(self) -> None:
        del self.video


class TorchcodecReader:
    """torchcodec, which reads all packets of a file when it opens it.

    device: "cuda" decodes on the GPU (NVDEC), converts to RGB and resizes there, and copies the frames to the host. Its
    colours differ from the CPU's by rounding, and by how chroma is enlarged. Files that NVDEC does not decode, as those
    of 4:4:4, are decoded on the CPU, with a warning.
    Raises MediaError for files whose frames it may return wrongly, and DataError if it is not installed or, for "cuda",
    if there is no GPU or the process is a fork.
    """

    alpha = False

    def __init__(
        self, path: str | Path | FileRange, threads: int = 1, alpha: bool | None = False, device: str = "cpu"
    ) -> None:
        decoder = _torchcodec(device)
        self.path, self.device = path, torch.device(device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # of this rank, in workers too
        self.info, self.times = _checked(path, "torchcodec", alpha)
        options = {"num_ffmpeg_threads": threads, "seek_mode": "exact", "dimension_order": "NHWC"}
        try:
            self.video = decoder(_file_for_library(path), device=self.device, **options)
        except (RuntimeError, ValueError) as error:
            raise MediaError(path, f"torchcodec cannot open it: {one_line(error, 200)}") from error
        _check_count(path, "torchcodec", len(self.video), self.info)

    def read(self, indices: Sequence[int], size: Size | None = None) -> np.ndarray:
        check_indices(self.path, indices, self.info.num_frames)
        size, parts = size or (self.info.height, self.info.width), []
        for first in range(0, len(indices), AT_ONCE):
            try:
                frames = self.video.get_frames_at([int(index) for index in indices[first : first + AT_ONCE]]).data
            except (RuntimeError, ValueError, IndexError) as error:
                raise MediaError(self.path, f"torchcodec cannot decode it: {one_line(error, 200)}") from error
            if self.device.type == "cuda":
                parts.append(resize_on_gpu(frames, size).cpu().numpy())
            else:
                parts += [resize(frame, size)[None] for frame in frames.numpy()]
        if self.device.type == "cuda" and (fallback := getattr(self.video, "cpu_fallback", None)):
            warnings.warn(f"reader=torchcodec_cuda decodes {self.path} on the CPU: {fallback}", stacklevel=2)
        return np.concatenate(parts)

    def close(self) -> None:
        del self.video


def check_reader(reader: str) -> None:
    """Raise DataError if a reader cannot work here: its package does not load, or it needs a GPU."""
    if reader == "decord":
        _decord()
    elif reader.startswith("torchcodec"):
        _torchcodec("cuda" if decodes_on_gpu(reader) else "cpu")


def decodes_on_gpu(reader: str) -> bool:
    """Whether a reader uses CUDA, which forked processes cannot: its workers must be spawned."""
    return reader == "torchcodec_cuda"


def _decord() -> ModuleType:
    """Raises DataError if decord does not load."""
    try:
        import decord
    except (ImportError, OSError) as error:
        raise DataError(
            f"reader=decord needs decord: pip install decord. reader=pyav needs nothing. ({one_line(error, 200)})"
        ) from error
    return decord


def _torchcodec(device: str) -> Callable[..., Any]:
    """torchcodec's VideoDecoder. Raises DataError if it does not load, or cannot use the device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("reader=torchcodec_cuda needs an NVIDIA GPU, and PyTorch finds none here; use reader=auto")
    if device == "cuda" and torch.cuda._is_in_bad_fork():
        raise DataError(
            "reader=torchcodec_cuda cannot decode in a forked process: CUDA was in use before the fork; start the "
            "process with spawn, or read in the main process"
        )
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: there are no libraries of FFmpeg
        raise DataError(
            f"reader=torchcodec needs torchcodec for your version of torch, and the shared libraries of FFmpeg: "
            f"pip install torchcodec; apt install ffmpeg. reader=pyav needs neither. ({one_line(error, 200)})"
        ) from error
    return VideoDecoder


def _file_for_library(path: str | Path | FileRange) -> str | RangeFile:
    """The name of a file; a file object for a range of one, a URL or a member of a tar. decord reads a file object as a
    whole."""
    if isinstance(path, FileRange):
        return path.open()
    return local_range(path).open() if is_stored(path) else str(path)


def _checked(path: str | Path, library: str, alpha: bool | None) -> tuple[MediaInfo, np.ndarray | None]:
    """Metadata and times of a file, after checks that the library lacks. Raises MediaError."""
    if alpha:
        raise MediaError(path, f"{library} reads no alpha; use reader=pyav")
    with closing(PyAVReader(path)) as reader:
        _check_for(library, path, reader.index)
        return reader.info, reader.times


def _check_count(path: str | Path, library: str, frames: int, info: MediaInfo) -> None:
    if frames != info.num_frames:
        raise MediaError(path, f"{library} counts {plural(frames, 'frame')}, its packets {info.num_frames}")


def _check_for(library: str, path: str | Path, index: VideoIndex) -> None:
    """Raise MediaError for a file that decord or torchcodec may decode wrongly."""
    header = index.header
    # Frames of an open group of pictures need packets before the key frame in front of them.
    keys = np.maximum.accumulate(np.where(index.packets["key"], np.arange(len(index.packets)), header.first))
    open_gop = header.ordered != "counted" and (keys[index.frames["packet"]] != index.frames["start"]).any()
    reordered = (np.diff(index.frames["packet"].astype(int)) < 0).any()
    stored = VideoFormat(header.info.pixels, *header.stored[::-1])
    unordered = index.times is not None and (np.diff(index.times) <= 0).any()
    if header.info.bits > 8:
        reason = f"has {header.info.bits} bits per channel, which {library} converts to wrong colours"
    elif any(side % 2 for side in header.stored) and stored.chroma_width() < stored.width:
        reason = f"has an odd number of rows or columns, which {library} converts to wrong colours"
    elif header.first or index.seek is not None or unordered or (header.ordered != "times" and reordered):
        reason = f"has no reliable timestamps ({header.container}); {library} returns wrong frames"
    elif open_gop:
        reason = f"has open groups of pictures; {library} returns wrong frames"
    elif sum(header.orientation) % 2:
        reason = f"is mirrored, which {library} ignores"
    else:
        return
    raise MediaError(path, f"{reason}; use reader=pyav")


READERS: dict[str, Callable[[str | Path, int, bool | None], Reader]] = {
    "auto": PyAVReader,
    "pyav": PyAVReader,
    "decord": DecordReader,
    "torchcodec": TorchcodecReader,
    "torchcodec_cuda": partial(TorchcodecReader, device="cuda"),
}


def resize(frame: np.ndarray, size: Size) -> np.ndarray:
    """[H, W, C] uint8 -> size, bicubic and antialiased: within one level of Pillow's result, and faster.

    Of RGBA Pillow's own, which weights colours by their alpha.
    """
    if frame.shape[:2] == tuple(size):
        return frame
    if frame.shape[2] == 4:
        return np.asarray(resize_image(Image.fromarray(frame, "RGBA"), size))
    planes = torch.from_numpy(np.require(frame, requirements=["C", "W"])).permute(2, 0, 1)[None]
    scaled = F.interpolate(planes, tuple(size), mode="bicubic", align_corners=False, antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


def resize_on_gpu(frames: Tensor, size: Size) -> Tensor:
    """[T, H, W, 3] uint8 -> size, by the filter of resize, which rounds and clips between rows and columns."""
    if frames.shape[1:3] == tuple(size):
        return frames
    scaled = []
    for frame in frames:  # one by one: float32 takes four times the memory
        planes = frame.permute(2, 0, 1)[None].float()
        scaled.append(F.interpolate(planes, tuple(size), mode="bicubic", align_corners=False, antialias=True)[0])
    return torch.stack(scaled).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
