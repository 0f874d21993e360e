"""A part of a file, from `start` to `end` in seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import pandas as pd

from vae3d.data.media import MediaError, Reader, Size, check_indices
from vae3d.data.readers import open_media

SEGMENT = ["start", "end"]  # columns of a table
ROUNDING = 1e-3  # seconds
SEGMENT_ERROR = "`start` and `end` must be seconds, 0 <= start < end"
Bounds = tuple[float, float]  # start and end; NaN: the file's own
WHOLE: Bounds = (math.nan, math.nan)


def frame_range(bounds: Bounds, times: np.ndarray, fps: float) -> range:
    """Numbers of the frames that are first shown from `start` up to, but without, `end`; so segments that meet share no
    frame.

    times: seconds of each frame since the first, ascending; they are compared to the millisecond, which is what some
    files store. fps: 0 of an image. Raises ValueError for a segment that is not in the file.
    """
    start, end = bounds
    if math.isnan(start) and math.isnan(end):
        return range(len(times))
    if not fps:
        raise ValueError("is an image, which has no part between a `start` and an `end`")
    last = max(1 / fps, float(times[-1] - times[-2]) if len(times) > 1 else 0.0)  # how long the last frame is shown
    duration = float(times[-1]) + last
    if start > times[-1] + ROUNDING or end > duration + 0.5 * last:
        name, value = ("start", start) if start > times[-1] + ROUNDING else ("end", end)
        raise ValueError(f"is {duration:g} s long; {name}={value:g} lies behind its end")
    first = 0 if math.isnan(start) else int(np.searchsorted(times, start - ROUNDING))
    stop = len(times) if math.isnan(end) else int(np.searchsorted(times, end - ROUNDING))
    if first >= stop:
        raise ValueError(f"has no frame between start={start:g} and end={end:g}, at {fps:g} frames per second")
    return range(first, stop)


def frame_times(reader: Reader) -> np.ndarray:
    """[frames] seconds since the first frame: those of a video file, or of a constant rate."""
    times = getattr(reader, "times", None)
    return np.arange(reader.info.num_frames) / (reader.info.fps or 1) if times is None else times


class Segment:
    """A reader of a part of a file, which looks like a file of its own; `first` is its first frame in the file.

    Closes the reader that it is given. Raises MediaError if the file has no such part.
    """

    def __init__(self, reader: Reader, path: str, bounds: Bounds) -> None:
        try:
            whole = math.isnan(bounds[0]) and math.isnan(bounds[1])
            part = range(reader.info.num_frames)
            if not whole:
                part = frame_range(bounds, frame_times(reader), reader.info.fps)
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


def is_segment(table: pd.DataFrame) -> pd.Series:
    """Which rows are a part of their file."""
    return table.reindex(columns=SEGMENT).notna().any(axis=1)


def count_frames(table: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The table with the frames of each segment for those of its file; and (row, reason) of the rows left out, because
    their files have no such part. Files with segments are opened: their own times say which frames a segment has."""
    counts, errors = table["num_frames"].to_numpy(dtype=float, copy=True), []
    kept = np.ones(len(table), dtype=bool)
    bounds, opened = bounds_of(table), {}
    for place in np.flatnonzero(is_segment(table)):
        path = table["path"].iloc[place]
        try:
            if path not in opened:
                with closing(open_media(path)) as reader:
                    opened = {path: (frame_times(reader), reader.info.fps)}  # of one file, for a table may be long
            counts[place] = len(frame_range(bounds[place], *opened[path]))
        except MediaError as error:
            reason = error.reason_for(path)
        except ValueError as error:
            reason = str(error)
        else:
            continue
        kept[place] = False
        errors.append((f"row {table['row'].iloc[place]} ({path})", reason))
    return table.assign(num_frames=counts)[kept].reset_index(drop=True), errors
