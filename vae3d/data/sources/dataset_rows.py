"""Images and videos in datasets of Hugging Face. A table addresses a row by the range of an Arrow file that holds it:

    /folder/data-00000-of-00001.arrow@OFFSET+SIZE/SPLIT/COLUMN/ROW.hfimage        (rows count from 0)
    /folder/data-00000-of-00001.arrow@OFFSET+SIZE/SPLIT/COLUMN/ROW.hfvideo

which storage/files.py opens as it opens members of tars; so reading needs no package and no memory. What lists the
rows needs the package datasets (the extra `huggingface`), which goes online only for streams, and only with
VAE3D_ONLINE=1.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from glob import escape, glob
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import yaml

from vae3d.data.decoding.images import IMAGE_SUFFIXES
from vae3d.data.media import DataError
from vae3d.data.sources.table_files import kind_of
from vae3d.data.storage.paths import HF_IMAGE, HF_VIDEO, local_name
from vae3d.data.storage.stores import PACKAGES
from vae3d.text import one_line, plural

if TYPE_CHECKING:
    import datasets

IMAGE, VIDEO = "image", "video"
SUFFIXES = {IMAGE: HF_IMAGE, VIDEO: HF_VIDEO}
SAVED = ("dataset_dict.json", "state.json")  # of DatasetDict.save_to_disk, and of Dataset.save_to_disk
TABLES = (".parquet", ".arrow")
SHARDS_OF_SAVED = 64  # into which a stream divides a split that save_to_disk wrote, which is read at random anyway
LOCAL = ("file", "zip", "tar", "gzip", "bz2", "xz", "lz4", "zstd")  # protocols of archives, and of files
STORED = {"bytes", "path"}  # fields of an image or a video in Arrow
IMAGE_STARTS = (b"\xff\xd8", b"\x89PNG", b"BM", b"II*\0", b"MM\0*")  # JPEG, PNG, BMP, TIFF; WebP starts as AVI does


def member_name(split: str, column: str, row: int | str, kind: str) -> str:
    """SPLIT/COLUMN/ROW with a suffix, the name of a row's image or video."""
    return f"{quote(split, '')}/{quote(column, '')}/{row}{SUFFIXES[kind]}"


def row_paths(
    rows: datasets.Dataset, split: str, column: str, kind: str, size: int | None = None
) -> Iterator[tuple[list[str], np.ndarray]]:
    """(paths of the rows, [rows] whether a row has no bytes), for at most `size` rows at a time; None: those of a file.
    No bytes are read. Raises DataError."""
    before, after = member_name(split, column, "\0", kind).split("\0")
    files = [entry["filename"] for entry in rows.cache_files]
    counts = list(map(_count, files))
    if sum(counts) != len(rows):
        raise DataError(
            f"the Arrow files of the split {split} ({files[0]}, ...) have {plural(sum(counts), 'row')}, the dataset "
            f"has {len(rows)}; write it again with save_to_disk"
        )
    begin = 0
    for file, count in zip(files, counts, strict=True):
        offsets, sizes, empty = _ranges(file, column)
        for first in range(0, count, size or count or 1):
            part = slice(first, first + (size or count))
            yield (
                [
                    f"{file}@{offset}+{length}/{before}{row}{after}"
                    for row, (offset, length) in enumerate(
                        zip(offsets[part].tolist(), sizes[part].tolist(), strict=True), begin + first
                    )
                ],
                empty[part],
            )
        begin += count


def _count(file: str) -> int:
    """Rows of an Arrow file."""
    with pa.memory_map(file) as source:
        return sum(batch.num_rows for batch in pa.ipc.open_stream(source))


