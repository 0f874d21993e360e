"""Latents in tar shards, which `vae3d encode writers=[webdataset]` writes: CACHE/webdataset/00000.tar, ...

Members of an entry are NUMBER.mean.npy and NUMBER.std.npy (or only one, or NUMBER.sample.npy) and NUMBER.json, its row
of index.csv. meta.json must be beside the tars or in the folder above, where the command writes it.
"""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from vae3d.data import objects
from vae3d.data.media import DataError, MediaError, one_line
from vae3d.data.paths import is_url, member_path
from vae3d.data.rows import exists
from vae3d.data.storage import local_range
from vae3d.data.tar_index import KEY, Sample, Settings, Shard, samples_of
from vae3d.data.webdataset import is_shards, is_tar, open_index
from vae3d.latents.cache import TEXT_COLUMNS, LatentCache
from vae3d.latents.codec import LatentCodec
from vae3d.latents.shards import COMPLETE, KINDS, META, CacheError, name_of, shards_in
from vae3d.text import plural

log = logging.getLogger("vae3d")

ARRAYS = ("mean", "std", "sample")
SCHEMA = pa.schema(
    [("offset", pa.int64()), ("size", pa.int64()), ("key", pa.string())]
    + [(kind, pa.int32()) for kind in ARRAYS]  # offset of its .npy from `offset`
    + [("row", pa.string())]  # of index.csv, as JSON
)
# fmt: off
COLUMNS = {
    "number", "key", "shard", "frames", "height", "width", "latent", "label", "split", "text", "flip", "source", "crc32"
}  # of a row
# fmt: on
TYPES = dict.fromkeys(("number", "shard", "frames", "height", "width", "crc32"), int) | {"key": str, "flip": bool}
LATENT = re.compile(r"[1-9][0-9]{0,6}(x[1-9][0-9]{0,6}){3}")


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
        _entry(text)
    except ValueError as error:
        raise DataError(f"{path}: {member.name} {error}; is it of vae3d encode?") from error
    return text


def _entry(text: str) -> dict[str, Any]:
    """A row of index.csv, of the text in a .json member. Raises ValueError for one that no cache has."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {one_line(error, 100)}") from error
    if not isinstance(row, dict) or not row.keys() >= COLUMNS:
        lacking = sorted(COLUMNS - set(row)) if isinstance(row, dict) else sorted(COLUMNS)
        raise ValueError(f"lacks {', '.join(lacking)}")
    for name, kind in TYPES.items():
        if type(row[name]) is not kind or (kind is int and not 0 <= row[name] < 2**62):
            raise ValueError(f"has {name}={row[name]!r:.40}")
    if not isinstance(row["latent"], str) or not LATENT.fullmatch(row["latent"]):
        raise ValueError(f"has latent={row['latent']!r:.40}, which is no shape of C x t x h x w")
    return row


class TarLatentCache(LatentCache):
    """A LatentCache whose entries are read from tar shards, local or at a URL, by one range read each.

    folder: a tar, a pattern of tars, a folder of them, or their index. With `verify`, all entries are read and compared
    with their checksums now. Other arguments and errors as of LatentCache.
    """

    _has_hashes = False

    def _locate(self, folder: str | Path) -> None:
        self.folder = str(folder)
        try:
            self._table, self._tars, _ = open_index([self.folder], Settings("latents"), scan=latent_rows)
        except DataError as error:
            raise CacheError(str(error)) from error
        self._top = _folder_with_meta(self._tars[0])

    def _check_shards(self, verify: bool) -> None:
        """Nothing to do: open_index compares the tars with their index."""

    def _read_index(self) -> pd.DataFrame:
        try:
            index = pd.DataFrame(map(_entry, self._table["row"].to_pylist()))
        except ValueError as error:
            raise CacheError(f"{self.folder}: a row of its index {error}; delete the index") from error
        index[list(TEXT_COLUMNS)] = index[list(TEXT_COLUMNS)].fillna("").astype(str)
        self.shards = len(pc.unique(self._table["shard"]))
        index["_row"] = range(len(index))
        self._check_whole(set(index["shard"]))
        return index

    def _check_whole(self, found: set[int]) -> None:
        """Raises CacheError if a folder or an index lacks tars of the cache. A tar or a pattern may be a part of it."""
        count = shards_in(self.meta)
        if is_tar(self.folder):
            log.info("%s has %d of %s", self.folder, len(found), plural(count, "shard"))
            return
        top = self._tars[0].rpartition("/")[0]
        for number in sorted(set(range(count)) - found):
            name = f"{name_of(number)}.tar"
            if not exists(f"{top}/{name}"):  # else one of which no clip could be encoded
                raise CacheError(
                    f"{self.folder} lacks {name}, and has {len(found)} of {plural(count, 'shard')}; encode again, or "
                    "give the tars by a pattern, such as FOLDER/*.tar"
                )

    def _select(self, index: pd.DataFrame, codec: LatentCodec | None, split: str | None, flips: bool) -> None:
        super()._select(index, codec, split, flips)
        table = self._table.drop_columns("row").take(pa.array(self.index.pop("_row")))
        del self._table  # workers need the members only
        columns = (table["shard"].combine_chunks().indices, table["offset"], table["size"])
        self._members = [
            member_path(self._tars[shard], offset, size, f"{number:09d}.npy")
            for shard, offset, size, number in zip(
                *(column.to_pylist() for column in columns), self.index["number"], strict=True
            )
        ]
        store = self.meta["store"]
        for kind in KINDS[store]:
            if kind not in table.column_names or table[kind].null_count:
                raise CacheError(f"{self.folder} has entries without .{kind}.npy, but {META} says store={store}")
        self._offsets = {kind: table[kind].to_pylist() for kind in KINDS[store]}  # within the member's range

    def _read(self, index: int) -> dict[str, Tensor]:
        try:
            content = local_range(self._members[index]).read()
            tensors = {}
            for kind, offsets in self._offsets.items():
                stream = io.BytesIO(content)
                stream.seek(offsets[index])
                tensors[kind] = torch.from_numpy(np.load(stream, allow_pickle=False))
        except (OSError, ValueError, EOFError, TypeError, OverflowError, MemoryError, MediaError) as error:
            raise CacheError(f"{self._members[index]} cannot be read: {one_line(error)}") from error
        return tensors

    def _damaged(self, index: int, why: str) -> CacheError:
        return CacheError(f"{self._members[index]}: {self._keys[index]} {why}; the tar is damaged: get it again")

    def _file(self, name: str, missing: str = "") -> Path:
        path = f"{self._top}/{name}"
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


def open_cache(path: str | Path, codec: LatentCodec | None = None, **settings: Any) -> LatentCache:
    """The latent cache of a folder, local or at a URL, or of tar shards, their folder or their index.

    settings: those of LatentCache. Raises CacheError.
    """
    if is_shards(path):
        return TarLatentCache(path, codec, **settings)
    if not is_url(path) or _is_folder_cache(str(path).rstrip("/")):
        return LatentCache(path, codec, **settings)
    try:
        return TarLatentCache(path, codec, **settings)
    except CacheError as error:
        raise CacheError(f"{path} is no latent cache, which has {COMPLETE}, and no tars of latents: {error}") from error


def _is_folder_cache(url: str) -> bool:
    """Whether a URL is a cache with an index, complete or not; a folder of tars may have meta.json too."""
    if exists(f"{url}/{COMPLETE}"):
        return True
    try:
        return exists(f"{url}/{META}") and any(name.startswith("shards/") for name in objects.listing(url))
    except MediaError:  # a server that lists nothing
        return False
