"""Videos and images in tar shards, in the layout of webdataset, as a table: every sample is one range read.

A row's path is TAR@OFFSET+SIZE/MEMBER (see storage/paths.py), so that the order of training, resuming, validation and
encoding are those of files. Nothing is extracted.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from glob import escape, glob
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from vae3d.arguments import check_arguments
from vae3d.data.decoding.readers import is_image, is_media
from vae3d.data.media import DataError, MediaError, StreamItem
from vae3d.data.sources.local_files import files_under
from vae3d.data.storage.cache import alone, cache_folder
from vae3d.data.storage.paths import is_http, is_url, local_name, member_path
from vae3d.data.storage.stores import find_objects, list_urls
from vae3d.data.table.rows import NUMBERS, exists, joined, rows_from_paths
from vae3d.data.table.segments import SEGMENT
from vae3d.data.tars.index import (
    INDEX,
    THREADS,
    Scan,
    Settings,
    build_index,
    check_shards,
    read_index,
    shard_paths,
)
from vae3d.data.tars.rows import media_member, member_paths, values_of
from vae3d.data.tars.samples import COMPRESSED_TAR, Shard, find_shard, samples_of
from vae3d.data.workers import processor_count
from vae3d.hashing import json_hash
from vae3d.text import plural

TAR = (".tar", *COMPRESSED_TAR)  # the compressed ones raise a clear error
log = logging.getLogger("vae3d")


class WebDataset:
    """The samples of tar shards: one video or image each, with the columns of a table in its .json, and text in .txt
    (or `caption` of .json) and class in .cls, all optional. Samples are as in webdataset: consecutive members whose
    names are equal up to the first dot.

    path: a tar, a pattern of tars such as shards/{000000..000999}.tar or shards/*.tar, a list of these, a folder of
    tars, or an index that `vae3d index` wrote (.arrow); local, or a URL. val_path: the same, of shards for validation;
    the others are then for training, whatever their `split`. media: extension of the member to read where samples have
    several videos or images. index: file of the index of `path`; None: index.arrow in the folder of the shards. If
    there is none that has all shards, the first pass makes it: there, or where that cannot be written, and of remote
    shards, in $VAE3D_CACHE/shards.

    streaming: read the shards from begin to end, without an index (see batches/streaming.py): for data that is not
    kept on this machine, and whose order need not be exact. shuffle: samples that each worker of a stream keeps in
    memory, to draw from.
    """

    @check_arguments
    def __init__(
        self,
        path: str | Path | Sequence[str],
        val_path: str | Path | Sequence[str] | None = None,
        media: str | None = None,
        index: str | None = None,
        streaming: bool = False,
        shuffle: int = 100,
    ) -> None:
        if shuffle < 1:
            raise DataError(f"data.source.shuffle={shuffle}: use 1, for the order of the shards, or more")
        self.paths, self.val_paths = _patterns(path), None if val_path is None else _patterns(val_path)
        self.media, self.index, self.streaming, self.shuffle = media, index, streaming, shuffle
        self.notes: list[str] = []
        self._indices: list[OpenIndex] | None = None

    def table(self) -> pd.DataFrame:
        """Raises DataError for shards that are missing, damaged, or changed since their index was made."""
        if self.streaming:
            raise DataError(
                "data.source.streaming=true is for training an autoencoder; what needs a table of all rows reads the "
                "shards with data.source.streaming=false"
            )
        return joined(self.pieces())

    def indices(self) -> list[OpenIndex]:
        """The indices of the shards: one, or with val_path two. Opened, or made, once. Raises DataError."""
        if self._indices is None:
            settings = Settings("media", self.media)
            indices = [open_shard_index(self.paths, settings, self.index, without=self.val_shards)]
            if self.val_paths is not None:
                val = open_shard_index(self.val_paths, settings, listed=self.val_shards)
                indices = [indices[0]._replace(split="train"), val._replace(split="val")]
            self._indices, self.notes = indices, [note for opened in indices for note in opened.notes()]
        return self._indices

    def pieces(self, size: int | None = None) -> Iterator[pd.DataFrame]:
        """The table in pieces of at most `size` rows; None: one piece per index. Raises DataError."""
        for opened in self.indices():
            for first in range(0, len(opened.table), size or len(opened.table)):
                piece = table_of_index(opened.table.slice(first, size), opened.shards)
                yield piece if opened.split is None else piece.assign(split=opened.split)

    def stream(self, role: str) -> TarStream | None:
        """The shards for training (`train`) or validation (`val`); None if there are none. Raises DataError."""
        if role == "train":
            return TarStream(self.paths, _others(list_all(self.paths), self.val_shards), self.media, role)
        return None if self.val_paths is None else TarStream(self.val_paths, self.val_shards, self.media, role)

    @cached_property
    def val_shards(self) -> list[str]:
        """The shards of val_path, which are not trained on, whatever `path` says. Listed once. Raises DataError."""
        return [] if self.val_paths is None else list_all(self.val_paths)


class OpenIndex(NamedTuple):
    """table: rows of an index. shards: absolute paths by number. file: where it is. split: of all rows; None: their
    own."""

    table: pa.Table
    shards: list[str]
    file: str
    split: str | None = None

    def used(self) -> list[str]:
        """Names of the shards of its rows, as the index has them."""
        return pc.unique(self.table["shard"]).to_pylist()

    def notes(self) -> list[str]:
        """Lines for the log."""
        count, used = plural(len(self.table), "sample"), plural(len(self.used()), "shard")
        lines = [f"{count} in {used}, by {self.file}"]
        given = "num_frames" in self.table.column_names
        if missing := self.table["num_frames"].null_count if given else len(self.table):
            lines.append(f"{missing} of them without num_frames: `vae3d index --probe` stores it in the index")
        folder = os.path.join((self.file if is_url(self.file) else os.path.abspath(self.file)).rpartition("/")[0], "")
        made_here = Path(self.file).is_relative_to(cache_folder())
        elsewhere = (
            [] if made_here else [shard for shard in self.shards if not shard.startswith(folder) or "/../" in shard]
        )
        if elsewhere:
            lines.append(f"{plural(len(elsewhere), 'shard')} that it lists are not beside it: {elsewhere[0]}, ...")
        return lines


def _patterns(path: str | Path | Sequence[str]) -> list[str]:
    paths = [str(path)] if isinstance(path, str | Path) else list(map(str, path))
    return [local_name(path) or path for path in paths]


class TarStream:
    """The samples of tars in their order; see streaming.ShardedStream. patterns: that gave the paths. role: train or
    val."""

    def __init__(self, patterns: Sequence[str], paths: Sequence[str], media: str | None, role: str) -> None:
        self.paths, self.media, self.role = paths, media, role
        self.name = f"{', '.join(patterns)} ({role})"

    @property
    def shards(self) -> int:
        return len(self.paths)

    def read(self, shard: int, first: int = 0) -> Iterator[StreamItem]:
        """Raises DataError for a damaged tar, and for samples that a stream cannot use as they mean to be used."""
        path = self.paths[shard]
        for number, sample in enumerate(samples_of(find_shard(path), lambda n, name: n >= first and is_media(name))):
            if number < first:
                continue
            member = media_member(path, sample, self.media)
            values, error = values_of(sample)
            if values.get("split", self.role) != self.role:
                raise DataError(
                    f"{path}: the sample {sample.key} has split={values['split']}, but a stream takes all samples: put "
                    "these into shards of their own (data.source.val_path), or use data.source.streaming=false"
                )
            if {"start", "end"} & values.keys():
                raise DataError(
                    f"{path}: the sample {sample.key} is a part of its file (start, end), and a stream reads whole "
                    "files; use data.source.streaming=false"
                )
            name = member_path(path, member.offset, member.size, member.name)
            yield StreamItem(name, member.content, "image" if is_image(member.name) else "video", error)


def table_of_index(index: pa.Table, shards: Sequence[str]) -> pd.DataFrame:
    """The table of an index's rows (see table/rows.py). shards: absolute paths, for the column `shard`."""
    numbers = index["shard"].combine_chunks()
    paths = member_paths(index, pa.array(shards, pa.large_string()).take(numbers.indices))
    own = pc.binary_join_element_wise(index["key"], index["extension"].cast(pa.string()), ".")
    names = pc.coalesce(index["name"], own) if "name" in index.column_names else own
    table = rows_from_paths(paths, names.to_pylist())
    for name in set(table.columns) & set(index.column_names) - {"name"}:
        if name in (*NUMBERS, *SEGMENT):
            table[name] = index[name].to_pandas().to_numpy(dtype=float)
        else:
            column = index[name].cast(pa.string()) if pa.types.is_dictionary(index[name].type) else index[name]
            table[name] = pd.Series(column.to_pylist(), dtype=object)
    return table


def is_tar(path: str) -> bool:
    """Whether the name of a file, or of an object at a URL, is that of a tar."""
    name = path.partition("?")[0] if is_url(path) else path
    return name.lower().endswith(TAR)


def is_shards(path: str | Path) -> bool:
    """Whether a path is that of tar shards, of their index, or a folder that has tars in it."""
    if is_tar(str(path)) or str(path).endswith(".arrow"):
        return True
    return not is_url(path) and os.path.isdir(path) and bool(glob(os.path.join(escape(str(path)), "*.tar")))


def is_indexed_url(url: str) -> bool:
    """Whether a URL is that of a folder with an index of shards. Asks its store, unless it is a pattern."""
    return not {"*", "{"} & set(url) and exists(_index_at(url))


def _index_at(url: str) -> str:
    return f"{url.rstrip('/')}/{INDEX}"


def list_shards(path: str) -> list[str]:
    """The tars of a pattern, a folder or an index, absolute, or URLs. Raises DataError if there is none."""
    if path.endswith(".arrow"):
        return shard_paths(read_index(path)[1], path)
    if is_url(path):
        try:
            found = list_urls(path) if is_tar(path) else [url for url in find_objects(path) if url.endswith(".tar")]
        except MediaError as error:
            raise DataError(str(error)) from error
    elif os.path.isdir(path):
        found = sorted(os.path.join(path, name) for name in files_under(path) if name.endswith(".tar"))
    else:
        found = list_urls(path)
    if not found:
        raise DataError(f"{path}: no tar files are there")
    return found if is_url(path) else list(map(os.path.abspath, found))


def list_all(patterns: Iterable[str]) -> list[str]:
    """list_shards of several patterns; of a folder over HTTP, which lists none, of its index if it has one. Raises
    DataError that names a tar that is listed twice."""
    paths = []
    for pattern in patterns:
        indexed = is_http(pattern) and not is_tar(pattern) and is_indexed_url(pattern)
        paths += list_shards(_index_at(pattern) if indexed else pattern)
    twice = next((path for path, count in Counter(paths).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{twice} is listed twice; name it once")
    return paths


def _own_name(path: str) -> str:
    """The same for a shard by whatever links it is reached; an object has the name that was given."""
    return path if is_url(path) else os.path.realpath(path)


def _others(paths: Sequence[str], without: Sequence[str]) -> list[str]:
    """Raises DataError if none is left."""
    if not without:
        return list(paths)  # links of 100,000 shards take a second to follow
    left_out = set(map(_own_name, without))
    others = [path for path in paths if _own_name(path) not in left_out]
    if paths and not others:
        raise DataError(f"data.source.val_path names all shards of data.source.path ({paths[0]}, ...): none is left")
    return others


def find_shards(paths: Iterable[str]) -> list[Shard]:
    """Tars as they are now. Raises DataError that names one that is missing."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(find_shard, paths))


def open_shard_index(
    patterns: Sequence[str],
    settings: Settings,
    index: str | None = None,
    scan: Scan | None = None,
    without: Sequence[str] = (),
    listed: Sequence[str] | None = None,
) -> OpenIndex:
    """The index of tar shards, made now if there is none.

    scan: see build_index. without: shards whose rows are left out. listed: list_all(patterns), if it is known. Raises
    DataError.
    """
    if len(patterns) == 1 and patterns[0].endswith(".arrow"):
        return _checked_index(patterns[0], settings, None, without)
    if len(patterns) == 1 and is_url(patterns[0]) and not is_tar(patterns[0]) and is_indexed_url(patterns[0]):
        return _checked_index(_index_at(patterns[0]), settings, None, without)
    paths = list_all(patterns) if listed is None else listed
    beside = index or index_of(patterns, paths)
    if _indexes(beside, paths, settings):
        return _checked_index(beside, settings, paths, without)
    if exists(beside):
        log.info("%s lacks some of the shards, or has other settings; another index is made", beside)
    shards = find_shards(paths)
    cached = cached_index(shards, settings)
    with alone(cached, "indices of shards"):
        is_free = not is_url(beside) and not os.path.exists(beside)
        own = is_free and os.access(os.path.dirname(os.path.abspath(beside)), os.W_OK)
        out = Path(beside) if own else cached
        if not cached.is_file() and (own or not _indexes(beside, paths, settings)):
            log.info("indexing %s once -> %s", plural(len(shards), "shard"), out)
            build_index(shards, out, settings, scan=scan, workers=processor_count())
    return _checked_index(str(cached if cached.is_file() else beside), settings, paths, without)


def _indexes(index: str, paths: Sequence[str], settings: Settings) -> bool:
    """Whether there is an index that has all of these shards. Raises DataError if there is another file."""
    if not exists(index):
        return False
    header = read_index(index)[1]
    return set(paths) <= set(shard_paths(header, index)) and header["settings"] == asdict(settings)


def cached_index(shards: Sequence[Shard], settings: Settings) -> Path:
    """Where the index of these shards, as they are now, is if there can be none beside them."""
    key = json_hash([asdict(settings), [asdict(shard) for shard in shards]])[:24]
    return cache_folder() / "shards" / f"{key}.arrow"


def index_of(patterns: Sequence[str], paths: Sequence[str]) -> str:
    """Where the index of shards is looked for: index.arrow in a folder that was given, or that contains them all."""
    if len(patterns) == 1 and os.path.isdir(patterns[0]):
        return os.path.join(os.path.abspath(patterns[0]), INDEX)
    folders = [path.rpartition("/")[0] for path in paths]
    return f"{folders[0]}/{INDEX}" if is_url(paths[0]) else os.path.join(os.path.commonpath(folders), INDEX)


def _checked_index(index: str, settings: Settings, wanted: Sequence[str] | None, without: Sequence[str]) -> OpenIndex:
    """wanted: the shards to open; None: all of the index."""
    table, header = read_index(index)
    if header["settings"]["kind"] != settings.kind:
        kinds = {"media": "videos and images", "latents": "latents"}
        raise DataError(f"{index} is an index of {kinds[header['settings']['kind']]}, not of {kinds[settings.kind]}")
    if settings.media not in (None, header["settings"]["media"]):
        made = header["settings"]["media"]
        raise DataError(f"{index} was made for media={made}, not {settings.media}; run vae3d index again")
    paths = shard_paths(header, index)
    wanted = _others(paths if wanted is None else wanted, without)
    check_shards(header, index, wanted)
    if set(wanted) != set(paths):
        chosen = np.flatnonzero(np.isin(paths, wanted))
        table = table.filter(pa.array(np.isin(table["shard"].combine_chunks().indices.to_numpy(), chosen)))
    if not len(table):
        raise DataError(f"{wanted[0] if wanted else index} has no samples")
    return OpenIndex(table, paths, index)
