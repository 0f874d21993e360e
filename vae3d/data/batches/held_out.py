"""Clips of held-out files, for validation: which ones, and reading them; and the table of all held-out files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd

from vae3d.data.batches.batch_schedule import ClipIndex
from vae3d.data.batches.buckets import Bucket, rows_of
from vae3d.data.batches.clips import ClipSettings, collate, open_frames, read_clip, to_sample
from vae3d.data.batches.selection import clip_lengths
from vae3d.data.media import DataError, MediaError
from vae3d.data.table.file_table import CHUNK, FileTable, as_file_table, sizes_of
from vae3d.data.table.rows import QUOTED_CSV
from vae3d.data.table.segments import Bounds
from vae3d.io import atomic_write, naming
from vae3d.text import plural
from vae3d.types import ClipBatch

T = TypeVar("T")
HELD_OUT = "held_out.csv"  # in a run's folder
COLUMNS = ["path", "start", "end", "text", "label", "split", "source"]


@dataclass(frozen=True)
class HeldOut:
    """A clip for validation: its file, and how it is cut. row: of the table of held-out files. groups: whose means it
    counts for, beside that of all clips, such as its source and its size."""

    row: int
    path: str
    bounds: Bounds
    settings: ClipSettings
    frames: int
    groups: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        return self.frames, self.settings.height, self.settings.width


def held_out_clip(
    table: FileTable, row: int, settings: ClipSettings, frames: int, groups: tuple[str, ...] = ()
) -> HeldOut:
    """The clip of a row of a table of held-out files, counted from 0."""
    return HeldOut(row, table.path(row), table.bounds(row), settings, frames, groups)


def long_enough(table: pd.DataFrame | FileTable, settings: ClipSettings, frames: int, count: int) -> list[HeldOut]:
    """The first `count` held-out videos with at least `frames` frames."""
    table = as_file_table(table)
    rows = np.flatnonzero(clip_lengths(table, settings) >= frames)[:count].tolist()
    return [held_out_clip(table, row, settings, frames) for row in rows]


def held_out_of(
    table: pd.DataFrame | FileTable,
    settings: ClipSettings,
    frames: int,
    count: int,
    source: str = "",
    buckets: Sequence[Bucket] | None = None,
) -> list[HeldOut]:
    """The first `count` held-out files of a source with at least `frames` frames, each at the size that its clips have
    in training."""
    named = (source,) if source else ()
    if buckets is None:
        return [replace(clip, groups=named) for clip in long_enough(table, settings, frames, count)]
    same = [b.size for b in buckets if (b.frames == 1) == (frames == 1)] or [b.size for b in buckets]
    sizes = sorted(dict.fromkeys(same), key=lambda size: -size[0] * size[1])  # the largest of those that fit
    fitting = rows_of([Bucket(frames, *size) for size in sizes], *sizes_of(table), clip_lengths(table, settings))
    size_of: dict[int, tuple[int, int]] = {}
    for size, rows in zip(sizes, fitting, strict=True):
        for row in rows.tolist():
            size_of.setdefault(row, size)
    clips, table = [], as_file_table(table)
    for row in sorted(size_of)[:count]:
        height, width = size_of[row]
        groups = (*named, "_".join((*named, f"{height}x{width}")))
        clips.append(held_out_clip(table, row, replace(settings, height=height, width=width), frames, groups))
    return clips


def in_turn(sources: Sequence[Sequence[T]], count: int) -> list[T]:
    """`count` clips, one of each source after the other."""
    return [clip for clips in zip_longest(*sources) for clip in clips if clip is not None][:count]


def validation_clips(
    table: pd.DataFrame | FileTable,
    settings: ClipSettings,
    frames: int,
    count: int,
) -> tuple[list[ClipBatch], list[tuple[str, str]]]:
    """One clip from each of the first `count` held-out videos with at least `frames` frames, and (path, reason) of
    files that failed. Raises DataError if no video is long enough.
    """
    clips = long_enough(table, settings, frames, count)
    require_held_out(clips, frames, len(table))
    return read_held_out(clips)


def require_held_out(clips: Sequence[Any], frames: int, files: int) -> None:
    """Raises DataError without clips. files: that are held out."""
    if not clips:
        raise DataError(
            f"no held-out video has {plural(frames, 'frame')} for validation ({files} are held out); "
            "lower validation.frames, give the table a `split` column, or set validation.every=0"
        )


def read_held_out(
    clips: Sequence[HeldOut], rank: int = 0, world_size: int = 1
) -> tuple[list[ClipBatch], list[tuple[str, str]]]:
    """This rank's share of the clips, whose positions are their numbers, and (path, reason) of files that failed."""
    read, errors = [], []
    for number in range(rank, len(clips), world_size):
        clip = clips[number]
        try:
            read.append(validation_clip(clip.path, clip.bounds, number, clip.settings, clip.frames))
        except MediaError as error:
            errors.append((error.path, error.reason))
    return read, errors


def validation_clip(path: str, bounds: Bounds, row: int, settings: ClipSettings, frames: int) -> ClipBatch:
    """The same clip of a file every time: from its middle (or over all of it, as data.sampling says), cropped at the
    centre, neither mirrored nor rolled. row: becomes its position. Raises MediaError.
    """
    with closing(open_frames(path, settings, bounds)) as reader:
        pixels = read_clip(reader, path, settings, frames, start=0.5)
    return collate([to_sample(pixels, ClipIndex(row, row, frames), path, settings)])


class HeldOutFiles(NamedTuple):
    """Files of a source that a run does not train on. source: its name; empty for the only one."""

    source: str
    table: FileTable


def held_out_files(sources: Sequence[tuple[str, FileTable, ClipSettings]], frames: int) -> list[HeldOutFiles]:
    """The held-out files of all sources, first those with at least `frames` frames, of which validation scores some."""
    long = [clip_lengths(table, settings) >= frames for _, table, settings in sources]
    return [
        HeldOutFiles(name, table.select(enough == first))
        for first in (True, False)
        for (name, table, _), enough in zip(sources, long, strict=True)
    ]


def write_held_out(file: Path, sources: Iterable[HeldOutFiles]) -> None:
    """Write the files as a table of split `val`; without one, delete the table. Raises FileError."""
    sources = [found for found in sources if len(found.table)]
    with naming(file):
        if not sources:
            file.unlink(missing_ok=True)
            return
        with atomic_write(file) as stream:
            stream.write(f"{','.join(COLUMNS)}\n".encode())
            for name, table in sources:
                for first in range(0, len(table), CHUNK):
                    rows = table.to_pandas(np.arange(first, min(first + CHUNK, len(table))))
                    rows = rows.assign(split="val", source=name)
                    stream.write(rows.to_csv(columns=COLUMNS, header=False, **QUOTED_CSV).encode())
