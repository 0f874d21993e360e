"""Which rows of a table a run uses: how many may be broken, which are long enough, too small, or held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vae3d.data.file_table import FileTable, as_file_table
from vae3d.data.media import DataError
from vae3d.text import plural

if TYPE_CHECKING:
    import pandas as pd

    from vae3d.data.clips import ClipSettings

SHOWN = 10  # files in a message
SIZE = ["height", "width"]
PROBED_IMAGES = 2000  # evenly spaced, to estimate how many are too small


def clip_lengths(table: pd.DataFrame | FileTable, settings: ClipSettings) -> np.ndarray:
    """[rows] frames of the longest clip of each row."""
    table = as_file_table(table)
    stored = table.stored("length", settings)
    return settings.length(table.numbers("num_frames"), table.numbers("fps")) if stored is None else stored


def check_broken_share(first: Sequence[tuple[str, str]], count: int, rows: int, max_broken: float) -> None:
    """Raises DataError if `count` of the rows, such as (path, reason) in `first`, are more than the share."""
    if count > max_broken * rows:
        shown = "\n".join(f"  {path}: {reason}" for path, reason in first[:SHOWN])
        raise DataError(
            f"{count} of {rows} files cannot be read, more than data.max_broken={max_broken}; the first:\n"
            f"{shown}\n  vae3d check-data FILE lists them all"
        )


def too_small(height: np.ndarray, width: np.ndarray, min_side: int | None) -> np.ndarray:
    """[rows] whether a file's shorter side is below `min_side`; None keeps every file. All sizes must be known.

    Raises DataError if no file is left.
    """
    if min_side is None or not len(height):
        return np.zeros(len(height), dtype=bool)
    shorter = np.minimum(height, width)
    small = shorter < min_side
    if small.all():
        raise DataError(
            f"no file has a shorter side of data.min_side={min_side} pixels; the largest has {shorter.max():.0f}"
        )
    return small


def why_too_small(height: float, width: float, min_side: int | None) -> str:
    return f"is {height:.0f}x{width:.0f}: skipped, because data.min_side={min_side}"


def skipped_note(count: int, min_side: int | None) -> str:
    return f"skipped: {plural(count, 'file')} smaller than data.min_side={min_side}"


def upscaled_notes(
    height: np.ndarray, width: np.ndarray, probed: Sequence[Sequence[float]], settings: ClipSettings
) -> list[str]:
    """A line with the number of files that must be enlarged to fill a clip; none if there are none.

    height, width: of all rows; NaN: unknown. probed: [height, width] of some of the files of these.
    """
    some = np.array(probed, dtype=float).reshape(-1, 2)
    known = int((~np.isnan(height) & ~np.isnan(width)).sum()) + len(some)
    small = sum(int(_enlarged(h, w, settings).sum()) for h, w in ((height, width), some.T))
    if not small:
        return []
    needed = f"{settings.height}x{settings.width}"
    if settings.short_side is not None:
        needed = f"data.short_side={settings.short_side}"
    total = f"{known} files" if known == len(height) else f"{known} files (of {len(height)})"
    return [f"{small} of {total} are smaller than {needed} and are enlarged; data.min_side skips such files"]


def _enlarged(height: np.ndarray, width: np.ndarray, settings: ClipSettings) -> np.ndarray:
    """[rows] whether a file is smaller than a clip; False where its size is unknown."""
    if settings.short_side is not None:
        return np.minimum(height, width) < settings.short_side
    return ((height < settings.height) | (width < settings.width)) & ~np.isnan(height) & ~np.isnan(width)


def evenly_spaced(count: int, chosen: int) -> np.ndarray:
    """Indices below `count`, `chosen` of them if there are so many."""
    return np.unique(np.linspace(0, count - 1, min(chosen, count)).astype(int))


def is_held_out(hashes: np.ndarray, num_val_files: int) -> np.ndarray:
    """[rows] whether a row is held out: of the files with the lowest hashes, at most a tenth of all, and at least one
    if there are two. hashes: of file_hashes."""
    files = np.unique(hashes)
    lowest = files[: min(num_val_files, max(1, len(files) // 10))]
    return np.isin(hashes, lowest) & (len(files) > 1)
