"""Image and video datasets of Hugging Face: in a local folder, or as a stream."""

from __future__ import annotations

import itertools
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from vae3d.arguments import check_arguments
from vae3d.data.media import DataError, StreamItem
from vae3d.data.sources.dataset_rows import (
    IMAGE,
    VIDEO,
    media_columns,
    member_name,
    nested_columns,
    open_splits,
    open_stream,
    opening_errors,
    row_paths,
    why_refused,
)
from vae3d.data.table.rows import joined, rows_from_paths
from vae3d.data.table.versions import file_stamp
from vae3d.text import one_line

if TYPE_CHECKING:
    import datasets

NO_LABEL = -1  # of test sets whose labels are kept secret
HELD_OUT = ("validation", "valid", "val", "test")  # the first that exists is the validation split
TEXTS = ("string", "large_string")  # types
ARCHIVE_ERRORS = (  # of an archive that a row names; RuntimeError: it has a password
    *(OSError, EOFError, ValueError, LookupError, TypeError, RuntimeError),
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
CAPTIONS = ("text", "caption", "prompt")  # the first that exists gives the captions


class HuggingFace:
    """The images or videos of a folder that `save_to_disk` wrote, or of a downloaded repository with parquet, arrow,
    tar, image or video files, as `datasets.load_dataset` reads it.

    split: for training; None: train, or the only split. val_split: for validation; None: the first that exists of
    validation, valid, val and test; without one, data.num_val_files applies. column: of images or videos; None: the
    only one. text_column: of captions; None: the first of text, caption and prompt that holds text. A column `label`
    gives the labels: classes by number. Rows without an image or a video get an error. `notes`: splits and counts.
    Never goes online, unless streaming is set, `path` is OWNER/NAME on the hub, and VAE3D_ONLINE=1.

    streaming: read the rows in the order of the files, without a table (see batches/streaming.py); for data that does
    not fit a disk. shuffle: rows that each worker keeps in memory, to draw from.
    """

    @check_arguments
    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        val_split: str | None = None,
        column: str | None = None,
        text_column: str | None = None,
        streaming: bool = False,
        shuffle: int = 100,
    ) -> None:
        if shuffle < 1:
            raise DataError(f"data.source.shuffle={shuffle}: use 1, for the order of the files, or more")
        self.path, self.split, self.val_split, self.column = path, split, val_split, column
        self.text_column, self.streaming, self.shuffle = text_column, streaming, shuffle
        self.notes: list[str] = []

    def table(self) -> pd.DataFrame:
        """Raises DataError if the folder is no dataset, or has no such split or column, or is to be streamed."""
        if self.streaming:
            raise DataError(
                "data.source.streaming=true is for training an autoencoder; what needs a table of all rows reads the "
                "dataset with data.source.streaming=false"
            )
        return joined(self.pieces())

    def pieces(self, size: int | None = None) -> Iterator[pd.DataFrame]:
        """The table in pieces of at most `size` rows; None: one piece per Arrow file. Raises DataError as `table`."""
        opened = self.open()
        self.notes = opened.notes()
        for name, role in opened.roles.items():
            for piece in _pieces(opened, name, size):
                yield piece.assign(split=role if opened.has_val else None)

    def open(self) -> OpenDataset:
        """The splits and columns that are used. Raises DataError."""
        folder = self._folder()
        splits = open_splits(folder)
        roles = self._roles(list(splits))
        rows = splits[next(iter(roles))]
        column, kind = self._column(folder, rows.features, lambda name: _first(rows, name))
        return OpenDataset(folder, splits, roles, column, kind, self._text_column(folder, rows.features))

    def versions(self) -> list[Any]:
        """What the table depends on: the settings, and name, size and time of every file in the folder."""
        folder = self._folder()
        found = []
        for here, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            files = (os.path.join(here, name) for name in sorted(names) if not name.startswith("."))
            found += [[os.path.relpath(file, folder), file_stamp(file)] for file in files]
        return [folder, self.split, self.val_split, self.column, self.text_column, found]

    def stream(self, role: str) -> HuggingFaceStream | None:
        """The rows for training (`train`) or validation (`val`); None if there are none. Raises DataError."""
        folder = self._folder()
        splits = open_stream(folder)
        roles = {role: name for name, role in self._roles(list(splits)).items()}
        if role not in roles:
            return None
        rows = splits[roles[role]]
        features = rows.features or next(iter(rows), {})  # unknown: as the first row
        column, kind = self._column(folder, features, lambda name: next(iter(rows), {}).get(name))
        return HuggingFaceStream(folder, roles[role], column, kind)

    def _folder(self) -> str:
        return os.path.abspath(self.path) if os.path.isdir(self.path) else str(self.path)

    def _roles(self, splits: Sequence[str]) -> dict[str, str]:
        """Split of the dataset -> split of the table (train, val, test). The training split comes first."""
        train = self.split or (splits[0] if len(splits) == 1 else "train")
        for key, name in (("split", train), ("val_split", self.val_split)):
            if name is not None and name not in splits:
                raise DataError(f"data.source.{key}={name}: {self.path} has only the splits {', '.join(splits)}")
        if train == self.val_split:
            raise DataError(
                f"data.source.val_split={train} is the training split of {self.path}; name another (it has "
                f"{', '.join(splits)}), or hold files out with data.num_val_files"
            )
        others = [name for name in (self.val_split, *HELD_OUT) if name in splits and name != train]
        roles = {train: "train"} | dict.fromkeys(others[:1], "val")
        return roles | ({"test": "test"} if "test" in splits and "test" not in roles else {})

    def _column(self, folder: str, features: Mapping[str, Any], first: Any) -> tuple[str, str]:
        """The chosen column, and "image" or "video"."""
        kinds = media_columns(features, first)
        column = self.column or (next(iter(kinds)) if len(kinds) == 1 else None)
        if column in kinds:
            return column, kinds[column]
        setting = "" if self.column is None else f"data.source.column={self.column}: "
        named = [
            f"{kind}s in {', '.join(name for name in kinds if kinds[name] == kind)}"
            for kind in (IMAGE, VIDEO)
            if kind in kinds.values()
        ]
        found = f"{' and '.join(named) or 'images or videos in none'} of its columns ({', '.join(features)})"
        if nested := nested_columns(features):
            found += f"; {', '.join(nested)} has several in each row: make one row of each"
        hint = "; set data.source.column to one of them" if kinds else ""
        raise DataError(f"{setting}{folder} holds {found}{hint}")

    def _text_column(self, folder: str, features: Mapping[str, Any]) -> str | None:
        texts = [name for name, kind in features.items() if getattr(kind, "dtype", None) in TEXTS]
        if self.text_column is None:
            return next((name for name in CAPTIONS if name in texts), None)
        if self.text_column not in texts:
            raise DataError(
                f"data.source.text_column={self.text_column}: {folder} holds text in {', '.join(texts) or 'none'} of "
                f"its columns ({', '.join(features)})"
            )
        return self.text_column


