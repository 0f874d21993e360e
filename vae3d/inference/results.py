"""The results of vae3d infer on disk. When the same command resumes, it keeps finished files and writes the others.

<save_dir>_rec/command.json             settings and weights of the command, see vae3d.result_folder
<save_dir>_rec/.done/000001_a.json      written after the outputs of a file: their sizes, its scores, its source
<save_dir>_rec/.done/000001_a.fvd.npz   its features, for metrics that compare sets
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vae3d import result_folder
from vae3d.data.table.versions import source_version
from vae3d.evaluation.store import write_features
from vae3d.inference.comparison import Comparer
from vae3d.inference.reconstruct import KINDS, PAGES, FileResult, Reconstructor
from vae3d.io import FileError, read_text, remove, remove_unfinished, write_json
from vae3d.metrics import Score, VideoResult
from vae3d.report.page import CLIPS, remove_page, unpack_page

DONE = ".done"
OUTPUT = r"\.?\d{6,}_.*\.(mp4|mkv|png)"
REPORTS = r"index\.csv|(metrics|comparison|command)\.json"
Finished = tuple[FileResult, dict[str, Any] | None]  # a file and its comparison, see Comparer.file
MAX_BYTES = 2**30  # of .done/*.json, which has a number per frame and metric


class Results:
    """The finished files of a save_dir. comparer: None without a teacher."""

    def __init__(self, reconstructor: Reconstructor, comparer: Comparer | None) -> None:
        self.reconstructor, self.comparer = reconstructor, comparer
        self.folder = reconstructor.folder
        self.setting = f"save_dir={reconstructor.config.save_dir}"
        self.records = self.folder("rec") / DONE

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of save_dir. Raises FolderError if another process holds it."""
        with result_folder.locked(self.folder("rec"), self.setting):
            for kind in (*KINDS, *PAGES):
                remove_unfinished(self.folder(kind))
                remove_unfinished(self.folder(kind) / CLIPS)
            remove_unfinished(self.records)
            yield

    def begin(self, command: Mapping[str, Any], overwrite: bool) -> None:
        """Prepare the folders for a command. Raises FolderError if they hold another's results, unless `overwrite`."""
        full = [folder for kind in (*KINDS, *PAGES) if result_folder.has_results(folder := self.folder(kind))]
        if full and not result_folder.is_ours(self.folder("rec")):
            record = self.folder("rec") / result_folder.COMMAND
            raise result_folder.FolderError(
                f"{full[0]} is not empty, and without {record} its files may be anyone's; delete them, or choose "
                "another save_dir"
            )
        if full and not overwrite and result_folder.resumes(self.folder("rec"), command, self.setting):
            for kind in PAGES:
                unpack_page(self.folder(kind))
            return
        self.clear()
        result_folder.write_command(self.folder("rec"), command)

    def clear(self) -> None:
        """Delete what earlier commands with this save_dir wrote, and nothing else."""
        for kind in KINDS:
            folder = self.folder(kind)
            for file in folder.iterdir() if folder.is_dir() else ():
                if re.fullmatch(f"{OUTPUT}|{REPORTS}", file.name):
                    file.unlink()
        for kind in PAGES:
            remove_page(self.folder(kind))
        remove(self.records)

    def read(self, name: str, source: str) -> Finished | None:
        """A finished file, without its features; None if it is not finished, or its outputs, its features, its clip of
        the comparison's page or its source have changed.

        Raises FileError if its .done/*.json is damaged.
        """
        record_file = self._record(name)
        if not record_file.is_file():
            return None
        try:
            record = json.loads(read_text(record_file, MAX_BYTES))  # not by read_json: a name of a file may have `${`
            if record["source"] != source_version(source):
                return None
            for kind, output, size in record["outputs"]:
                path = self.folder(kind) / output
                if not path.is_file() or path.stat().st_size != size:
                    return None
            scores = {column: Score(**score) for column, score in record["scores"].items()}
            if not all(self.features_file(name, metric).is_file() for metric in record["features"]):
                return None
            file = FileResult(**record["file"], result=VideoResult(scores, counts=record["counts"]))
            if self.comparer is None:
                return file, None
            comparison = {key: record["comparison"][key] for key in ("file", "cost")}
            return (file, comparison) if self.comparer.has_clip(name) else None
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise FileError(f"{record_file}: is damaged ({error!r}); delete it to reconstruct {source} again") from None

    def discard(self, name: str) -> None:
        """Delete the outputs of a file before it is reconstructed."""
        self._record(name).unlink(missing_ok=True)
        for _, path in self.reconstructor.outputs(name):
            path.unlink()

    def write(self, source: str, version: Any, file: FileResult, comparison: dict[str, Any] | None) -> None:
        """Record a file as finished, after its outputs. version: of the source, taken before it was read."""
        outputs = [[kind, path.name, path.stat().st_size] for kind, path in self.reconstructor.outputs(file.id)]
        self.records.mkdir(exist_ok=True)
        for metric, features in file.result.features.items():
            write_features(self.features_file(file.id, metric), features)
        record = {
            "source": version,
            "outputs": outputs,
            "file": file.facts(),
            "scores": {column: asdict(score) for column, score in file.result.scores.items()},
            "counts": file.result.counts,
            "features": list(file.result.features),
            "comparison": comparison,
        }
        write_json(self._record(file.id), record)

    def _record(self, name: str) -> Path:
        return self.records / f"{name}.json"

    def features_file(self, name: str, metric: str) -> Path:
        return self.records / f"{name}.{metric}.npz"
