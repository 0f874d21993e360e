"""The moving pictures of one video of a page: original, reconstructions, errors and changes as one H.264 video.

All pictures of a frame lie side by side in one picture, since players of several videos get out of step. Browsers play
4:2:0 only; the file is for the eye, and scores are of the exact pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Literal

import av
import cv2
import numpy as np
from PIL import Image

from vae3d.text import plural

Layer = Literal["picture", "error", "change"]
Size = tuple[int, int]  # height, width

ORIGINAL = "original"  # Panel.of
SCALE = 0.25  # error and change of pixels in [0, 1] that are white: 1/255 is 4 of 255 grey values
MAX_SHEET: Size = (2304, 4096)  # of all panels of a frame: H.264 level 5.1, which phones decode too
MAX_PANEL = 720  # height of a panel
MAX_FRAMES = 600
BLOCK, MARGIN = 16, 2  # pixels of a macroblock's side; of repeated edges around a panel, so that no colour bleeds in
THUMBNAIL: Size = (96, 256)  # at most, of each of its two pictures
THUMBNAILS = 16  # frames that are kept to choose the one in the middle from

# Without B frames and with a key frame twice a second, stepping backwards is quick. No psychovisual optimisation, which
# adds detail that the frames do not have. Equal bytes on every machine, as in vae3d.inference.video.
X264 = {
    "crf": "16",
    "preset": "veryfast",
    "tune": "fastdecode",
    "x264-params": "keyint=12:bframes=0:psy=0:cpu-independent=1:threads=4",
}
# As sRGB, so that browsers convert with the matrix of BT.709 and nothing else.
RED, BLUE = 0.2126, 0.0722  # of BT.709's luma
GREEN = 1 - RED - BLUE
TO_YUV = np.array(  # [Y, Cb, Cr] of limited range from [R, G, B, 1], all of 8 bits
    [
        [219 / 255 * RED, 219 / 255 * GREEN, 219 / 255 * BLUE, 16],
        *(
            [
                *(
                    112 / 255 * ((channel == at) - weight) / (1 - own)
                    for channel, weight in enumerate((RED, GREEN, BLUE))
                ),
                128,
            ]
            for at, own in ((2, BLUE), (0, RED))
        ),
    ]
)
BT709, SRGB, LIMITED = 1, 13, 1  # AVCOL_SPC_BT709 and AVCOL_PRI_BT709, AVCOL_TRC_IEC61966_2_1, AVCOL_RANGE_MPEG


@dataclass(frozen=True)
class Panel:
    """A rectangle of the frames of a clip, in pixels.

    of: "original" or the name of a reconstruction, or of another picture. layer: picture; error, |original -
    reconstruction|; or change, |frame - frame before|. Both are means over R, G and B, stored as grey from 0 to
    Clip.scale.
    """

    of: str
    layer: Layer
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Clip:
    """All pictures of one video, side by side in the frames of one file, so that they cannot get out of step.

    media: an H.264 video (4:2:0) or, of a single frame, a PNG. scale: values of error and change, of pixels in [0, 1],
    that are white. frames: number of frames. source: height and width of the original, which panels may be reduced
    from.
    """

    media: bytes
    kind: Literal["video/mp4", "image/png"]
    thumbnail: bytes
    panels: Sequence[Panel]
    fps: float
    frames: int
    scale: float
    source: Size
    notes: Sequence[str] = ()


def encode_clip(
    original: Iterable[np.ndarray],
    reconstructions: Mapping[str, Iterable[np.ndarray]],
    fps: float | None,
    others: Mapping[str, Iterable[np.ndarray]] | None = None,
) -> Clip:
    """Encode the moving pictures of one video, chunk by chunk.

    All arguments give chunks [T, H, W, 3] uint8 of the same frames and size (T may differ between them). others:
    pictures without error and change, such as latents as colours. fps: 0 or None for an image. Large pictures are
    reduced, and frames after the first MAX_FRAMES left out, as Clip.notes says. Equal inputs give equal bytes.
    Raises ValueError for videos of different lengths or sizes, without frames, or of several frames and no frame rate.
    """
    others = others or {}
    names = [ORIGINAL, *reconstructions, *others]
    if len({*names}) < len(names):
        raise ValueError(f"two pictures of a clip have the same name: {', '.join(names)}")
    streams = [
        _frames(name, chunks)
        for name, chunks in zip(names, [original, *reconstructions.values(), *others.values()], strict=True)
    ]
    frames = zip(*streams, strict=True)
    head = [frame for _, frame in zip(range(2), frames, strict=False)]
    if not head:
        raise ValueError("a clip needs a frame")
    if len(head) > 1 and not fps:
        raise ValueError("a clip of several frames needs a frame rate")
    source = head[0][0].shape[:2]
    layers: list[tuple[str, Layer]] = [(ORIGINAL, "picture"), *((name, "picture") for name in names[1:])]
    layers += [(name, "error") for name in reconstructions]
    layers += [(name, "change") for name in (ORIGINAL, *reconstructions)] if len(head) > 1 else []
    sheet, panels = _layout(layers, source)
    size = panels[0].height, panels[0].width
    notes = []
    encoder, thumbnails = _Encoder(sheet, fps) if len(head) > 1 else None, _Middle()
    before: dict[str, np.ndarray] = {}
    count = 0
    for pictures in chain(head, frames):
        if count == MAX_FRAMES:
            notes.append(f"only the first {plural(MAX_FRAMES, 'frame')} are shown; the video is longer")
            break
        now = dict(zip(names, pictures, strict=True))
        for name, picture in now.items():
            if picture.shape != (*source, 3):
                raise ValueError(f"a frame of {name} is {picture.shape}, and of the original {(*source, 3)}")
        canvas = np.zeros((*sheet, 3), np.uint8)
        for panel in panels:
            picture = now[panel.of]
            if panel.layer == "error":
                picture = _difference(now[ORIGINAL], picture, size)
            elif panel.layer == "change":
                picture = _difference(before.get(panel.of, picture), picture, size)
            _paste(canvas, panel, _reduced(picture, size))
        if encoder is not None:
            encoder.write(canvas)
        thumbnails.add(now[ORIGINAL], now[names[1]] if reconstructions else None)
        before, count = now, count + 1
    media = _png(canvas) if encoder is None else encoder.close()
    kind = "image/png" if encoder is None else "video/mp4"
    rate = 0.0 if encoder is None else float(encoder.fps)
    return Clip(media, kind, thumbnails.jpeg(), panels, rate, count, SCALE, source, notes)


def _frames(name: str, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for chunk in chunks:
        if chunk.dtype != np.uint8 or chunk.ndim != 4 or chunk.shape[3] != 3:
            raise ValueError(f"{name} is {chunk.dtype} {chunk.shape}; a clip takes [T, H, W, 3] uint8")
        yield from chunk


def _layout(layers: Sequence[tuple[str, Layer]], source: Size) -> tuple[Size, list[Panel]]:
    """The size of the sheet, and the panels in rows of cells of whole macroblocks: as large as fits, at most the
    source's size, and then with the smallest sheet."""

    def cell(side: int) -> int:
        return -(-(side + 2 * MARGIN) // BLOCK) * BLOCK

    def fitted(columns: int) -> tuple[float, Size, Size]:
        rows = -(-len(layers) // columns)
        room = [
            most // cells // BLOCK * BLOCK - 2 * MARGIN for most, cells in zip(MAX_SHEET, (rows, columns), strict=True)
        ]
        scale = min(1.0, MAX_PANEL / source[0], room[0] / source[0], room[1] / source[1])
        size = max(1, math.floor(source[0] * scale + 1e-9)), max(1, math.floor(source[1] * scale + 1e-9))
        return scale, size, (rows * cell(size[0]), columns * cell(size[1]))

    def order(columns: int) -> tuple[float, int, float]:
        scale, _, (height, width) = fitted(columns)
        return -scale, height * width, abs(math.log(width / height / 1.6))

    columns = min(range(1, min(len(layers), MAX_SHEET[1] // BLOCK) + 1), key=order)
    _, (height, width), sheet = fitted(columns)
    panels = []
    for index, (name, layer) in enumerate(layers):
        row, column = divmod(index, columns)
        panels.append(Panel(name, layer, column * cell(width) + MARGIN, row * cell(height) + MARGIN, width, height))
    return sheet, panels


def _difference(a: np.ndarray, b: np.ndarray, size: Size) -> np.ndarray:
    """Mean over R, G and B of |a - b|, reduced to `size`, as grey [H, W, 3] uint8."""
    change, weights = cv2.absdiff(a, b), np.full((1, 3), 1 / 3 / SCALE)
    if size != change.shape[:2]:
        change = _reduced(change.astype(np.float32), size)  # not rounded before the mean
    grey = cv2.transform(change, weights)  # rounded and clipped, of uint8
    if grey.dtype != np.uint8:
        grey = np.rint(grey).clip(0, 255).astype(np.uint8)
    return np.broadcast_to(grey[..., None], (*size, 3))


def _reduced(picture: np.ndarray, size: Size) -> np.ndarray:
    """Mean over the area of each new pixel."""
    return picture if picture.shape[:2] == size else cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA)


def _paste(canvas: np.ndarray, panel: Panel, picture: np.ndarray) -> None:
    """Put a picture into its cell, which its edges fill."""
    bottom, right = (-(side + MARGIN) % BLOCK for side in picture.shape[:2])
    bottom, right = (gap + BLOCK * (gap < MARGIN) for gap in (bottom, right))
    cell = np.pad(picture, ((MARGIN, bottom), (MARGIN, right), (0, 0)), "edge")
    top, left = panel.y - MARGIN, panel.x - MARGIN
    canvas[top : top + cell.shape[0], left : left + cell.shape[1]] = cell


class _Encoder:
    """Encodes frames to an .mp4 in memory, with a constant frame rate."""

    def __init__(self, size: Size, fps: float) -> None:
        self.fps = max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))
        self.file = io.BytesIO()
        self.container = av.open(self.file, "w", format="mp4", options={"fflags": "+bitexact"})
        self.stream = self.container.add_stream("libx264", rate=self.fps, options=dict(X264))
        self.stream.height, self.stream.width = size
        self.stream.pix_fmt = "yuv420p"
        context = self.stream.codec_context
        context.time_base = 1 / self.fps
        context.colorspace = context.color_primaries = BT709
        context.color_trc, context.color_range = SRGB, LIMITED
        self.count = 0

    def write(self, frame: np.ndarray) -> None:
        picture = av.VideoFrame.from_ndarray(_yuv420(frame), format="yuv420p")
        picture.pts, picture.time_base = self.count, 1 / self.fps
        self.container.mux(self.stream.encode(picture))
        self.count += 1

    def close(self) -> bytes:
        self.container.mux(self.stream.encode())
        self.container.close()
        return self.file.getvalue()


def _yuv420(frame: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 -> [3 H / 2, W], the planes of yuv420p one below the other, rounded. libswscale's are darker by
    up to 1.5 grey values."""
    height, width = frame.shape[:2]
    half = cv2.resize(frame, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    luma, chroma = cv2.transform(frame, TO_YUV[:1]), cv2.transform(half, TO_YUV[1:])
    planes = luma.ravel(), chroma[..., 0].ravel(), chroma[..., 1].ravel()
    return np.concatenate(planes).reshape(height * 3 // 2, width)


class _Middle:
    """Thumbnails of evenly spread frames, few at any time, since the number of frames is known at the end only."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, np.ndarray]] = []
        self.count, self.step = 0, 1

    def add(self, original: np.ndarray, rec: np.ndarray | None) -> None:
        if self.count % self.step == 0:
            pictures = [_thumbnail(picture) for picture in (original, rec) if picture is not None]
            self.kept.append((self.count, np.concatenate(pictures, 1)))
            if len(self.kept) > THUMBNAILS:
                self.kept, self.step = self.kept[::2], 2 * self.step
        self.count += 1

    def jpeg(self) -> bytes:
        """The one nearest to the middle."""
        _, picture = min(self.kept, key=lambda item: abs(item[0] - (self.count - 1) / 2))
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=82)
        return file.getvalue()


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    """At most THUMBNAIL; small pictures are enlarged by whole factors."""
    height, width = picture.shape[:2]
    scale = min(THUMBNAIL[0] / height, THUMBNAIL[1] / width)
    if scale >= 1:
        return picture.repeat(int(scale), 0).repeat(int(scale), 1)
    return _reduced(picture, (max(1, round(height * scale)), max(1, round(width * scale))))


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()