class OpenDataset(NamedTuple):
    """folder: of the dataset. roles: split of the dataset -> split of the table. column: of images or videos, as `kind`
    says. text: column of captions, if there is one."""

    folder: str
    splits: dict[str, datasets.Dataset]
    roles: dict[str, str]
    column: str
    kind: str
    text: str | None

    @property
    def has_val(self) -> bool:
        return "val" in self.roles.values()

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each split that is used."""
        return {name: len(self.splits[name]) for name in self.roles}

    def given(self) -> list[str]:
        """The columns of the table that may have values."""
        names = ["label"] * any("label" in self.splits[name].column_names for name in self.roles)
        names += ["text"] * (self.text is not None) + ["split"] * self.has_val
        return names + ["num_frames", "fps"] * (self.kind == IMAGE)

    def files(self) -> list[str]:
        """The Arrow files that hold the rows, which may lie in the cache of the library."""
        return [entry["filename"] for name in self.roles for entry in self.splits[name].cache_files]

    def notes(self) -> list[str]:
        """Lines for the log."""
        counts = ", ".join(f"{count} of {name} ({self.roles[name]})" for name, count in self.counts.items())
        return [f"{self.kind}s in the column {self.column} of {self.folder}: {counts}"]


class HuggingFaceStream:
    """The rows of a split, by shards (files, or parts of them); see streaming.ShardedStream. Opened where it is
    read."""

    def __init__(self, path: str, split: str, column: str, kind: str) -> None:
        self.path, self.split, self.column, self.kind = path, split, column, kind
        self.name = f"{kind}s in the column {column} of {path}, split {split}"

    @property
    def shards(self) -> int:
        return _shards(self.path, self.split, self.column).num_shards

    def read(self, shard: int, first: int = 0) -> Iterator[StreamItem]:
        rows = _shards(self.path, self.split, self.column)
        part = rows.shard(rows.num_shards, shard)
        # Not by __iter__, which in a worker would divide the shard among all workers.
        batches = (part.skip(first) if first else part).iter(batch_size=1)
        for row in itertools.count(first):
            with opening_errors(self.path):
                batch = next(batches, None)
            if batch is None:
                return
            yield self._item(f"{shard}-{row}", batch[self.column][0] or {})

    def _item(self, row: str, stored: Mapping[str, Any]) -> StreamItem:
        content, path = stored.get("bytes"), stored.get("path")
        name = f"{self.path}/{member_name(self.split, self.column, row, self.kind)}"
        if content is not None or not path:
            return StreamItem(name, content, self.kind, None if content is not None else f"has no {self.kind}")
        if reason := why_refused(path, self.path):
            return StreamItem(name, None, self.kind, reason)
        if "::" in path:  # a member of an archive
            try:
                with fsspec.open(path, "rb") as file:
                    return StreamItem(name, file.read(), self.kind)
            except ARCHIVE_ERRORS as error:
                return StreamItem(name, None, self.kind, f"cannot be read ({path}): {one_line(error)}")
        return StreamItem(path if "://" in path else os.path.join(self.path, path), None, self.kind)


@lru_cache(maxsize=4)
def _shards(folder: str, split: str, column: str) -> datasets.IterableDataset:
    """A column of a split, as it is stored."""
    return open_stream(folder)[split].select_columns([column])


def _first(rows: datasets.Dataset, column: str) -> Any:
    return rows.with_format("arrow")[0][column][0].as_py() if len(rows) else None


def _pieces(opened: OpenDataset, split: str, size: int | None) -> Iterator[pd.DataFrame]:
    """The rows of a split. Where only the path of an image or a video is stored, the row is that file."""
    rows, column, kind, text = opened.splits[split], opened.column, opened.kind, opened.text
    columns = rows.with_format("arrow")
    first = 0
    for paths, empty in row_paths(rows, split, column, kind, size):
        part = slice(first, first + len(paths))
        errors: list[str | None] = [None] * len(paths)
        if len(external := np.flatnonzero(empty)):
            stored = columns.select_columns([column])[part][column]
            files = pc.struct_field(stored, "path").take(pa.array(external)).to_pylist()
            for row, file in zip(external.tolist(), files, strict=True):
                if file:
                    paths[row] = os.path.join(opened.folder, file)
                else:
                    errors[row] = f"has no {kind}"
        table = rows_from_paths(paths, [f"{split}/{row}" for row in range(part.start, part.stop)])
        if "label" in columns.column_names:
            table["label"] = pd.Series(_labels(columns.select_columns(["label"])[part]["label"]), dtype=object)
        if text is not None and text in columns.column_names:
            table["text"] = columns.select_columns([text])[part][text].to_pylist()
        if kind == IMAGE:
            table = table.assign(num_frames=1.0, fps=0.0)
        yield table.assign(error=pd.Series(errors, dtype=object))
        first = part.stop
    if not first:
        yield rows_from_paths([], [])


def _labels(labels: pa.ChunkedArray) -> list[int | str | None]:
    kind = labels.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (is_text or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        return [None] * len(labels)
    return [None if label == NO_LABEL else label for label in labels.to_pylist()]
