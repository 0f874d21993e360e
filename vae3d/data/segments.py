"""A part of a file, from `start` to `end` in seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from vae3d.data.media import MediaError, Reader, Size, check_indices

SEGMENT = ["start", "end"]  # columns of a table
SEGMENT_FAULT = "`start` and `end` must be seconds, 0 <= start < end"
Bounds = tuple[float, float]  # start and end; NaN: the file's own
WHOLE: Bounds = (math.nan, math.nan)


def frame_range(bounds: Bounds, num_frames: int, fps: float) -> range:
    """Numbers of the frames from `start` up to, but without, `end`.

    A time is rounded to the nearest frame at the file's average rate, so that segments that meet share no frame.
    Raises ValueError for a segment that is not in the file.
    """
    start, end = bounds
    if math.isnan(start) and math.isnan(end):
        return range(num_frames)
    if not fps:
        raise ValueError("is an image, which has no part between a `start` and an `end`")
    first = 0 if math.isnan(start) else math.floor(start * fps + 0.5)
    stop = num_frames if math.isnan(end) else math.floor(end * fps + 0.5)
    if stop > num_frames or first >= num_frames:
        name, value = ("end", end) if stop > num_frames else ("start", start)
        raise ValueError(f"is {num_frames / fps:g} s long; {name}={value:g} lies behind its end")
    if not 0 <= first < stop:
        raise ValueError(f"has no frame between start={start:g} and end={end:g}, at {fps:g} frames per second")
    return range(first, stop)


class Segment:
    """A reader of a part of a file, which looks like a file of its own; `first` is its first frame in the file.

    Closes the reader that it is given. Raises MediaError if the file has no such part.
    """

    def __init__(self, reader: Reader, path: str, bounds: Bounds) -> None:
        try:
            part = frame_range(bounds, reader.info.num_frames, reader.info.fps)
        except ValueError as error:
            reader.close()
            raise MediaError(path, str(error)) from error
        self.reader, self.path, self.first = reader, path, part.start
        self.info = replace(reader.info, num_frames=len(part))

    def read(self, indices: Sequence[int], size: Size | None = None) -> np.ndarray:
        check_indices(self.path, indices, self.info.num_frames)
        return self.reader.read([self.first + index for index in indices], size)

    def close(self) -> None:
        self.reader.close()


def bounds_of(table: pd.DataFrame) -> list[Bounds]:
    """`start` and `end` of every row of a table, which need not have these columns."""
    return list(map(tuple, table.reindex(columns=SEGMENT).to_numpy(dtype=float)))


def has_segment(table: pd.DataFrame) -> pd.Series:
    """Which rows are a part of their file."""
    return table.reindex(columns=SEGMENT).notna().any(axis=1)


def count_frames(table: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The table with the frames of each segment for those of its file; and (row, reason) of the rows left out, because
    their files have no such part. Files with segments must have num_frames and fps."""
    counts, faults = table["num_frames"].to_numpy(dtype=float, copy=True), []
    kept = np.ones(len(table), dtype=bool)
    bounds = bounds_of(table)
    for place in np.flatnonzero(has_segment(table)):
        try:
            counts[place] = len(frame_range(bounds[place], int(counts[place]), table["fps"].iloc[place]))
        except ValueError as error:
            kept[place] = False
            faults.append((f"row {table['row'].iloc[place]} ({table['path'].iloc[place]})", str(error)))
    return table.assign(num_frames=counts)[kept].reset_index(drop=True), faults
