"""Images to look at: side by side, in tables and grids, error maps, latents as colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vae3d.data.clips import to_video
from vae3d.pixels import as_rgb, displayable, to_uint8

LINE, TEXT = 20, 12  # pixels of a line of text, and of its font
GAP = 2  # pixels between panels, and between pictures of a grid
MIN_WIDTH = 160  # of a panel: room for its label
MARGIN = 200  # pixels on the left of a table, for the names of its rows
MAX_ERROR = 0.1  # of pixels in [0, 1]: the end of the colour scale
ERROR_LABEL = f"|error| x {1 / MAX_ERROR:g}"  # of error_maps
ERROR_NOTE = (
    f"{ERROR_LABEL} is the absolute difference, dark where there is none and bright from {MAX_ERROR:g} of the range of "
    "pixels on"
)
COLOURS = "inferno"
Panels = Mapping[str, np.ndarray]  # label -> [T, H, W, 3] uint8


def side_by_side(panels: Panels, title: str = "") -> Iterator[np.ndarray]:
    """Frames [1, H', W', 3] uint8 of the videos in one row, with labels above, and the title, if any, above these.

    Narrow videos are enlarged. H' and W' are even, as most players require.
    """
    first = next(iter(panels.values()))
    height, width = enlarged(first[0]).shape[:2]
    cell = width + GAP
    top = LINE if title else 0
    labels = Image.new("RGB", (len(panels) * cell, top + LINE + height % 2))
    _write(labels, 4, 0, _shortened(title, labels.width - 8))
    for index, label in enumerate(panels):
        _write(labels, index * cell + 4, top, label)
    for t in range(len(first)):
        row = [np.pad(enlarged(video[t]), ((0, 0), (0, GAP), (0, 0))) for video in panels.values()]
        yield np.concatenate([labels, np.concatenate(row, 1)])[None]


def table(rows: Mapping[str, Sequence[np.ndarray]], columns: Sequence[str]) -> np.ndarray:
    """[H', W', 3] uint8: frames [H, W, 3] uint8 in rows, with the row's label on the left and the column's above."""
    height, width = next(iter(rows.values()))[0].shape[:2]
    picture = Image.new("RGB", (MARGIN + len(columns) * (width + GAP), LINE + len(rows) * (height + GAP)))
    for column, label in enumerate(columns):
        _write(picture, MARGIN + column * (width + GAP) + 4, 0, label)
    for line, (label, cells) in enumerate(rows.items()):
        top = LINE + line * (height + GAP)
        _write(picture, 4, top + max(0, height // 2 - LINE // 2) - 3, _shortened(label, MARGIN - 8))
        for column, cell in enumerate(cells):
            picture.paste(Image.fromarray(cell), (MARGIN + column * (width + GAP), top))
    return np.array(picture)


def captioned(video: np.ndarray, caption: str) -> np.ndarray:
    """[T, H, W, 3] uint8, enlarged if it is narrow, with the caption above."""
    video = enlarged(video)
    label = Image.new("RGB", (video.shape[2], LINE))
    _write(label, 4, 0, _shortened(caption, label.width - 8))
    return np.concatenate([np.repeat(np.array(label)[None], len(video), 0), video], 1)


def enlarged(frames: np.ndarray) -> np.ndarray:
    """Frames [..., H, W, 3] uint8, every pixel repeated so often that they are at least MIN_WIDTH wide."""
    times = math.ceil(MIN_WIDTH / frames.shape[-2])
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


def grid(frames: np.ndarray, columns: int | None = None, even: bool = True) -> np.ndarray:
    """[N, T, H, W, C] uint8 -> [T, H', W', 3], row by row, by default in about as many rows as columns.

    Of other than three channels as `displayable`. even: make both sides even, as most video players need them.
    """
    if frames.shape[-1] != 3:
        frames = np.stack([displayable(video) for video in frames])
    count, length, height, width, _ = frames.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = -(-count // columns)
    total_height, total_width = rows * (height + GAP) - GAP, columns * (width + GAP) - GAP
    if even:
        total_height, total_width = total_height + total_height % 2, total_width + total_width % 2
    picture = np.zeros((length, total_height, total_width, 3), np.uint8)
    for index, sample in enumerate(frames):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        picture[:, top : top + height, left : left + width] = sample
    return picture


def error_maps(original: np.ndarray, rec: np.ndarray) -> np.ndarray:
    """error_map of all frames of two videos [T, H, W, 3] uint8."""
    return np.stack([error_map(a, b) for a, b in zip(original, rec, strict=True)])


def error_map(original: np.ndarray, rec: np.ndarray) -> np.ndarray:
    """Colours [H, W, 3] uint8 of |error| between two frames [H, W, 3] uint8: 0 is dark, MAX_ERROR or more bright."""
    error = np.abs(original.astype(np.float32) - rec.astype(np.float32)).mean(-1) / 255
    return _colourise(error / MAX_ERROR)


def _colourise(values: np.ndarray) -> np.ndarray:
    import matplotlib  # slow to import

    return matplotlib.colormaps[COLOURS](values.clip(0, 1), bytes=True)[..., :3]


def _write(image: Image.Image, left: int, top: int, text: str) -> None:
    """Write a line of text, LINE pixels high."""
    ImageDraw.Draw(image).text((left, top + 3), text, fill="white", font=ImageFont.load_default(TEXT))


def _shortened(text: str, width: int) -> str:
    """The text with its middle left out where it is wider than `width` pixels."""
    font, kept = ImageFont.load_default(TEXT), len(text)
    short = text
    while font.getlength(short) > width and kept > 2:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    return short