def _ranges(file: str, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """([rows] offset in the file and size of the bytes of a column, whether there are none). Raises DataError."""
    try:
        with pa.memory_map(file) as source:
            return _ranges_of(file, source.read_buffer(), column)
    except (pa.ArrowException, KeyError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is damaged: {one_line(error)}") from error


def _ranges_of(file: str, content: pa.Buffer, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts, begins = [], []  # of each record batch: its rows, and where its bytes begin in the file
    rows = 0
    offsets, nulls = [np.zeros(0, np.int64)], []  # nulls: (first row, mask) of batches with rows without bytes
    for batch in pa.ipc.open_stream(content):
        stored = batch.column(column)
        stored.validate(full=True)  # of the bytes, their offsets only
        values = stored.field("bytes")
        count = len(values)
        if stored.null_count or values.null_count:
            nulls.append((rows, ~(np.asarray(stored.is_valid()) & np.asarray(values.is_valid()))))
        _, places, data = values.buffers() if values.type != pa.null() else (None, None, None)
        if places is None or data is None or not data.size:
            offsets.append(np.zeros(count + 1, np.int64))
            begins.append(0)
        else:
            kind = np.dtype(np.int64 if pa.types.is_large_binary(values.type) else np.int32)
            offsets.append(np.frombuffer(places, kind, count + 1, values.offset * kind.itemsize))
            begins.append(data.address - content.address)
        counts.append(count)
        rows += count
    if any(not 0 <= begin <= content.size for begin in begins):
        raise DataError(f"{file} is compressed; write the dataset again with save_to_disk, which does not compress")
    starts = np.concatenate([batch[:-1] for batch in offsets]).astype(np.int64)
    ends = np.concatenate([batch[1:] for batch in offsets]).astype(np.int64)
    empty = np.zeros(len(starts), bool)
    for first, mask in nulls:
        empty[first : first + len(mask)] = mask
    return starts + np.repeat(begins, counts).astype(np.int64), ends - starts, empty


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
        splits = dict(opened) if isinstance(opened, dict) else {str(opened.split or "train"): opened}
        for rows in splits.values():
            rows.data.table.validate(full=True)  # wrong offsets would end the process
    return splits


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
    if remote := _remote_file(folder):
        raise DataError(
            f"{folder}: data files that its README.md or .huggingface.yaml names are on the network ({remote})"
        )


def is_online() -> bool:
    """Whether the user allows that datasets are streamed from the hub."""
    return os.environ.get("VAE3D_ONLINE") == "1"


def not_local(path: str, allowed: Container[str] = LOCAL) -> str | None:
    """The part of a path in a row, such as zip://a.mp4::/data/a.zip, that is opened by another protocol; None: no part.
    A word alone is one too in such a chain, for fsspec: reference::/data/a.json reads what a.json says, anywhere."""
    parts = path.split("::")
    for part in parts:
        protocol, mark, _ = part.partition("://")
        if protocol not in allowed and (mark or (len(parts) > 1 and re.fullmatch(r"\w+", part))):
            return part
    return None


def why_refused(path: str, folder: str) -> str | None:
    """Why a path in a row of a stream is not opened; None: it is. folder: the dataset, or its name on the hub, from
    where no row may name a file of this machine."""
    if not is_online() and (remote := not_local(path)):
        return f"is on the network ({remote}), and VAE3D_ONLINE=1 is not set"
    if other := not_local(path, {*LOCAL, *PACKAGES}):
        return f"is not read by that protocol ({other})"
    if not os.path.isdir(folder) and local_name(path.split("::")[-1]) is not None:
        return f"is a file of this machine ({path}), which a dataset on the hub cannot name"
    return None


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
    return any(os.path.isfile(os.path.join(folder, name)) for name in SAVED)  # False, and no error, without permission


def has_tables(folder: str | Path) -> bool:
    """Whether a folder has parquet or arrow files, in it or in its folder `data`."""
    places = (os.path.join(escape(str(folder)), place, "*") for place in (".", "data"))
    return any(name.lower().endswith(TABLES) for place in places for name in glob(place))


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


def _remote_file(folder: str) -> str | None:
    """What a repository's card or .huggingface.yaml names as data that is not in files of this machine, which even an
    offline load_dataset would open; None without any. Read as the library does. Raises DataError."""
    from huggingface_hub import DatasetCard

    card, settings = Path(folder, "README.md"), Path(folder, ".huggingface.yaml")
    try:
        metadata = DatasetCard.load(card).data.to_dict() if card.is_file() else {}
        metadata |= (yaml.safe_load(settings.read_text(encoding="utf-8")) or {}) if settings.exists() else {}
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{folder}: its README.md or .huggingface.yaml cannot be read: {one_line(error)}") from error
    texts = _texts_of(metadata.get("configs"))
    return next((text for text in texts if "://" in text or not_local(text)), None)


def _texts_of(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from (*_texts_of(key), *_texts_of(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts_of(inner)
    elif isinstance(value, str):
        yield value
