"""Write videos and images."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from PIL import Image

from vae3d.errors import UserError
from vae3d.io import atomic_write, naming, remove, replace_durably, tmp_path

BT601 = 6  # AVCOL_SPC_SMPTE170M, the matrix with which swscale converts RGB; written into the file for players

# By default x264's decisions depend on the processor and its number of cores, and with AVX-512 on what was in freed
# memory: equal videos differ from one call to the next.
SAME_EVERY_TIME = "cpu-independent=1:threads=8"

# codec -> (encoder, pixel format, options). lossless is bit-exact RGB; h264 is small, plays everywhere, and loses up to
# several dB.
CODECS = {
    "lossless": ("libx264rgb", "rgb24", {"crf": "0", "preset": "veryfast", "x264-params": SAME_EVERY_TIME}),
    "h264": ("libx264", "yuv420p", {"crf": "18", "preset": "medium", "x264-params": SAME_EVERY_TIME}),
}
RGBA_CODEC = ("ffv1", "bgra", {})  # bit-exact, in .mkv, since no encoder of .mp4 keeps alpha
# suffix -> (format, options): no random identifier in an .mkv, so that equal videos are equal bytes
FORMATS = {".mp4": ("mp4", {}), ".mkv": ("matroska", {"fflags": "+bitexact"})}


def video_suffix(channels: int) -> str:
    """Of the files that VideoWriter makes: .mp4 of RGB, .mkv of RGBA."""
    return ".mkv" if channels == 4 else ".mp4"


class VideoWriter:
    """Writes an .mp4 of RGB or an .mkv of RGBA frame by frame, under a temporary name until it is complete.

    codec: lossless or h264; .mkv files are lossless (FFV1). h264 uses 4:4:4 colour if a side is odd, which 4:2:0 does
    not allow.
    Raises UserError for another codec; its methods raise FileError if writing fails.
    """

    def __init__(self, path: Path, fps: float, codec: str = "lossless") -> None:
        if codec not in CODECS:
            raise UserError(f"codec is {codec!r}; use one of {', '.join(CODECS)}")
        self.channels = 4 if path.suffix.lower() == ".mkv" else 3
        if self.channels == 4 and codec != "lossless":
            raise UserError(f"codec={codec} keeps no alpha; use codec=lossless for videos with alpha")
        self.path = path
        self.tmp = tmp_path(path)
        # Below 1 of the period: the rate of a time-lapse, such as 1 / 3600, would be rounded to 0.
        self.fps = Fraction(fps).limit_denominator(1001) if fps >= 1 else 1 / Fraction(1 / fps).limit_denominator(1001)
        self.codec = codec
        self.container = None
        self.count = 0

    def write(self, frames: np.ndarray) -> None:
        """Append [T, H, W, 3] uint8 frames; of an .mkv [T, H, W, 4], not premultiplied."""
        assert frames.shape[3] == self.channels, (frames.shape, self.path)
        with naming(self.path):
            if self.container is None:
                self._open(*frames.shape[1:3])
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(frame), format="rgb24" if self.channels == 3 else "rgba"
                )
                picture.pts = self.count
                picture.time_base = 1 / self.fps
                self.container.mux(self.stream.encode(picture))
                self.count += 1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Close the file; after an error delete it."""
        try:
            if kind is None:
                self.close()
        finally:
            if self.container is not None:
                with suppress(OSError):  # the first error is the one to report
                    self.container.close()
            remove(self.tmp)

    def close(self) -> None:
        """Complete the file and rename it."""
        assert self.container is not None, "no frame was written"
        with naming(self.path):
            self.container.mux(self.stream.encode())
            container, self.container = self.container, None
            container.close()
            replace_durably(self.tmp, self.path)

    def _open(self, height: int, width: int) -> None:
        encoder, pixels, options = CODECS[self.codec] if self.channels == 3 else RGBA_CODEC
        if pixels == "yuv420p" and (height % 2 or width % 2):
            pixels = "yuv444p"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove(self.tmp)  # a link there would be followed
        kind, settings = FORMATS[video_suffix(self.channels)]
        self.container = av.open(str(self.tmp), "w", format=kind, options=settings)
        self.stream = self.container.add_stream(encoder, rate=self.fps, options=dict(options))
        self.stream.width = width
        self.stream.height = height
        self.stream.pix_fmt = pixels
        self.stream.codec_context.time_base = 1 / self.fps
        if pixels not in ("rgb24", "bgra"):
            self.stream.codec_context.colorspace = BT601


def write_video(path: Path, frames: np.ndarray, fps: float, codec: str = "lossless") -> None:
    """Write [T, H, W, 3] uint8 frames as .mp4, or [T, H, W, 4] as .mkv."""
    with VideoWriter(path, fps, codec) as writer:
        writer.write(frames)


def write_image(path: Path, frame: np.ndarray) -> None:
    """Write one [H, W, 3 or 4] uint8 frame, atomically. Raises FileError."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as stream:
            Image.fromarray(frame).save(stream, Image.registered_extensions()[path.suffix.lower()])
