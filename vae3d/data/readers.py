"""Reading just the wanted frames of a video or image file, through PyAV or decord behind one interface.

Frames are [T, H, W, 3] uint8 RGB, turned upright as the file's rotation says. Frame numbers are in presentation
order and exact for constant and variable frame rate alike, because they come from the packets' timestamps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from vae3d.data.dataset_rows import is_row, open_row
from vae3d.data.images import IMAGE_SUFFIXES, ImageReader, SequenceReader, image_info, is_sequence, resize
from vae3d.data.media import MediaError, MediaInfo, Reader, Size, check_indices

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".gif")
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # AVColorTransferCharacteristic
UNINDEXED = ("mpegts", "mpeg")  # containers in which decord seeks by guessing


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
    _refuse_no_file(path)
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
        _refuse_no_file(path)
        return image_info(path)
    with closing(open_media(path)) as reader:
        return reader.info


def is_image(path: str | Path) -> bool:
    """Whether open_media takes it for a single image."""
    return is_row(path) or (str(path).lower().endswith(IMAGE_SUFFIXES) and not is_sequence(path))


def _refuse_no_file(path: Path) -> None:
    if not path.exists():
        raise MediaError(path, "no such file")
    if not path.is_file():
        raise MediaError(path, "is a folder, not a file")
    if path.stat().st_size == 0:
        raise MediaError(path, "is empty (0 bytes)")


class PyAVReader:
    """Seeks to the key frame before a wanted frame and decodes from there; resizes inside swscale."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.path = path
        self.container = _open_container(path)
        self.stream = self.container.streams.best("video")
        self.stream.codec_context.thread_count = threads
        self.pts, self.key_pts, self.open_gop = _packet_index(path, self.container, self.stream)
        self.rotation = 0
        self._frames: Iterator[VideoFrame] = iter(())
        self._stored_size: Size | None = None
        self._last: int | None = None  # number of the frame that _frames gave last
        first = self._frame_at(0)
        _refuse_hdr(path, first)
        self.rotation = int(first.rotation) % 360
        if self.rotation % 90:
            raise MediaError(path, f"is rotated by {self.rotation} degrees; only multiples of 90 are supported")
        height, width = (first.width, first.height) if self.rotation % 180 else (first.height, first.width)
        rate = self.stream.average_rate or self.stream.guessed_rate
        bits = max(component.bits for component in first.format.components)
        codec = self.stream.codec_context.name
        self.info = MediaInfo(len(self.pts), height, width, float(rate or 0), codec, first.format.name, bits)
        self._first = first

    def read(self, indices: Sequence[int], size: Size | None = None) -> np.ndarray:
        check_indices(self.path, indices, len(self.pts))
        frames = {i: self._to_rgb(self._frame_at(i), size) for i in sorted(set(indices))}
        return np.stack([frames[i] for i in indices])

    def close(self) -> None:
        self._frames = iter(())
        self.container.close()

    def _frame_at(self, index: int) -> VideoFrame:
        """Decode on from the last frame if that is the shorter way, else from the key frame before."""
        if index == 0 and self._last == 0:
            return self._first
        target = self.pts[index]
        key = int(np.searchsorted(self.key_pts, target, side="right")) - 1
        try:
            behind = self._last is not None and self._last < index
            if not behind or (key >= 0 and self.key_pts[key] > self.pts[self._last + 1]):
                self._seek(key, target)
            for frame in self._frames:
                if frame.pts == target:
                    if frame.is_corrupt:
                        break
                    self._refuse_other_size(index, frame)
                    self._last = index
                    return frame
                if frame.pts is not None and frame.pts > target:
                    break
        except av.error.FFmpegError as error:
            raise MediaError(self.path, f"cannot be decoded at frame {index}: {error.strerror}") from error
        raise MediaError(self.path, f"is damaged: frame {index} of {len(self.pts)} does not decode")

    def _refuse_other_size(self, index: int, frame: VideoFrame) -> None:
        size = frame.height, frame.width
        self._stored_size = self._stored_size or size
        if size != self._stored_size:
            first, here = (f"{height}x{width}" for height, width in (self._stored_size, size))
            raise MediaError(self.path, f"changes its size at frame {index}, from {first} to {here}")

    def _seek(self, key: int, target: int) -> None:
        """Leave _frames at a key frame not after `target`; demuxers may land late, so step back until it holds."""
        for k in range(key, -1, -1):
            self._restart(self.key_pts[k])
            first = next(self._frames, None)
            if first is not None and first.pts is not None and first.pts <= target:
                self._frames = itertools.chain([first], self._frames)
                return
        self._restart(min(self.pts[0], 0))

    def _restart(self, pts: int) -> None:
        self.container.seek(int(pts), stream=self.stream, backward=True)
        self._frames = self.container.decode(self.stream)

    def _to_rgb(self, frame: VideoFrame, size: Size | None) -> np.ndarray:
        if size is None:
            rgb = frame.to_ndarray(format="rgb24")
        else:
            height, width = reversed(size) if self.rotation % 180 else size
            rgb = frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
        return np.rot90(rgb, self.rotation // 90) if self.rotation else rgb


class DecordReader:
    """decord, which decodes batches in C++; its last release is of 2021. Refuses what it would decode wrongly."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        import decord

        with closing(PyAVReader(path)) as header:  # tells what decord does not, and refuses what both must refuse
            _refuse_for_decord(path, header)
        try:
            self.video = decord.VideoReader(str(path), num_threads=threads)
        except (decord.DECORDError, RuntimeError) as error:
            raise MediaError(path, f"decord cannot open it: {_one_line(error)}") from error
        self.path, self.info, self.error = path, header.info, decord.DECORDError
        if len(self.video) != self.info.num_frames:
            raise MediaError(path, f"decord counts {len(self.video)} frames, its packets {self.info.num_frames}")

    def read(self, indices: Sequence[int], size: Size | None = None) -> np.ndarray:
        check_indices(self.path, indices, self.info.num_frames)
        try:
            frames = self.video.get_batch(list(indices)).asnumpy()
        except (self.error, RuntimeError) as error:
            raise MediaError(self.path, f"decord cannot decode it: {_one_line(error)}") from error
        if size in (None, frames.shape[1:3]):
            return frames
        return np.stack([np.asarray(resize(Image.fromarray(frame), size)) for frame in frames])

    def close(self) -> None:
        del self.video


def _refuse_for_decord(path: Path, header: PyAVReader) -> None:
    if header.info.bits > 8:
        reason = f"has {header.info.bits} bits per channel, which decord turns into other colours"
    elif header.container.format.name in UNINDEXED:
        reason = f"is {header.container.format.name}, where decord gives wrong frames"
    elif header.open_gop:
        reason = "has open groups of pictures, of which decord gives wrong frames"
    else:
        return
    raise MediaError(path, f"{reason}; use reader=pyav")


READERS: dict[str, Callable[[Path, int], Reader]] = {"auto": PyAVReader, "pyav": PyAVReader, "decord": DecordReader}


def _open_container(path: Path) -> InputContainer:
    try:
        container = av.open(str(path))
    except av.error.FFmpegError as error:
        raise MediaError(path, f"is not a readable video: {error.strerror}") from error
    if container.format.name.endswith("_pipe") or container.format.name == "image2":
        raise MediaError(path, f"is an image ({container.format.name}), not a video, whatever its extension says")
    if container.streams.best("video") is None:
        kinds = sorted({stream.type for stream in container.streams})
        raise MediaError(path, f"has no video stream, only {', '.join(kinds) or 'nothing'}")
    return container


def _packet_index(path: Path, container: InputContainer, stream: VideoStream) -> tuple[np.ndarray, np.ndarray, bool]:
    """Presentation timestamps of all frames and of the key frames among them, both sorted; and whether frames that
    follow a key frame in the file are shown before it, so that they need the group before (an open GOP)."""
    pts, keys, packets, open_gop = [], [], 0, False
    try:
        for packet in container.demux(stream):
            packets += packet.size > 0
            if packet.size == 0 or packet.is_discard:
                continue
            if packet.pts is None:
                raise MediaError(path, "has frames without timestamps; remux it, e.g. into .mp4")
            pts.append(packet.pts)
            open_gop |= bool(keys) and packet.pts < keys[-1]
            if packet.is_keyframe:
                keys.append(packet.pts)
    except av.error.FFmpegError as error:
        raise MediaError(path, f"is damaged or cut short: {error.strerror}") from error
    if packets < stream.frames:
        raise MediaError(path, f"is cut short: its header promises {stream.frames} frames, {packets} are there")
    if not pts:
        raise MediaError(path, "holds no frames")
    return np.unique(np.array(pts)), np.unique(np.array(keys, dtype=np.int64)), open_gop


def _refuse_hdr(path: Path, frame: VideoFrame) -> None:
    transfer = HDR_TRANSFERS.get(int(frame.color_trc))
    if transfer:
        raise MediaError(path, f"is HDR ({transfer}); tone-map it to SDR first, 8-bit RGB would look washed out")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
