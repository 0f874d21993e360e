"""Files that are too small for what they are to be cut into."""

from __future__ import annotations

import numpy as np
import pandas as pd

from vae3d.data.clips import ClipSettings
from vae3d.data.probe import probe
from vae3d.data.readers import is_image
from vae3d.data.sources import DataError

SIZE = ["height", "width"]
LOOKED_AT = 2000  # evenly spaced images: they tell a share to about two percent


def leave_out_small(table: pd.DataFrame, min_side: int | None) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The table without the files whose shorter side is below `min_side`, and (path, reason) of these.

    The table must have heights and widths, unless `min_side` is None: then all stay.
    Raises DataError if none stays.
    """
    if min_side is None or table.empty:
        return table, []
    small = (table[SIZE].min(axis=1) < min_side).to_numpy()
    if small.all():
        largest = table[SIZE].min(axis=1).max()
        raise DataError(f"no file has a shorter side of data.min_side={min_side} pixels; the largest has {largest:.0f}")
    reasons = [
        (path, f"is {height:.0f}x{width:.0f}: left out, since data.min_side={min_side}")
        for path, height, width in table.loc[small, ["path", *SIZE]].values
    ]
    return table[~small].reset_index(drop=True), reasons


def warn_upscaled(table: pd.DataFrame, settings: ClipSettings) -> list[str]:
    """A line that tells how many files are enlarged, and so blurred, to fill a clip; none if there are none.

    Videos whose size the table does not have are not opened for this; of images without, the headers of LOOKED_AT are
    read.
    """
    known = table[SIZE].notna().all(axis=1)
    images = table.loc[~known & table["path"].map(is_image).astype(bool), "path"]  # of no rows, map makes no booleans
    looked_at = np.unique(np.linspace(0, len(images) - 1, min(LOOKED_AT, len(images))).astype(int))
    facts = probe(images.iloc[looked_at].tolist()) if len(images) else {}
    found = [
        [f["height"], f["width"]] for f in facts.values() if "error" not in f
    ]  # others are told when they are read
    sizes = np.concatenate([table.loc[known, SIZE].to_numpy(float), np.array(found, dtype=float).reshape(-1, 2)])
    small = int((sizes < [settings.height, settings.width]).any(axis=1).sum())
    wanted = f"{settings.height}x{settings.width}"
    if settings.short_side is not None:
        small = int((sizes.min(axis=1) < settings.short_side).sum())
        wanted = f"data.short_side={settings.short_side}"
    if not small:
        return []
    among = f"{len(sizes)} files" if len(sizes) == len(table) else f"{len(sizes)} files looked at, of {len(table)},"
    return [f"{small} of {among} are smaller than {wanted} and are enlarged; data.min_side leaves such files out"]
