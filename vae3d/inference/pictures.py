"""Pictures for eyes: reconstructions side by side, strips of frames with maps of their errors, and latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vae3d.pixels import to_uint8
from vae3d.report import images

LINE = 20  # pixels of a line of text
GAP = 2  # pixels between panels
NARROW, BROAD = 160, 512  # a panel with less cannot hold its label; one with more makes a strip too large
MARGIN = 200  # pixels at the left of a strip, for the names of its rows
LARGEST_ERROR = 0.1  # where the colours end, of pixels in [0, 1]
COLOURS = "inferno"
Panels = Mapping[str, np.ndarray]  # label -> [T, H, W, 3] uint8


def side_by_side(panels: Panels) -> Iterator[np.ndarray]:
    """Frames [1, H', W', 3] uint8 of the videos in one row, their labels above; narrow ones are enlarged. Sides are
    even, as most players want them."""
    frames, height, width = next(iter(panels.values())).shape[:3]
    times = -(-NARROW // width)
    line = np.zeros((LINE + height * times % 2, len(panels) * (width * times + GAP), 3), np.uint8)
    for place, label in enumerate(panels):
        line = _with_text(line, (place * (width * times + GAP) + 4, 3), label)
    for t in range(frames):
        row = [np.pad(_enlarged(video[t], times), ((0, 0), (0, GAP), (0, 0))) for video in panels.values()]
        yield np.concatenate([line, np.concatenate(row, 1)])[None]


def strip(panels: Panels, original: str, count: int) -> np.ndarray:
    """[H', W', 3] uint8: `count` frames, evenly spread, of every video, and below maps of how much the others differ
    from the one named `original`: |error|, the mean of R, G and B, in colours of a fixed scale that is drawn below."""
    frames = len(panels[original])
    chosen = np.linspace(0, frames - 1, min(count, frames)).round().astype(int).tolist()
    rows = {label: [_fitted(video[t]) for t in chosen] for label, video in panels.items()}
    for label, video in panels.items():
        if label != original:
            maps = [_fitted(error_map(panels[original][t], video[t])) for t in chosen]
            rows[f"|error| {label}"] = maps
    height, width = rows[original][0].shape[:2]
    whole = MARGIN + len(chosen) * (width + GAP)
    picture = [_line(whole, {MARGIN + i * (width + GAP) + 4: f"frame {t}" for i, t in enumerate(chosen)})]
    for label, cells in rows.items():
        margin = _with_text(np.zeros((height, MARGIN, 3), np.uint8), (4, max(0, height // 2 - LINE // 2)), label)
        row = [margin, *(np.pad(cell, ((0, 0), (0, GAP), (0, 0))) for cell in cells)]
        picture.append(np.pad(np.concatenate(row, 1), ((0, GAP), (0, 0), (0, 0))))
    return np.concatenate([*picture, *_scale(whole)])


def latent_colours(z: Tensor, size: tuple[int, int, int]) -> np.ndarray:
    """A clip's latents [C, t, h, w] as [T, H, W, 3] uint8 of that size, every latent a block of T / t frames.

    Three channels are R, G and B. Others are mixed by a fixed random matrix, so that every channel shows
    (latent-diffusion `to_rgb`, ldm/models/autoencoder.py). Each colour is stretched from its smallest to its largest
    value in the clip.
    """
    z = z.detach().float().cpu()
    if len(z) != 3:
        mixture = torch.randn(3, len(z), generator=torch.Generator().manual_seed(0))
        z = torch.einsum("rc,cthw->rthw", mixture, z)
    low, high = z.amin((1, 2, 3), keepdim=True), z.amax((1, 2, 3), keepdim=True)
    unit = (z - low) / (high - low).clamp_min(torch.finfo(z.dtype).tiny)
    return to_uint8(2 * F.interpolate(unit[None], size, mode="nearest")[0] - 1)


def grid(rows: Sequence[np.ndarray]) -> np.ndarray:
    """[H', W', 3] uint8 of rows of pictures, [number, H, W, 3] uint8 each."""
    return images.grid(np.concatenate(rows)[:, None], len(rows[0]), even=False)[0]


def error_map(original: np.ndarray, rec: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8, twice, -> colours of |error|, from 0 (dark) to LARGEST_ERROR and beyond (bright)."""
    error = np.abs(original.astype(np.float32) - rec.astype(np.float32)).mean(-1) / 255
    return _coloured(error / LARGEST_ERROR)


def _coloured(values: np.ndarray) -> np.ndarray:
    import matplotlib  # slow to import

    return matplotlib.colormaps[COLOURS](values.clip(0, 1), bytes=True)[..., :3]


def _scale(width: int) -> list[np.ndarray]:
    """The colours from left to right, and what they mean."""
    bar = _line(width, {4: "|error|, mean of R, G, B"})
    bar[4:-2, MARGIN : MARGIN + NARROW] = _coloured(np.linspace(0, 1, NARROW))
    ends = {MARGIN: "0", MARGIN + NARROW - 68: f"{LARGEST_ERROR:g} or more"}
    return [bar, _line(width, {4: "of pixels in [0, 1]"} | ends)]


def _line(width: int, texts: Mapping[int, str]) -> np.ndarray:
    """A line of text. texts: column -> what begins there."""
    line = np.zeros((LINE, width, 3), np.uint8)
    for column, text in texts.items():
        line = _with_text(line, (column, 3), text)
    return line


def _with_text(picture: np.ndarray, place: Sequence[int], text: str) -> np.ndarray:
    image = Image.fromarray(picture)
    ImageDraw.Draw(image).text(tuple(place), text, fill=(255, 255, 255), font=ImageFont.load_default(12))
    return np.array(image)


def _fitted(frame: np.ndarray) -> np.ndarray:
    """Enlarged or shrunk, so that a label fits on it and many fit into a strip."""
    height, width = frame.shape[:2]
    if width <= BROAD:
        return _enlarged(frame, -(-NARROW // width))
    size = BROAD, max(1, round(height * BROAD / width))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX))


def _enlarged(frame: np.ndarray, times: int) -> np.ndarray:
    return frame.repeat(times, 0).repeat(times, 1)
