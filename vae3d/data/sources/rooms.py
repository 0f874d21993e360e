"""Rooms as sequences of equirectangular panoramas, in the layout {root}/{area}/{room}/output/panorama_0000.png."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from vae3d.arguments import check_arguments
from vae3d.data.decoding.images import SEQUENCE_RATE, number_matcher
from vae3d.data.media import DataError
from vae3d.data.sources.local_files import report_unlisted
from vae3d.data.table.rows import rows_from_paths
from vae3d.seeding import seed_of

FOLDER = "output"  # of a room


class ErpRooms:
    """Each room of each area, as a video of the files that match `pattern`. No file is opened.

    Whole areas are held out for validation: `val_areas`, or (None) a tenth of all areas, at least one, chosen by the
    hash of their names. With a single area, rooms are held out instead: data.num_val_files applies.
    min_frames: rooms with fewer are skipped, and counted in `notes`.
    """

    @check_arguments
    def __init__(
        self,
        root: str | Path,
        pattern: str = "panorama_*.png",
        val_areas: Sequence[str] | None = None,
        min_frames: int = 5,
    ) -> None:
        self.root, self.pattern, self.val_areas, self.min_frames = Path(root), pattern, val_areas, min_frames
        self.notes: list[str] = []

    def table(self) -> pd.DataFrame:
        """Raises DataError if no room has enough files, or a validation area does not exist."""
        rooms = self._scan()
        where = f"{self.root}/AREA/ROOM/{FOLDER}/{self.pattern}"
        if not any(frames for _, _, frames in rooms):
            raise DataError(f"{where}: no such files; data.source.root takes the folder that holds the areas")
        kept = [(area, room, frames) for area, room, frames in rooms if frames >= self.min_frames]
        if not kept:
            largest = max(frames for _, _, frames in rooms)
            raise DataError(
                f"{where}: no room has {self.min_frames} files (data.source.min_frames); the largest has {largest}"
            )
        areas = [area for area, _, _ in kept]
        names = [f"{area}/{room}" for area, room, _ in kept]
        paths = [os.path.abspath(self.root / name / FOLDER / self.pattern) for name in names]
        table = rows_from_paths(paths, names).assign(num_frames=[float(n) for _, _, n in kept], fps=SEQUENCE_RATE)
        held_out = self._held_out(sorted(set(areas)))
        if held_out is not None:
            table["split"] = ["val" if area in held_out else "train" for area in areas]
            self.notes = [f"areas held out for validation: {', '.join(held_out) or 'none'}"]
        else:
            self.notes = ["there is only one area; rooms are held out for validation instead of areas"]
        short = f"; skipped: {len(rooms) - len(kept)} with fewer than {self.min_frames} frames"
        counts = f"{len(kept)} rooms of {len(set(areas))} areas in {self.root}"
        self.notes.insert(0, counts + (short if len(rooms) > len(kept) else ""))
        return table

    def _scan(self) -> list[tuple[str, str, int]]:
        """Area, room and number of files of every room that has an output folder."""
        try:
            matches = number_matcher(self.pattern)
        except ValueError as error:
            raise DataError(f"data.source.pattern: {error}") from error
        if not self.root.is_dir():
            raise DataError(f"{self.root}: no such folder; data.source.root takes the folder that holds the areas")
        rooms = []
        for area in _folders(self.root, self.root):
            for room in _folders(self.root / area, self.root):
                try:
                    names = os.listdir(self.root / area / room / FOLDER)
                except OSError as error:
                    report_unlisted(error)
                else:
                    rooms.append((area, room, sum(matches(name) is not None for name in names)))
        return rooms

    def _held_out(self, areas: list[str]) -> list[str] | None:
        if self.val_areas is None:
            return sorted(areas, key=seed_of)[: max(1, len(areas) // 10)] if len(areas) > 1 else None
        unknown = sorted(set(self.val_areas) - set(areas))
        if unknown:
            raise DataError(
                f"data.source.val_areas: {', '.join(unknown)} is no area of {self.root} with rooms of at "
                f"least {self.min_frames} frames; there are {', '.join(areas)}"
            )
        return list(self.val_areas)


def _folders(path: Path, root: Path) -> list[str]:
    """Names of the folders in one; none of one that cannot be listed, see report_unlisted."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        report_unlisted(error, top=root)
        return []
