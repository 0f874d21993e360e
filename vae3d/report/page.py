"""A page that compares reconstructions: what it holds, and how it is written.

A page is a folder that opens from disk without a server, and requests nothing from a network:

    index.html            the page, its style and scripts, and the report as JSON
    videos/ID.js          one clip: its moving pictures and its curves over frames, loaded when it is looked at
    videos/ID.jpg         its thumbnail

or, if all clips together are small, index.html alone, which holds them too. Clips are scripts, since browsers let a page
from disk neither read JSON beside it nor draw its videos where pixels can be read.

    videos = []
    for name, pair in pairs:
        clip = encode_clip(pair.original, {"rec": pair.rec}, pair.fps)
        write_clip(folder, name, clip, curves={"rec": {"psnr": [...]}})
        videos.append(Video(name, name, scores={"rec": {"psnr": 31.2}}, clip=True))
    write_page(folder, Report("Reconstruction quality", [Chapter("Videos", videos=videos, ...)]))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from markupsafe import Markup

Layer = Literal["picture", "error", "change"]


@dataclass(frozen=True)
class Metric:
    """A column of scores.

    better: "higher", "lower", the best value, or None if there is neither better nor worse. meaning: one or two sentences.
    """

    label: str
    better: Literal["higher", "lower"] | float | None
    meaning: str = ""
    unit: str = ""


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
    that are white. frames: number of frames. source: height and width of the original, which panels may be reduced from.
    """

    media: bytes
    kind: Literal["video/mp4", "image/png"]
    thumbnail: bytes
    panels: Sequence[Panel]
    fps: float
    frames: int
    scale: float
    source: tuple[int, int]
    notes: Sequence[str] = ()


@dataclass
class Video:
    """A row of a chapter's table. id: part of a file name, unique within a page. name: any text.

    scores: reconstruction -> metric -> value. links: label -> path, relative to the page. clip: whether videos/ID.js
    exists; else `why` says why not. panorama: equirectangular, so that it can be looked at from inside.
    """

    id: str
    name: str
    scores: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    clip: bool = True
    why: str = ""
    panorama: bool = False
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Table:
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """Lines, such as of a training. series: label -> points (x, y)."""

    title: str
    x: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    y: str = ""
    log: bool = False


@dataclass(frozen=True)
class Difference:
    """A paired difference of the means of two reconstructions, `name` minus `against`, with its 95 % interval."""

    name: str
    against: str
    metric: str
    difference: float
    low: float | None
    high: float | None
    better_on: int | None
    videos: int


@dataclass(frozen=True)
class Picture:
    """A still picture: PNG, JPEG or SVG."""

    title: str
    html: Markup
    note: str = ""


@dataclass
class Chapter:
    """One comparison. reconstructions: names in the order in which they are shown, the base first. metrics: by name, in
    the order of the columns. ranked_by: the metric that says which videos are worst and best. text: what the
    chapter shows; plain text is escaped."""

    title: str
    text: str | Markup = ""
    reconstructions: Sequence[str] = ()
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    videos: Sequence[Video] = ()
    ranked_by: str | None = None
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    pictures: Sequence[Picture] = ()
    differences: Sequence[Difference] = ()
    commands: str = ""
    warnings: Sequence[str] = ()


@dataclass
class Report:
    """A page. facts: label -> text, such as preset, versions, hashes. commands: to copy. links: label -> path."""

    title: str
    chapters: Sequence[Chapter]
    text: str | Markup = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    commands: str = ""
    links: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def encode_clip(
    original: Iterable[np.ndarray],
    reconstructions: Mapping[str, Iterable[np.ndarray]],
    fps: float,
    others: Mapping[str, Iterable[np.ndarray]] | None = None,
) -> Clip:
    """Encode the moving pictures of one video, chunk by chunk.

    All arguments give chunks [T, H, W, 3] uint8 of the same frames and size (T may differ between them). others:
    pictures without error and change, such as latents as colours. fps: 0 for an image.
    """
    raise NotImplementedError


def write_clip(
    folder: Path, id: str, clip: Clip, curves: Mapping[str, Mapping[str, Sequence[float]]] | None = None
) -> None:
    """Write videos/ID.js and videos/ID.jpg, atomically. curves: reconstruction -> metric -> value of each frame.

    Raises FileError.
    """
    raise NotImplementedError


def write_page(folder: Path, report: Report) -> None:
    """Write index.html; clips of at most SINGLE_FILE_BYTES together are moved into it. Raises FileError."""
    raise NotImplementedError
