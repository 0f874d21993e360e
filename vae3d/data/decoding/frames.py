"""Decoded frames of videos: the checks that all readers share, and the conversion to RGB."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from vae3d.data.decoding.containers import media_errors
from vae3d.data.media import MediaError, Size

TRANSPARENT = "has transparent pixels; flatten it onto a background of your choice"


def has_alpha(pixels: VideoFormat) -> bool:
    """Whether pixels of a format may be transparent."""
    return pixels.has_palette or any(component.is_alpha for component in pixels.components)


def to_rgb(path: str | Path, frame: VideoFrame, convert: VideoReformatter, keep_alpha: bool = False) -> np.ndarray:
    """[H, W, 3] uint8 (keep_alpha: [H, W, 4]) of a decoded frame as stored, with the file's colour matrix and range.

    All readers use this conversion. Each chroma sample covers its 2x2 (or 2x1) pixels, as in the ffmpeg program for
    8 bits and even sizes; POINT makes swscale do the same for more bits. Resizing follows, so that the position of
    chroma does not depend on the size. Raises MediaError if a pixel is transparent, or, with keep_alpha, if the format
    has no alpha.
    """
    alpha = has_alpha(frame.format)
    kind = "rgba" if alpha else "rgb24"
    with media_errors(path, "cannot be converted to RGB"):
        pixels = convert.reformat(_even(frame), format=kind, interpolation="POINT", threads=1).to_ndarray()
    if keep_alpha:
        if not alpha:
            raise MediaError(path, f"has no alpha channel ({frame.format.name}), which a model of 4 channels needs")
        return pixels[: frame.height, : frame.width]
    if alpha and pixels[..., 3].min() < 255:
        raise MediaError(path, TRANSPARENT)
    return pixels[: frame.height, : frame.width, :3]


def _even(frame: VideoFrame) -> VideoFrame:
    """The frame padded to an even size if chroma is subsampled: swscale would stretch the chroma of odd sizes."""
    height, width, planes = frame.height, frame.width, frame.planes
    halved = len(planes) >= 3 and (planes[1].width, planes[1].height) != (width, height)
    if not halved or not (height % 2 or width % 2):
        return frame
    even = VideoFrame(width + width % 2, height + height % 2, frame.format.name)
    dtype = np.uint16 if max(component.bits for component in frame.format.components) > 8 else np.uint8
    for old, new in zip(planes, even.planes, strict=True):
        pixels = np.frombuffer(old, dtype).reshape(old.height, -1)[:, : old.width]
        right = new.line_size // dtype().itemsize - old.width
        new.update(np.pad(pixels, ((0, new.height - old.height), (0, right)), mode="edge").tobytes())
    even.colorspace, even.color_range = frame.colorspace, frame.color_range
    return even


def check_frame(path: str | Path, frame: VideoFrame, number: int, size: Size) -> None:
    """Raise MediaError if a frame is incomplete, interlaced, or of another size than the first."""
    if frame.is_corrupt:
        raise MediaError(path, f"is damaged: frame {number} does not decode completely")
    if frame.interlaced_frame:
        raise MediaError(
            path,
            f"is interlaced (frame {number} is coded as two fields): convert it with ffmpeg -i IN -vf bwdif OUT, or "
            "-vf setfield=prog if its frames show no combing",
        )
    if (frame.height, frame.width) != tuple(size):
        first, here = (f"{height}x{width}" for height, width in (size, (frame.height, frame.width)))
        raise MediaError(path, f"changes its size at frame {number}, from {first} to {here}")


def orientation_of(path: str, frame: VideoFrame) -> tuple[bool, bool, bool]:
    """Header.orientation from the display matrix of the file."""
    try:
        matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    except ValueError as error:  # PyAV 18 does not know all that a frame may have, such as Exif of a camera's MJPEG
        if frame.rotation:
            raise MediaError(
                path, f"is turned by {frame.rotation} degrees, and has data that PyAV cannot read"
            ) from error
        matrix = None
    if matrix is None:
        return False, False, False
    # The stored pixel (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(bytes(matrix), "<i4")[:5] / 65536
    straight, turned = ([abs(value) for value in pair] for pair in ((a, d), (b, c)))
    if np.allclose(straight, 1, atol=1e-3) and np.allclose(turned, 0, atol=1e-3):
        return False, bool(d < 0), bool(a < 0)
    if np.allclose(straight, 0, atol=1e-3) and np.allclose(turned, 1, atol=1e-3):
        return True, bool(b < 0), bool(c < 0)
    degrees = math.degrees(math.atan2(b, a))
    raise MediaError(
        path,
        f"has a display matrix ({a:g} {b:g} {c:g} {d:g}) that turns it by {degrees:g} degrees or scales it; only "
        "multiples of 90 degrees and mirrors are supported",
    )
