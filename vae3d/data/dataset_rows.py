"""Images and videos in local Hugging Face datasets, addressed by paths (rows count from 0):

    /absolute/folder/of/the/dataset/SPLIT/COLUMN/ROW.hfimage
    /absolute/folder/of/the/dataset/SPLIT/COLUMN/ROW.hfvideo

A row's encoded bytes are a range of an Arrow file, which is memory-mapped: processes share its pages, and only the
requested rows are read. Needs the package datasets (the extra `huggingface`). Goes online only for streams, and only
with VAE3D_ONLINE=1.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import yaml

from vae3d.data.images import IMAGE_SUFFIXES
from vae3d.data.media import DataError, MediaError, one_line
from vae3d.data.storage import FileRange
from vae3d.data.tables import kind_of
from vae3d.text import plural

if TYPE_CHECKING:
    import datasets

IMAGE, VIDEO = "image", "video"
SUFFIXES = {IMAGE: ".hfimage", VIDEO: ".hfvideo"}
SAVED = ("dataset_dict.json", "state.json")  # of DatasetDict.save_to_disk, and of Dataset.save_to_disk
TABLES = (".parquet", ".arrow")
SHARDS_OF_SAVED = 64  # into which a stream divides a split that save_to_disk wrote, which is read at random anyway
STORED = {"bytes", "path"}  # fields of an image or a video in Arrow
IMAGE_STARTS = (b"\xff\xd8", b"\x89PNG", b"BM", b"II*\0", b"MM\0*")  # JPEG, PNG, BMP, TIFF; WebP starts as AVI does


def row_path(folder: str | Path, split: str, column: str, row: int | str, kind: str = IMAGE) -> str:
    """The path of a row's image or video, for open_media."""
    return os.path.join(os.path.abspath(folder), quote(split, ""), quote(column, ""), f"{row}{SUFFIXES[kind]}")


def is_row(path: str | Path) -> bool:
    return str(path).endswith(tuple(SUFFIXES.values()))


def is_image_row(path: str | Path) -> bool:
    return str(path).endswith(SUFFIXES[IMAGE])


def open_row(path: str | Path) -> BinaryIO:
    """The encoded image or video of a row. Raises MediaError if the row does not exist, or is empty."""
    column, row = _locate(path)
    return io.BytesIO(column.content(row))


def row_range(path: str | Path) -> FileRange:
    """The range of an Arrow file that holds a row. Raises MediaError as open_row does, and if the row has no bytes."""
    column, row = _locate(path)
    file, offset, size = column.range(row)
    if not size:
        raise MediaError(path, "is empty (0 bytes)")
    stat = os.stat(file)
    return FileRange(str(path), file, offset, size, (stat.st_size, stat.st_mtime_ns), (stat.st_dev, stat.st_ino))


def _locate(path: str | Path) -> tuple[Column, int]:
    folder, split, name, row = _parts(path)
    try:
        column = mapped(folder, split, name)
    except DataError as error:
        raise MediaError(path, str(error)) from error
    if row >= len(column):
        raise MediaError(path, f"the dataset has {plural(len(column), 'row')}, counted from 0")
    if column.is_null(row):
        raise MediaError(path, f"has no {IMAGE if is_image_row(path) else VIDEO}")
    return column, row


def version_of(path: str | Path) -> list[int] | None:
    """Bytes and modification time (ns) of the files of a row's dataset; None if it cannot be opened."""
    try:
        return list(_version(*_parts(path)[:3]))
    except (DataError, MediaError, OSError):
        return None


@lru_cache(maxsize=8)
def _version(folder: str, split: str, column: str) -> tuple[int, int]:
    stats = [os.stat(file["filename"]) for file in encoded(folder, split, column).cache_files]
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


def _parts(path: str | Path) -> tuple[str, str, str, int]:
    """Folder, split, column and row. Raises MediaError."""
    found = re.fullmatch(r"(.+)/([^/]+)/([^/]+)/([0-9]+)(\.hfimage|\.hfvideo)", str(path))
    if not found:
        kind = IMAGE if is_image_row(path) else VIDEO
        raise MediaError(path, f"is no row of a dataset: FOLDER/SPLIT/COLUMN/ROW{SUFFIXES[kind]}")
    return found[1], unquote(found[2]), unquote(found[3]), int(found[4])


@dataclass(frozen=True)
class _Chunk:
    """Rows of one record batch. offsets: [rows + 1], of the bytes from `start` in the file; null: [rows] bool, or None
    if all rows have bytes."""

    file: Path
    content: pa.Buffer  # the whole file, memory-mapped
    start: int
    offsets: np.ndarray
    null: np.ndarray | None


