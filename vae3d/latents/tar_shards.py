"""Latents in tar shards, which `vae3d encode writers=[webdataset]` writes: CACHE/webdataset/00000.tar, ...

Members of an entry are NUMBER.mean.npy and NUMBER.std.npy (or only one, or NUMBER.sample.npy) and NUMBER.json, its row
of index.csv. meta.json must be beside the tars or in the folder above, where the command writes it.
"""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from vae3d.arguments import annotations_of
from vae3d.data.media import DataError, MediaError
from vae3d.data.sources.webdataset import is_tar, open_shard_index
from vae3d.data.storage.files import local_range
from vae3d.data.storage.paths import member_path
from vae3d.data.table.rows import exists
from vae3d.data.tars.index import Settings
from vae3d.data.tars.rows import KEY
from vae3d.data.tars.samples import Sample, Shard, samples_of
from vae3d.latents.metadata import TEXTS, read_meta_file, rows_error
from vae3d.latents.shards import KINDS, META, CacheError, IndexRow, name_of, shards_in
from vae3d.text import one_line, plural

log = logging.getLogger("vae3d")

ARRAYS = ("mean", "std", "sample")
SCHEMA = pa.schema(
    [("offset", pa.int64()), ("size", pa.int64()), ("key", pa.string())]
    + [(kind, pa.int32()) for kind in ARRAYS]  # offset of its .npy from `offset`
    + [("row", pa.string())]  # of index.csv, as JSON
)


def latent_rows(shard: Shard) -> pa.Table:
    """One row per entry: the range of bytes of its arrays, and its row of index.csv. Raises DataError."""
    rows = []
    for sample in samples_of(shard):
        arrays = {kind: sample.members[f"{kind}.npy"] for kind in ARRAYS if f"{kind}.npy" in sample.members}
        if not arrays or "json" not in sample.members:
            has = ", ".join(member.name for member in sample.members.values())
            raise DataError(f"{shard.path}: the sample {sample.key} is no latent with its .json, but {has}")
        first = min(array.offset for array in arrays.values())
        size = max(array.offset + array.size for array in arrays.values()) - first
        offsets = {kind: array.offset - first for kind, array in arrays.items()}
        rows.append({"offset": first, "size": size, "key": sample.key, "row": _row(shard.path, sample), **offsets})
    return pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata({KEY: "{}"})


def _row(path: str, sample: Sample) -> str:
    member = sample.members["json"]
    try:
        text = member.content.decode()
        _parse(text)
    except ValueError as error:
        raise DataError(f"{path}: {member.name} {error}; is it of vae3d encode?") from error
    return text


def _parse(text: str) -> dict[str, Any]:
    """The content of a .json member. Raises ValueError unless it has what a row of index.csv has."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {one_line(error, 100)}") from error
    if lacking := IndexRow.__required_keys__ - (row.keys() if isinstance(row, dict) else set()):
        raise ValueError(f"lacks {', '.join(sorted(lacking))}")
    return row


@dataclass
class TarEntries:
    """Entries of tar shards, local or at a URL: one range read each. Methods are those of FolderEntries.

    folder: that of meta.json. rows: key -> row of `columns`. columns: `tar`, index of `tars`; `offset` and `size` of
    the arrays in it; for each kind the offset of its array in these; `number`.
    """

    name: str
    folder: str
    meta: dict[str, Any]
    tars: list[str]
    rows: dict[str, int]
    columns: dict[str, np.ndarray]
    has_hashes: ClassVar[bool] = False

    @classmethod
    def open(cls, path: str | Path) -> tuple[TarEntries, pd.DataFrame]:
        """The entries of a tar, a pattern of tars, a folder of them, or their index, and their rows of index.csv."""
        name = str(path)
        try:
            opened = open_shard_index([name], Settings("latents"), scan=latent_rows)
            table, tars = opened.table, opened.shards
            index = pd.DataFrame(
                [_parse(text) for text in table["row"].to_pylist()], columns=list(annotations_of(IndexRow))
            )
        except DataError as error:
            raise CacheError(str(error)) from error
        except ValueError as error:
            raise CacheError(f"{name}: a row of its index {error}; delete the index") from error
        index[TEXTS] = index[TEXTS].fillna("").astype(str)
        folder = _folder_with_meta(tars[0])
        meta = read_meta_file(_file(folder, META))
        if why := rows_error(index, meta):
            raise CacheError(f"{name}: its index has {why}; delete the index")
        _check_whole(name, tars, shards_in(meta), set(index["shard"]))
        kinds = KINDS[meta["store"]]
        for kind in kinds:
            if kind not in table.column_names or table[kind].null_count:
                raise CacheError(f"{name} has entries without .{kind}.npy, but {META} says store={meta['store']}")
        columns = {column: table[column].to_numpy() for column in ("offset", "size", *kinds)}
        columns["tar"] = table["shard"].combine_chunks().indices.to_numpy()
        columns["number"] = index["number"].to_numpy()
        return cls(name, folder, meta, tars, {key: row for row, key in enumerate(index["key"])}, columns), index

    def read(self, shard: int, key: str) -> dict[str, Tensor]:
        member = self._member(key)
        try:
            content = local_range(member).read()
            tensors = {}
            for kind in KINDS[self.meta["store"]]:
                stream = io.BytesIO(content)
                stream.seek(self.columns[kind][self.rows[key]])
                tensors[kind] = torch.from_numpy(np.load(stream, allow_pickle=False))
        except (OSError, ValueError, EOFError, TypeError, OverflowError, MemoryError, MediaError) as error:
            raise CacheError(f"{member} cannot be read: {one_line(error)}") from error
        return tensors

    def damaged(self, shard: int, key: str, why: str) -> CacheError:
        return CacheError(f"{self._member(key)}: {key} {why}; the tar is damaged: get it again")

    def file(self, name: str) -> Path:
        return _file(self.folder, name)

    def _member(self, key: str) -> str:
        """The path of an entry's arrays, as of one member."""
        tar, offset, size, number = (
            int(self.columns[name][self.rows[key]]) for name in ("tar", "offset", "size", "number")
        )
        return member_path(self.tars[tar], offset, size, f"{number:09d}.npy")


def _check_whole(name: str, tars: list[str], count: int, found: set[int]) -> None:
    """Raises CacheError if a folder or an index lacks tars of the cache. A tar or a pattern may be a part of it.

    count: shards of the cache. found: those with entries.
    """
    if is_tar(name):
        log.info("%s has %d of %s", name, len(found), plural(count, "shard"))
        return
    folder = tars[0].rpartition("/")[0]
    for number in sorted(set(range(count)) - found):
        tar = f"{name_of(number)}.tar"
        if not exists(f"{folder}/{tar}"):  # else one of which no clip could be encoded
            raise CacheError(
                f"{name} lacks {tar}, and has {len(found)} of {plural(count, 'shard')}; encode again, or "
                "give the tars by a pattern, such as FOLDER/*.tar"
            )


def _file(folder: str, name: str) -> Path:
    path = f"{folder}/{name}"
    try:
        return local_range(path).file
    except (OSError, MediaError) as error:
        raise CacheError(f"{path} cannot be read: {one_line(error)}; it is written with the cache") from error


def _folder_with_meta(tar: str) -> str:
    """The folder of a cache's meta.json: that of its tars, or the one above. Raises CacheError."""
    folder = tar.rpartition("/")[0]
    for path in (folder, folder.rpartition("/")[0]):
        try:
            local_range(f"{path}/{META}")
        except (OSError, MediaError):
            continue
        return path
    raise CacheError(f"{folder} and the folder above have no {META}, which says which autoencoder made the latents")
