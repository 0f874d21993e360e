"""Parts of video files, from `start` to `end` in seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vae3d.data.decoding.readers import open_media
from vae3d.data.media import MediaError, Reader, Size, check_indices

if TYPE_CHECKING:
    import pandas as pd

SEGMENT = ["start", "end"]  # columns of a table
ROUNDING = 1e-3  # seconds
SEGMENT_ERROR = "`start` and `end` must be seconds, 0 <= start < end"
Bounds = tuple[float, float]  # start, end; NaN: of the file
WHOLE: Bounds = (math.nan, math.nan)


def frame_range(bounds: Bounds, times: np.ndarray, fps: float) -> range:
    """Indices of the frames with start <= time < end, so that adjacent segments share no frame.

    times: seconds of each frame since the first, ascending. They are compared to the millisecond, the resolution that
    some files store. fps: 0 for an image. Raises ValueError if the file has no such segment.
    """
    start, end = bounds
    if math.isnan(start) and math.isnan(end):
        return range(len(times))
    if not fps:
        raise ValueError("is an image; `start` and `end` are for videos")
    last = max(1 / fps, float(times[-1] - times[-2]) if len(times) > 1 else 0.0)  # duration of the last frame
    duration = float(times[-1]) + last
    if start > times[-1] + ROUNDING or end > duration + 0.5 * last:
        name, value = ("start", start) if start > times[-1] + ROUNDING else ("end", end)
        raise ValueError(f"is {duration:g} s long; {name}={value:g} is beyond its end")
    first = 0 if math.isnan(start) else int(np.searchsorted(times, start - ROUNDING))
    stop = len(times) if math.isnan(end) else int(np.searchsorted(times, end - ROUNDING))
    if first >= stop:
        raise ValueError(f"has no frame between start={start:g} and end={end:g}, at {fps:g} frames per second")
    return range(first, stop)


def frame_times(reader: Reader) -> np.ndarray:
    """[frames] seconds since the first frame; `times` of the reader if its rate is not constant."""
    times = getattr(reader, "times", None)
    return np.arange(reader.info.num_frames) / (reader.info.fps or 1) if times is None else times


class Segment:
    """A reader of a part of a file, which looks like a file of its own; `first` is its first frame in the file.

    Closes the reader that it is given. Raises MediaError if the file has no such part.
    """

    def __init__(self, reader: Reader, path: str, bounds: Bounds) -> None:
        try:
            part = frame_range(bounds, frame_times(reader), reader.info.fps)
        except ValueError as error:
            reader.close()
            raise MediaError(path, str(error)) from error
        self.reader, self.path, self.first = reader, path, part.start
        self.info, self.alpha = replace(reader.info, num_frames=len(part)), reader.alpha

    def read(self, indices: Sequence[int], size: Size | None = None) -> np.ndarray:
        check_indices(self.path, indices, self.info.num_frames)
        return self.reader.read([self.first + index for index in indices], size)

    def close(self) -> None:
        self.reader.close()


def bounds_of(table: pd.DataFrame) -> list[Bounds]:
    """`start` and `end` of every row of a table, which need not have these columns."""
    bounds = table.reindex(columns=SEGMENT).to_numpy(dtype=float).tolist()
    return [WHOLE if math.isnan(start) and math.isnan(end) else (start, end) for start, end in bounds]


def is_segment(table: pd.DataFrame) -> pd.Series:
    """[rows] whether a row is a part of its file."""
    return table.reindex(columns=SEGMENT).notna().any(axis=1)


def count_frames(table: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The table with num_frames of each segment instead of its file, and (row and path, reason) of removed rows, whose
    files have no such segment. Files with segments are opened for the times of their frames."""
    counts = table["num_frames"].to_numpy(dtype=float, copy=True)
    bounds, rows_of_file = bounds_of(table), {}
    for row in np.flatnonzero(is_segment(table)).tolist():
        rows_of_file.setdefault(table["path"].iloc[row], []).append(row)
    reasons: dict[int, str] = {}  # of rows
    for path, rows in rows_of_file.items():
        try:
            with closing(open_media(path, alpha=None)) as reader:
                times, fps = frame_times(reader), reader.info.fps
        except MediaError as error:
            reasons |= dict.fromkeys(rows, error.reason_for(path))
            continue
        for row in rows:
            try:
                counts[row] = len(frame_range(bounds[row], times, fps))
            except ValueError as error:
                reasons[row] = str(error)
    bad = sorted(reasons)
    errors = [(f"row {table['row'].iloc[row]} ({table['path'].iloc[row]})", reasons[row]) for row in bad]
    return table.assign(num_frames=counts).drop(table.index[bad]).reset_index(drop=True), errors