class Column:
    """The encoded bytes of a column of images or videos, in memory-mapped Arrow files.

    files: of the column's split, in order. rows: that all of them have. Raises DataError for compressed files.
    """

    def __init__(self, files: list[str], name: str, rows: int) -> None:
        self.chunks = [chunk for file in files for chunk in _chunks(file, name)]
        self.ends = np.cumsum([len(chunk.offsets) - 1 for chunk in self.chunks], dtype=np.int64)
        if len(self) != rows:
            raise DataError(
                f"the Arrow files of column `{name}` ({', '.join(files[:3])}) have {plural(len(self), 'row')}, the "
                f"dataset has {rows}; write it again with save_to_disk"
            )

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def is_null(self, row: int) -> bool:
        chunk, i = self._find(row)
        return chunk.null is not None and bool(chunk.null[i])

    def range(self, row: int) -> tuple[Path, int, int]:
        """File, offset, and size of a row's bytes."""
        chunk, i = self._find(row)
        first, last = chunk.offsets[i : i + 2].tolist()
        return chunk.file, chunk.start + first, last - first

    def content(self, row: int) -> pa.Buffer:
        """The bytes of a row, not copied."""
        _, offset, size = self.range(row)
        return self._find(row)[0].content.slice(offset, size)

    def nulls(self) -> np.ndarray:
        """[rows] bool: without bytes. Reads no bytes."""
        parts = [np.zeros(len(c.offsets) - 1, bool) if c.null is None else c.null for c in self.chunks]
        return np.concatenate(parts) if parts else np.zeros(0, bool)

    def _find(self, row: int) -> tuple[_Chunk, int]:
        number = int(np.searchsorted(self.ends, row, side="right"))
        return self.chunks[number], row - (int(self.ends[number - 1]) if number else 0)


def _chunks(file: str, name: str) -> list[_Chunk]:
    with pa.memory_map(file) as source:
        content = source.read_buffer()
    found = []
    for batch in pa.ipc.open_stream(content):
        stored = batch.column(name)
        values = stored.field("bytes")
        null = None
        if stored.null_count or values.null_count:
            null = ~np.asarray(stored.is_valid()) | ~np.asarray(values.is_valid())
        _, offsets, data = values.buffers() if len(values) and values.type != pa.null() else (None, None, None)
        kind = np.int64 if pa.types.is_large_binary(values.type) else np.int32
        if offsets is None:
            starts = np.zeros(len(values) + 1, kind)
        else:
            starts = np.frombuffer(offsets, kind)[values.offset : values.offset + len(values) + 1]
        start = data.address - content.address if data is not None and data.size else 0
        if not 0 <= start <= content.size:
            raise DataError(f"{file} is compressed; write the dataset again with save_to_disk, which does not compress")
        found.append(_Chunk(Path(file), content, start, starts, null))
    return found


@lru_cache(maxsize=8)
def mapped(folder: str, split: str, column: str) -> Column:
    """The bytes of a column. Raises DataError."""
    rows = encoded(folder, split, column)
    return Column([file["filename"] for file in rows.cache_files], column, len(rows))


@lru_cache(maxsize=8)
def encoded(folder: str, split: str, column: str) -> datasets.Dataset:
    """The column alone, as Arrow tables: images and videos are neither decoded nor copied. Raises DataError."""
    splits = open_splits(folder)
    if split not in splits or column not in media_columns(splits[split].features):
        raise DataError(f"{folder} has no split `{split}` with images or videos in a column `{column}`")
    return splits[split].select_columns([column]).with_format("arrow")


def media_columns(features: Mapping[str, Any], first: Callable[[str], Any] = lambda column: None) -> dict[str, str]:
    """Column -> "image" or "video".

    A column of {bytes, path} that names no type is what the suffix of its first row's path says or, without one, the
    first bytes. first: a column -> the first row's {bytes, path}, or None if there is none.
    """
    library = _library()
    kinds = {library.Image: IMAGE, getattr(library, "Video", library.Image): VIDEO}
    found = {}
    for name, kind in features.items():
        if type(kind) in kinds:
            found[name] = kinds[type(kind)]
        elif isinstance(kind, dict) and set(kind) == STORED:
            found[name] = _kind_of_content(first(name))
    return found


def nested_columns(features: Mapping[str, Any]) -> list[str]:
    """Columns that are lists or structures of images or videos."""
    media = set(media_columns(features))
    return [name for name, kind in features.items() if name not in media and _holds_media(kind)]


def _holds_media(kind: Any) -> bool:
    if isinstance(kind, dict):
        return any(map(_holds_media, kind.values()))
    if isinstance(kind, list | tuple):
        return any(map(_holds_media, kind))
    return bool(media_columns({"": kind})) or (hasattr(kind, "feature") and _holds_media(kind.feature))


