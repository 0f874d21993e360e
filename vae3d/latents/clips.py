"""The clips of a source that a latent cache encodes: their order, keys and pixels."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from torch.utils.data import Dataset

from vae3d.data.batches.buckets import Bucket, longest_buckets
from vae3d.data.batches.clips import ClipSettings, open_frames, read_clip, to_tensor
from vae3d.data.media import DataError, MediaError, MediaInfo
from vae3d.data.table.file_table import FileTable, as_file_table
from vae3d.data.table.probe import fill_metadata
from vae3d.data.table.rows import NUMBERS
from vae3d.data.table.segments import Bounds, Segment, bounds_of, count_frames
from vae3d.data.table.versions import source_version
from vae3d.text import plural

FLIP = "#flip"  # suffix of the key of an entry with mirrored pixels
SPLIT_FOLDERS = ("train", "val", "valid", "validation", "test")  # not classes
ClipError = dict[str, Any]  # key, path, reason
Shape = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class Transform:
    """How to read clips from a file; see ClipSettings.

    height, width: None: the size of the file. frames: per clip; None: all frames of the file. clips: one, from the
    middle of the file, or all, one after another. buckets: (frames, height, width) of clips, instead of one of each;
    see shapes_of.
    """

    height: int | None = None
    width: int | None = None
    short_side: int | None = None
    frames: int | None = None
    clips: str = "one"
    stride: int = 1
    fps: float | None = None
    panorama: bool = False
    buckets: tuple[Shape, ...] | None = None

    def settings_dict(self) -> dict[str, Any]:
        """The settings as meta.json holds them; `buckets` only where there are some."""
        settings = asdict(replace(self, buckets=None))
        settings.pop("buckets")
        return settings | ({"buckets": [list(shape) for shape in self.buckets]} if self.buckets else {})

    @property
    def shortest(self) -> int:
        """Frames of the shortest bucket."""
        return min(frames for frames, *_ in self.buckets)

    def lengths(self, num_frames: np.ndarray | float, fps: np.ndarray | float) -> np.ndarray:
        """Frames of the longest clip of files."""
        return ClipSettings(1, 1, self.stride, self.fps).length(num_frames, fps)  # the size does not matter here

    def of_shape(self, shape: Shape | None) -> Transform:
        """The transform of the clips of one bucket; itself without one."""
        if shape is None:
            return self
        frames, height, width = shape
        return replace(self, frames=frames, height=height, width=width, buckets=None)

    def settings(self, info: MediaInfo, reader: str = "auto", channels: int = 3) -> ClipSettings:
        """Settings for a file: centre crop, not mirrored, not rolled. channels: 4 reads alpha too."""
        height, width = self.height or info.height, self.width or info.width
        return ClipSettings(
            height,
            width,
            self.stride,
            self.fps,
            self.short_side,
            reader=reader,
            panorama=self.panorama,
            channels=channels,
        )


@dataclass(frozen=True, slots=True)  # there may be millions
class Item:
    """A clip to encode. bounds: start and end of the row's part of the file, in seconds. first: its first frame, after
    the stride; None: from the middle. row: number of its row in the source. shape: of its bucket, if there are any."""

    key: str
    path: str
    bounds: Bounds
    first: int | None
    row: int
    label: str
    split: str
    text: str
    shape: Shape | None = None


@dataclass
class Read:
    """A clip that was read, or the error. number: index of its item. pixels: [C, T, H, W] uint8. fps: 0 for images.
    version: source_version of its file before reading."""

    number: int
    pixels: Tensor | None = None
    fps: float = 0.0
    error: str | None = None
    version: dict[str, Any] | None = None


def items_of(
    table: pd.DataFrame, transform: Transform, *, labels: str = "auto", split: str | None = None
) -> tuple[list[Item], list[ClipError]]:
    """Clips of a source's table, in its order, and errors of rows without clips.

    A key is the file's name in the source, with the seconds of a part, as in a.mp4@1.5-4.0, and the frames of one of
    several clips, as in a.mp4[17:34].
    labels: column (`label`), folder (name of the file's folder, unless it is that of a split), none, or auto (the
    column if it exists, else the folder). split: only rows of this split.
    Raises DataError if no clip is left, if two rows are the same clip, or if the column or folders do not exist.
    """
    if split is not None:
        table = table[table["split"] == split].reset_index(drop=True)
    label_of_row = dict(zip(table["row"], labels_of(table, labels), strict=True))
    if transform.clips == "all" or transform.buckets:
        sound, broken = fill_metadata(table, NUMBERS if transform.buckets else ("num_frames", "fps"))
        sound, outside = count_frames(sound)
        errors = [{"key": None, "path": path, "reason": reason} for path, reason in [*broken, *outside]]
    else:
        sound = table[table["error"].isna()]
        errors = [
            {"key": row.name or None, "path": row.path, "reason": f"row {row.row} {row.error}"}
            for row in table[table["error"].notna()].itertuples()
        ]
    items = []
    for row, bounds, shape in zip(sound.itertuples(), bounds_of(sound), shapes_of(sound, transform), strict=True):
        mine = transform.of_shape(shape)
        windows = _windows(row, mine) if shape or not transform.buckets else []
        if not windows:
            needed = f"frames={mine.frames}" if mine.frames else f"the shortest bucket has {transform.shortest}"
            reason = f"gives {plural(_frames_of(row, mine), 'frame')}; {needed}"
            errors.append({"key": _key(row.name, bounds), "path": row.path, "reason": reason})
        for first in windows:
            key = _key(row.name, bounds)
            if mine.clips == "all":
                key += f"[{first}:{first + mine.frames}]"
            texts = label_of_row[row.row], _text(row.split), _text(row.text)
            items.append(Item(key, row.path, bounds, first, int(row.row), *texts, shape))
    _check_no_duplicates(items)
    if not items:
        raise DataError(f"no clips are left to encode{'' if split is None else f' of split {split}'}")
    return items, errors


def labels_of(table: pd.DataFrame, labels: str) -> list[str]:
    """The label of every row; empty if it has none."""
    names, rows = distinct_labels([as_file_table(table)], labels)
    return [names[row] for row in rows]


def distinct_labels(tables: Sequence[FileTable], labels: str) -> tuple[list[str], np.ndarray]:
    """The labels that occur, and [rows] int32 which of them each row of the tables has. Empty text: none."""
    if labels == "none":
        return [""], np.broadcast_to(np.int32(0), sum(map(len, tables)))
    given, rows = _distinct(tables, "label", _text)
    if all(re.fullmatch(r"(\d+\.0)?", label) for label in given):  # pandas reads 3 as 3.0 in a column with empty cells
        given = [label.removesuffix(".0") for label in given]
    if labels == "column" and not any(given):
        raise DataError("labels=column, but the source has no column `label`; use labels=folder, or none")
    if labels == "column" or (labels == "auto" and any(given)):
        return given, rows
    folders, rows = _distinct(tables, "name", lambda name: Path(name).parent.name)
    found = ["" if folder.lower() in SPLIT_FOLDERS else folder for folder in folders]
    if labels == "folder" and not any(found):
        raise DataError("labels=folder, but no file of the source is in a class folder; use labels=column, or none")
    return found, rows


def _distinct(tables: Sequence[FileTable], column: str, text: Callable[[Any], str]) -> tuple[list[str], np.ndarray]:
    """Distinct texts of the values of a column, and [rows] int32 which of them each row has."""
    numbers: dict[str, int] = {}
    pieces = [np.empty(0, np.int32)]
    for table in tables:
        for values in table.column_chunks(column):
            pieces.append(np.array([numbers.setdefault(text(v), len(numbers)) for v in values], dtype=np.int32))
    return list(numbers), np.concatenate(pieces)


def _key(name: str, bounds: Bounds) -> str:
    start, end = ("" if math.isnan(second) else repr(float(second)) for second in bounds)
    return name + (f"@{start}-{end}" if start or end else "")


def names_of(keys: pd.Series) -> pd.Series:
    """Names of the files in their source, from the keys of entries; see items_of."""
    return keys.str.replace(r"(@[\d.e+-]*-[\d.e+-]*)?(\[\d+:\d+\])?(#flip)?$", "", n=1, regex=True)


def shapes_of(table: pd.DataFrame, transform: Transform) -> list[Shape | None]:
    """Shape of the clips of each row; None: too short for every bucket, or there are no buckets.

    Of the buckets that training would draw a file in (buckets.rows_of) it is the one with the most frames, and of
    several sizes that keep as much of the file the largest.
    """
    if not transform.buckets:
        return [None] * len(table)
    lengths = transform.lengths(table["num_frames"].to_numpy(float), table["fps"].to_numpy(float))
    sides = (table[name].to_numpy(float) for name in ("height", "width"))
    chosen = longest_buckets([Bucket(*shape) for shape in transform.buckets], *sides, lengths)
    return [transform.buckets[i] if i >= 0 else None for i in chosen.tolist()]


def _windows(row: Any, transform: Transform) -> Sequence[int | None]:
    """First frame of each clip of a row."""
    if transform.clips == "one":
        return [None]
    return range(0, _frames_of(row, transform) - transform.frames + 1, transform.frames)


def _frames_of(row: Any, transform: Transform) -> int:
    return int(transform.lengths(row.num_frames, row.fps))


def _text(value: Any) -> str:
    return "" if pd.isna(value) else str(value)


def _check_no_duplicates(items: Sequence[Item]) -> None:
    keys = [os.path.normpath(item.key) for item in items]
    seen: dict[str, int] = {}
    for key, item in zip(keys, items, strict=True):
        other = seen.setdefault(key, item.row)
        if other != item.row:
            raise DataError(f"rows {other} and {item.row} are the same clip, {key}; remove one of them")
    for key, item in zip(keys, items, strict=True):
        if key.removesuffix(FLIP) != key and key.removesuffix(FLIP) in seen:
            raise DataError(f"row {item.row}: {key} has the name of a mirrored clip; rename it")


def runs_of_files(items: Sequence[Item], numbers: Iterable[int], most: int) -> Iterator[list[int]]:
    """Runs of at most `most` consecutive numbers whose items are clips of one file. A worker that reads a run decodes
    the file on; clip by clip, every worker would decode all of it."""
    for _, run in groupby(numbers, lambda number: items[number].path):
        while numbers_of_run := list(islice(run, most)):
            yield numbers_of_run


class ClipReader(Dataset[Read]):
    """Reads clips by the index of their item; an unreadable file gives an error in its Read.

    The last file stays open, so that the clips of one file open it once. hashed: versions include file hashes.
    channels: 3 for RGB, 4 for RGBA.
    """

    def __init__(
        self,
        items: Sequence[Item],
        transform: Transform,
        reader: str = "auto",
        hashed: bool = False,
        channels: int = 3,
    ) -> None:
        self.items, self.transform, self.reader, self.hashed = items, transform, reader, hashed
        self.channels = channels
        self._last_version: tuple[str, dict[str, Any] | None] = "", None  # path, version
        self._opened: tuple[tuple[str, str], Segment] | None = None

    def __getitem__(self, number: int) -> Read:
        item = self.items[number]
        read = Read(number, version=self._version(item.path))
        try:
            read.pixels, read.fps = self._pixels(item)
        except MediaError as error:
            read.error = error.reason_for(item.path)
        return read

    def _version(self, path: str) -> dict[str, Any] | None:
        version = source_version(path)
        known = self._last_version[1] if path == self._last_version[0] else None
        if self.hashed and (known is None or version is None or not version.items() <= known.items()):
            self._last_version = path, source_version(path, hashed=True)
        return self._last_version[1] if self.hashed else version

    def _pixels(self, item: Item) -> tuple[Tensor, float]:
        """[channels, T, H, W] uint8, and frames per second."""
        opened = self._open(item)
        info = opened.info
        transform = self.transform.of_shape(item.shape)
        settings = transform.settings(info, self.reader, self.channels)
        possible, step = int(settings.length(info.num_frames, info.fps)), float(settings.step(info.fps))
        frames = transform.frames or possible
        if possible < frames:
            raise MediaError(item.path, f"gives {plural(possible, 'frame')}; frames={frames}")
        start = 0.5
        if item.first is not None:
            starts = info.num_frames - int((frames - 1) * step)  # number of possible first frames
            start = (int(item.first * step) + 0.5) / starts
        pixels = read_clip(opened, item.path, settings, frames, start)
        return to_tensor(np.ascontiguousarray(pixels)), info.fps / step

    def _open(self, item: Item) -> Segment:
        part = item.path, str(item.bounds)  # bounds may be NaN, which does not equal itself
        if self._opened is None or self._opened[0] != part:
            if self._opened is not None:
                self._opened[1].close()
                self._opened = None
            settings = ClipSettings(1, 1, reader=self.reader, channels=self.channels)
            self._opened = part, open_frames(item.path, settings, item.bounds)
        return self._opened[1]
