"""The results of infer.py on disk: finished files are kept when the same command resumes, others are written again.

<save_dir>_rec/command.json            the settings and weights that made the results; see inference.folder
<save_dir>_rec/.done/000001_a.json     written after the outputs of a file, whose sizes, scores and source it holds
<save_dir>_rec/.done/000001_a.npz      its features, of metrics that compare sets
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vae3d.data.versions import source_version
from vae3d.evaluation.store import read_features, write_features
from vae3d.inference import folder as folders
from vae3d.inference.comparison import Comparer
from vae3d.inference.reconstruct import KINDS, Done, Reconstructor
from vae3d.io import FileError, naming, read_json, remove, remove_unfinished, write_json
from vae3d.metrics import Score, VideoResult

DONE = ".done"
OUTPUT = r"\.?\d{6,}_.*\.(mp4|png)"
REPORTS = r"index\.csv|(metrics|comparison|command)\.json"
MAX_BYTES = 2**30  # of a record: it holds a number per frame and metric


class Results:
    """What infer.py has made so far. prefix: its save_dir; comparer: if there is a teacher."""

    def __init__(self, reconstructor: Reconstructor, comparer: Comparer | None = None) -> None:
        self.prefix, self.folder, self.comparer = reconstructor.prefix, reconstructor.folder, comparer
        self.setting = f"save_dir={self.prefix}"
        self.done = self.folder("rec") / DONE

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of save_dir. Raises FolderError if another process does."""
        with folders.locked(self.folder("rec"), self.setting):
            for kind in KINDS:
                remove_unfinished(self.folder(kind))
            remove_unfinished(self.done)
            yield

    def begin(self, command: Mapping[str, Any], overwrite: bool) -> bool:
        """Make the folders ready for a command; whether it resumes.

        Raises FolderError if they hold something else and `overwrite` is false.
        """
        if overwrite:
            self.clear()
        full = [folder for kind in KINDS if folders.has_results(folder := self.folder(kind))]
        if full and not overwrite:
            if folders.resumes(self.folder("rec"), command, self.setting):
                return True
            raise folders.FolderError(f"{full[0]} is not empty; choose another save_dir, or set overwrite=true")
        folders.begin(self.folder("rec"), command)
        return False

    def clear(self) -> None:
        """Delete what reconstructions with this save_dir wrote, and nothing else."""
        for kind in KINDS:
            folder = self.folder(kind)
            for file in folder.iterdir() if folder.is_dir() else ():
                if re.fullmatch(f"{OUTPUT}|{REPORTS}", file.name):
                    file.unlink()
        remove(self.done)

    def read(self, name: str, source: str) -> tuple[Done, dict[str, Any] | None] | None:
        """The finished file of this name, and its comparison; None if it, or its source, is not what was recorded.

        Raises FileError for a damaged record.
        """
        file = self._record(name)
        if not file.is_file():
            return None
        record = read_json(file, MAX_BYTES)
        try:
            sizes = {self.folder(kind) / output: size for kind, output, size in record["outputs"]}
            if record["source"] != source_version(source) or any(_size(path) != size for path, size in sizes.items()):
                return None
            result = VideoResult(
                {column: Score(**score) for column, score in record["scores"].items()}, {}, record["counts"]
            )
            if record["features"]:
                result.features = {metric: read_features(self._features(name, metric)) for metric in record["features"]}
            done = Done(**record["file"], result=result)
            comparison = record["comparison"]
            if self.comparer is not None and comparison["cost"]:
                self.comparer.costs = comparison["cost"]
            return done, comparison and comparison["file"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileError(f"{file}: is damaged ({error!r}); delete it to reconstruct {source} again") from None

    def discard(self, name: str) -> None:
        """Delete everything of a file that is about to be made."""
        self._record(name).unlink(missing_ok=True)
        for kind in KINDS:
            for suffix in (".mp4", ".png"):
                (self.folder(kind) / f"{name}{suffix}").unlink(missing_ok=True)

    def write(self, source: str, version: Any, done: Done, comparison: dict[str, Any] | None) -> None:
        """Record a file as finished, once its outputs have their names. version: of the source, before it was read."""
        outputs = [
            [kind, path.name, path.stat().st_size]
            for kind in KINDS
            for path in (self.folder(kind) / f"{done.id}{suffix}" for suffix in (".mp4", ".png"))
            if path.is_file()
        ]
        self.done.mkdir(exist_ok=True)
        for metric, features in done.result.features.items():
            with naming(self._features(done.id, metric)):
                write_features(self._features(done.id, metric), features)
        costs = self.comparer.costs if self.comparer is not None else {}
        first = costs if costs.get("file") == done.id else None
        record = {
            "source": version,
            "outputs": outputs,
            "file": {field.name: getattr(done, field.name) for field in fields(done) if field.name != "result"},
            "scores": {column: asdict(score) for column, score in done.result.scores.items()},
            "counts": done.result.counts,
            "features": list(done.result.features),
            "comparison": None if comparison is None else {"file": comparison, "cost": first},
        }
        with naming(self._record(done.id)):
            write_json(self._record(done.id), record)

    def _record(self, name: str) -> Path:
        return self.done / f"{name}.json"

    def _features(self, name: str, metric: str) -> Path:
        return self.done / f"{name}.{metric}.npz"


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