def _kind_of_content(stored: Any) -> str:
    path, content = (stored or {}).get("path"), (stored or {}).get("bytes") or b""
    if path and Path(path).suffix:
        return IMAGE if Path(path).suffix.lower() in IMAGE_SUFFIXES else VIDEO
    is_image = content.startswith(IMAGE_STARTS) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")
    return IMAGE if is_image or not content else VIDEO


@lru_cache(maxsize=4)
def open_splits(folder: str) -> dict[str, datasets.Dataset]:
    """All splits of a dataset. Raises DataError if the folder holds none."""
    library = _library()
    _check_local(folder)
    with opening_errors(folder):
        load = library.load_from_disk if is_saved(folder) else library.load_dataset
        opened = load(folder, keep_in_memory=False)  # memory-mapped, also if IN_MEMORY_MAX_SIZE is set
    return dict(opened) if isinstance(opened, dict) else {str(opened.split or "train"): opened}


@lru_cache(maxsize=4)
def open_stream(path: str) -> dict[str, datasets.IterableDataset]:
    """All splits of a dataset, to be read in the order of its files; images and videos are not decoded.

    path: a folder or, with VAE3D_ONLINE=1, OWNER/NAME on the hub. Raises DataError.
    """
    library = _library()
    if os.path.isdir(path) or not is_hub_name(path):
        _check_local(path)
    elif not is_online():
        raise DataError(
            f"{path}: no such folder; VAE3D_ONLINE=1 in the environment allows to stream it from the hub; or get it "
            f"with: {download_command(path)}"
        )
    if is_saved(path):
        opened: Any = {
            name: rows.to_iterable_dataset(num_shards=min(len(rows), SHARDS_OF_SAVED) or 1)
            for name, rows in open_splits(path).items()
        }
    else:
        with opening_errors(path):
            opened = library.load_dataset(path, streaming=True)
    return {name: rows if rows.features is None else rows.decode(False) for name, rows in opened.items()}


@contextmanager
def opening_errors(path: str) -> Iterator[None]:
    """Turn errors of the package into DataError."""
    try:
        yield
    except (
        OSError,
        ValueError,
        ImportError,
        KeyError,
        pa.ArrowException,
        _library().exceptions.DatasetsError,
    ) as error:
        raise DataError(f"{path} cannot be opened as a dataset: {one_line(error, 500)}") from error


def _check_local(folder: str) -> None:
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder{how_to_download(folder)}")
    if remote := _remote_file(Path(folder)):
        raise DataError(f"{folder}: the data files that its README.md names are on the network ({remote})")


def is_online() -> bool:
    """Whether the user allows that datasets are streamed from the hub."""
    return os.environ.get("VAE3D_ONLINE") == "1"


def is_hub_name(path: str | Path) -> bool:
    """Whether `path` may be the name of a dataset on the hub, OWNER/NAME."""
    is_file_name = kind_of(path) is not None or Path(path).suffix == ".arrow"
    return not is_file_name and bool(re.fullmatch(r"\w[\w.-]*/[\w-][\w.-]*", str(path)))


def how_to_download(path: str | Path) -> str:
    """A hint if `path`, which does not exist, may be the name of a dataset on the hub; else empty."""
    if not is_hub_name(path):
        return ""
    streamed = "VAE3D_ONLINE=1 in the environment and data=hf_videos data.source.streaming=true"
    return f"; if it is a dataset on the hub, get it with: {download_command(path)}; or stream it: {streamed}"


def download_command(name: str | Path) -> str:
    return f"hf download {name} --repo-type dataset --local-dir {Path(name).name}"


def is_saved(folder: str | Path) -> bool:
    """Whether save_to_disk wrote it."""
    return any(Path(folder, name).is_file() for name in SAVED)


def has_tables(folder: str | Path) -> bool:
    """Whether a folder has parquet or arrow files, in it or in its folder `data`."""
    return any(file.suffix.lower() in TABLES for place in (".", "data") for file in Path(folder, place).glob("*"))


def _library() -> ModuleType:
    if not is_online():
        os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")  # read when the package is imported
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"datasets of Hugging Face need the extra `huggingface`: pip install datasets ({error})"
        ) from error
    return datasets


def _remote_file(folder: Path) -> str | None:
    """A URL of data in a repository's card, which even an offline load_dataset would open; None without one."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:  # load_dataset reports it
        return None
    configs = metadata.get("configs") if isinstance(metadata, dict) else None
    found = re.search(r"\w+://[^\s\"]+", json.dumps(configs, default=str))
    return found and found[0]
