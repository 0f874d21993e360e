"""Images to look at: side by side, in tables and grids, error maps, latents as colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vae3d.data.batches.clips import to_video
from vae3d.pixels import as_rgb, displayable, to_uint8

LINE, TEXT = 20, 12  # pixels of a line of text, and of its font
GAP = 2  # pixels between panels, and between pictures of a grid
MIN_WIDTH = 160  # of a panel: room for its label
STRIP_WIDTHS = 224, 384  # pixels of a panel of a strip that moves; smaller ones are enlarged, larger ones reduced
MAX_STILL_WIDTH = 1024  # pixels of a panel of a strip that stands still
CARD_WIDTH = 350  # pixels in which TensorBoard shows a picture: text is enlarged as much as the picture is reduced
# Errors of a trained network are about 0.01, of an untrained one above 0.1; a root shows both.
MAX_ERROR = 0.25  # of pixels in [0, 1]: the end of the colour scale
ERROR_TICKS = (0, 0.01, 0.05, 0.1)  # marked on the scale, beside its end
ERROR_LABEL = "|error|, sqrt scale"  # of error_maps
COLOURS = "inferno"
Panels = Mapping[str, np.ndarray]  # label -> [T, H, W, 3] uint8


def side_by_side(panels: Panels) -> Iterator[np.ndarray]:
    """Frames [1, H', W', 3] uint8 of the videos in one row, with labels above.

    Narrow videos are enlarged. H' and W' are even, as most players require.
    """
    first = next(iter(panels.values()))
    height, width = enlarged(first[0]).shape[:2]
    cell = width + GAP
    labels = Image.new("RGB", (len(panels) * cell, LINE + height % 2))
    for index, label in enumerate(panels):
        _write(labels, index * cell + 4, 0, label)
    for t in range(len(first)):
        row = [np.pad(enlarged(video[t]), ((0, 0), (0, GAP), (0, 0))) for video in panels.values()]
        yield np.concatenate([labels, np.concatenate(row, 1)])[None]


def strip(rows: Sequence[Sequence[tuple[str, np.ndarray]]], caption: Sequence[str] = ()) -> np.ndarray:
    """[T, H', W', 3] uint8: videos in rows, labels above them, the caption on top, the scale of error maps below.

    rows: of equal lengths, of (label, video [T, H, W, 3] uint8), all of one size. caption: lines, which are wrapped.
    Small videos are enlarged by a whole factor, every pixel repeated; large ones reduced by a whole factor. H' and W'
    are even, as most players require.
    """
    frames = len(rows[0][0][1])
    scaled = [[_to_strip_width(video) for _, video in row] for row in rows]
    height, width = scaled[0][0].shape[1:3]
    columns = len(rows[0])
    total = columns * (width + GAP) - GAP
    text = _text_size(total)
    line = _line(text)
    lines = [part for paragraph in filter(None, caption) for part in _wrapped(paragraph, total - 8, text)]
    top = len(lines) * line
    bottom = top + len(rows) * (line + height)
    sides = bottom + GAP + 2 * line, total
    picture = Image.new("RGB", (sides[1] + sides[1] % 2, sides[0] + sides[0] % 2))
    for index, part in enumerate(lines):
        _write(picture, 4, index * line, part, text)
    picture.paste(Image.fromarray(colour_bar(total, text)), (0, bottom + GAP))
    for r, row in enumerate(rows):
        for c, (label, _) in enumerate(row):
            label = _shortened(label, width - 8, text)
            _write(picture, c * (width + GAP) + 4, top + r * (line + height), label, text)
    shown = np.repeat(np.array(picture)[None], frames, 0)
    for r, row in enumerate(scaled):
        for c, video in enumerate(row):
            y, x = top + r * (line + height) + line, c * (width + GAP)
            shown[:, y : y + height, x : x + width] = video
    return shown


def colour_bar(width: int, text: int = TEXT) -> np.ndarray:
    """[H, width, 3] uint8, two lines high: the colours of error maps, with numbers below. text: size of the font."""
    line = _line(text)
    bar = Image.new("RGB", (width, 2 * line))
    colours = _colourise(np.linspace(0, 1, width))[None].repeat(line - 4, 0)
    bar.paste(Image.fromarray(colours), (0, 4))
    draw = ImageDraw.Draw(bar)
    for tick in (*ERROR_TICKS, MAX_ERROR):
        label = f"{tick:g}" if tick < MAX_ERROR else f">= {tick:g}"
        x = round(math.sqrt(tick / MAX_ERROR) * (width - 1))
        draw.line((x, line - line // 4, x, line + 2), fill="white")
        length = math.ceil(_font(text).getlength(label))
        _write(bar, min(max(0, x - length // 2), width - length), line, label, text)
    return np.array(bar)


def captioned_grid(videos: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """[T, H', W', 3] uint8: videos [T, H, W, 3] uint8 in a grid, enlarged if they are narrow, with captions above."""
    videos = [enlarged(video) for video in videos]
    width, columns = videos[0].shape[2], math.ceil(math.sqrt(len(videos)))
    text = _text_size(columns * (width + GAP))
    cells = []
    for video, caption in zip(videos, captions, strict=True):
        label = Image.new("RGB", (width, _line(text)))
        _write(label, 4, 0, _shortened(caption, width - 8, text), text)
        cells.append(np.concatenate([np.repeat(np.array(label)[None], len(video), 0), video], 1))
    return grid(np.stack(cells), columns)


def enlarged(frames: np.ndarray, width: int = MIN_WIDTH) -> np.ndarray:
    """Frames [..., H, W, 3] uint8, every pixel repeated so often that they are at least `width` pixels wide."""
    times = math.ceil(width / frames.shape[-2])
    return frames.repeat(times, -3).repeat(times, -2)


def scorable(frames: np.ndarray) -> np.ndarray:
    """Frames [T, H, W, C] uint8 as metrics take them: RGB and RGBA as they are, of others pixels.as_rgb."""
    return frames if frames.shape[3] in (3, 4) else to_uint8(as_rgb(to_video(frames))[0])


def latent_colours(z: Tensor, size: tuple[int, int, int]) -> np.ndarray:
    """A clip's latents [C, t, h, w] as [T, H, W, 3] uint8 of the given size; each latent covers T / t frames.

    Three channels become R, G and B; other numbers are mixed by a fixed random matrix (latent-diffusion `to_rgb`,
    ldm/models/autoencoder.py). Each colour is scaled to its range within the clip.
    """
    z = z.detach().float().cpu()
    if len(z) != 3:
        mixture = torch.randn(3, len(z), generator=torch.Generator().manual_seed(0))
        z = torch.einsum("rc,cthw->rthw", mixture, z)
    low, high = z.amin((1, 2, 3), keepdim=True), z.amax((1, 2, 3), keepdim=True)
    unit = (z - low) / (high - low).clamp_min(torch.finfo(z.dtype).tiny)
    return to_uint8(2 * F.interpolate(unit[None], size, mode="nearest")[0] - 1)


def grid(frames: np.ndarray, columns: int | None = None) -> np.ndarray:
    """[N, T, H, W, C] uint8 -> [T, H', W', 3], row by row, by default in about as many rows as columns.

    Of other than three channels as `displayable`. Both sides are even, as most video players need them.
    """
    if frames.shape[-1] != 3:
        frames = np.stack([displayable(video) for video in frames])
    count, length, height, width, _ = frames.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = -(-count // columns)
    total_height, total_width = rows * (height + GAP) - GAP, columns * (width + GAP) - GAP
    picture = np.zeros((length, total_height + total_height % 2, total_width + total_width % 2, 3), np.uint8)
    for index, sample in enumerate(frames):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        picture[:, top : top + height, left : left + width] = sample
    return picture


def error_maps(original: np.ndarray, rec: np.ndarray) -> np.ndarray:
    """error_map of all frames of two videos [T, H, W, 3] uint8."""
    return np.stack([error_map(a, b) for a, b in zip(original, rec, strict=True)])


def error_map(original: np.ndarray, rec: np.ndarray) -> np.ndarray:
    """Colours [H, W, 3] uint8 of |error| between two frames [H, W, 3] uint8, on a square-root scale to MAX_ERROR."""
    error = np.abs(original.astype(np.float32) - rec.astype(np.float32)).mean(-1) / 255
    return _colourise(np.sqrt(error / MAX_ERROR))


def _colourise(values: np.ndarray) -> np.ndarray:
    import matplotlib  # slow to import

    return matplotlib.colormaps[COLOURS](values.clip(0, 1), bytes=True)[..., :3]


def _write(image: Image.Image, left: int, top: int, text: str, size: int = TEXT) -> None:
    """Write a line of text, _line(size) pixels high."""
    drop = (_line(size) - size) // 2 - 1
    ImageDraw.Draw(image).text((left, top + drop), _printable(text), fill="white", font=_font(size))


def _text_size(width: int) -> int:
    """The font of a picture of that width, which can be read where the picture is reduced to CARD_WIDTH."""
    return max(TEXT, round(width * TEXT / CARD_WIDTH))


def _line(size: int) -> int:
    """Height of a line of text in a font of that size."""
    return size + LINE - TEXT


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _printable(text: str) -> str:
    """The text in one line: line breaks and other characters that are not printed, such as in file names, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shortened(text: str, width: int, size: int = TEXT) -> str:
    """The text with its middle left out where it is wider than `width` pixels."""
    text = _printable(text)
    font, kept = _font(size), len(text)
    short = text
    while font.getlength(short) > width and kept > 2:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    return short


def _wrapped(text: str, width: int, size: int) -> list[str]:
    """The text in lines that are at most `width` pixels wide, broken after commas; wider parts are shortened."""
    lines: list[str] = []
    for part in text.split(", "):
        longer = f"{lines[-1]}, {part}" if lines else ""
        if lines and _font(size).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_shortened(part, width, size))
    return lines


def _to_strip_width(video: np.ndarray) -> np.ndarray:
    """A video [T, H, W, 3] uint8, enlarged or reduced by a whole factor."""
    least, most = STRIP_WIDTHS
    width = video.shape[2]
    factor = math.ceil(width / (most if len(video) > 1 else MAX_STILL_WIDTH))
    if factor <= 1:
        return enlarged(video, least)
    return np.stack([np.asarray(Image.fromarray(frame).reduce(factor)) for frame in video])
