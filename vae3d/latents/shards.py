"""Files of a latent cache. Each is written atomically; a shard's marker is written last.

CACHE/meta.json                       autoencoder and settings of the latents
CACHE/shards/00000.safetensors        mean/KEY and std/KEY, mean/KEY, or sample/KEY, [C, t, h, w] each, raw
CACHE/shards/00000.statistics.safetensors
CACHE/shards/00000.json               marker: entries, errors, versions of source files, sizes and hashes of the files
CACHE/index.csv, data_errors.jsonl, statistics.json, complete.json (once all shards exist)
CACHE/npy/00000/000000012.mean.npy    on request; the number is that of index.csv
CACHE/webdataset/00000.tar            on request; samples are 000000012.mean.npy, ..., 000000012.json
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vae3d.arguments import check_fields
from vae3d.errors import UserError
from vae3d.hashing import file_hash, json_hash
from vae3d.io import atomic_dir, atomic_path, atomic_write, naming, read_text, save_tensors, write_json
from vae3d.latents.statistics import LatentStatistics

META = "meta.json"
INDEX = "index.csv"
ERRORS = "data_errors.jsonl"
STATISTICS = "statistics.json"
COMPLETE = "complete.json"
MARKER_NAME = re.compile(r"(\d{5,})\.json")
MAX_JSON_BYTES = 2**30  # a marker holds the texts of all its entries
KINDS = {"moments": ("mean", "std"), "mean": ("mean",), "sample": ("sample",)}  # store -> tensors of an entry


class CacheError(UserError):
    """A latent cache that is missing, incomplete, damaged, or made with other settings."""


class IndexRow(TypedDict):
    """A row of index.csv, of one entry; also in the marker of its shard, and as .json in tars.

    number: of the entry in the cache, from 0. frames, height, width: of its clip. latent: shape, such as 4x1x32x32.
    flip: whether the clip was mirrored. source: path of its file, and from `start` to `end` in it, in seconds. row: of
    the source's table. crc32: `checksum` of its tensors.
    """

    number: int
    key: str
    shard: int
    frames: int
    height: int
    width: int
    latent: str
    fps: float
    label: str
    split: str
    text: str
    flip: bool
    source: str
    start: float | None
    end: float | None
    row: int
    crc32: int


@dataclass
class ShardContent:
    """Content of a shard. rows: one per entry. tensors: by kind/key. errors: path, key, reason. sources:
    path -> source_version."""

    rows: list[IndexRow] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    sources: dict[str, Any] = field(default_factory=dict)

    def entry(self, row: IndexRow) -> dict[str, Tensor]:
        """The tensors of a row, by kind."""
        named = {kind: self.tensors.get(f"{kind}/{row['key']}") for kind in ("mean", "std", "sample")}
        return {kind: tensor for kind, tensor in named.items() if tensor is not None}


def shards_in(meta: Mapping[str, Any]) -> int:
    """How many shards a cache has when it is complete. meta: content of meta.json."""
    return math.ceil(meta["clips"] / meta["shard_size"])


def name_of(number: int) -> str:
    return f"{number:05d}"


def claim_name(number: int) -> str:
    return f"shard-{name_of(number)}"


def shard_file(cache: Path, number: int) -> Path:
    return cache / "shards" / f"{name_of(number)}.safetensors"


def marker_name(number: int) -> str:
    return f"shards/{name_of(number)}.json"


def marker_file(cache: Path, number: int) -> Path:
    return shard_file(cache, number).with_suffix(".json")


def statistics_file(cache: Path, number: int) -> Path:
    return shard_file(cache, number).with_suffix(".statistics.safetensors")


def numbers_done(cache: Path) -> set[int]:
    """The shards that have markers. One listing of the folder, however many there are."""
    try:
        return numbers_of(os.listdir(cache / "shards"))
    except FileNotFoundError:
        return set()


def numbers_of(names: Iterable[str]) -> set[int]:
    """The shards whose markers are among files of the folder `shards`."""
    return {int(match[1]) for match in map(MARKER_NAME.fullmatch, names) if match}


def stamp(file: Path) -> tuple[int, ...] | None:
    """Differs once a file was written again; None if it does not exist."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def summaries_of(number: int) -> tuple[str, str]:
    """The small files of a shard: its marker and its statistics."""
    return marker_name(number), f"shards/{name_of(number)}.statistics.safetensors"


def files_of(number: int, writers: Iterable[str]) -> list[str]:
    """The files and folders of a shard, without its marker."""
    name = name_of(number)
    layouts = {"npy": f"npy/{name}", "webdataset": f"webdataset/{name}.tar"}
    return [f"shards/{name}.safetensors", summaries_of(number)[1], *(layouts[writer] for writer in writers)]


def write_shard(
    cache: Path, number: int, shard: ShardContent, statistics: LatentStatistics, of: str, writers: list[str]
) -> None:
    """Write a shard, with the layouts of `writers`, and last its marker. of: digest of the cache's settings.

    The same content gives the same bytes. Raises FileError or CacheError if it cannot be written.
    """
    data, numbers = shard_file(cache, number), statistics_file(cache, number)
    for target, tensors in ((data, shard.tensors), (numbers, statistics.to_tensors())):
        try:
            with naming(target):
                target.parent.mkdir(exist_ok=True)
                with atomic_path(target) as tmp:
                    save_tensors(tensors, tmp)
        except SafetensorError as error:
            raise CacheError(f"{target}: {error}; run the same command again to resume") from error
    for writer in writers:
        WRITERS[writer](cache, number, shard)
    files = {file.name: {"bytes": file.stat().st_size, "sha256": file_hash(file)} for file in (data, numbers)}
    marker = {"of": of, "files": files, "sources": shard.sources, "rows": shard.rows, "errors": shard.errors}
    write_json(marker_file(cache, number), {**marker, "digest": json_hash(marker)})


def checksum(entry: Mapping[str, Tensor]) -> int:
    """CRC-32 of the tensors of an entry: names, dtypes, shapes and bytes. About 1 GB/s, faster than reading them."""
    value = 0
    for kind, tensor in entry.items():
        value = zlib.crc32(f"{kind} {tensor.dtype} {list(tensor.shape)}\n".encode(), value)
        value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy(), value)
    return value


def read_marker(cache: Path, number: int, *, verify: bool = True) -> dict[str, Any] | None:
    """The marker of a complete shard; None if there is none. verify: check its own hash.

    Raises CacheError if it is damaged.
    """
    file = marker_file(cache, number)
    if not file.is_file():
        return None
    marker = read_json(file)
    names = {shard_file(cache, number).name, statistics_file(cache, number).name}
    kinds = {"of": str, "files": dict, "sources": dict, "rows": list, "errors": list, "digest": str}
    sound = isinstance(marker, dict) and all(isinstance(marker.get(key), kind) for key, kind in kinds.items())
    if sound:
        sound = marker["files"].keys() == names and all(
            isinstance(file, dict) and type(file.get("bytes")) is int and type(file.get("sha256")) is str
            for file in marker["files"].values()
        )
    if sound and verify:
        sound = json_hash({key: value for key, value in marker.items() if key != "digest"}) == marker["digest"]
    if not sound:
        raise CacheError(f"{file} is damaged; delete it and encode again")
    return marker


def damage(cache: Path, number: int, marker: Mapping[str, Any], *, verify: bool = False) -> str | None:
    """What is wrong with a shard's files; None if nothing is. Compares sizes, and with `verify` hashes.

    The small statistics file is always hashed. Checksums of entries are compared when an entry is read.
    """
    for name, written in marker["files"].items():
        file = shard_file(cache, number).with_name(name)
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != written["bytes"]:
            return f"{file} has {file.stat().st_size} bytes; {written['bytes']} were written"
        if (verify or file == statistics_file(cache, number)) and file_hash(file) != written["sha256"]:
            return f"{file} has changed since it was written: its sha256 differs"
    return None


def read_statistics(cache: Path, numbers: Iterable[int]) -> LatentStatistics:
    """Statistics of these shards, at least one, merged in order."""
    parts = (_load_statistics(statistics_file(cache, number)) for number in numbers)
    total = next(parts)
    for part in parts:
        total.merge(part)
    return total


def _load_statistics(file: Path) -> LatentStatistics:
    try:
        return LatentStatistics.from_tensors(load_file(file))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise CacheError(
            f"{file} is damaged ({error}); delete {file.name.split('.')[0]}.json and encode again"
        ) from error


def write_npy(cache: Path, number: int, shard: ShardContent) -> None:
    """Write each tensor as a .npy file."""
    target = cache / "npy" / name_of(number)
    with naming(target), atomic_dir(target) as folder:
        for row in shard.rows:
            for kind, tensor in shard.entry(row).items():
                np.save(folder / f"{row['number']:09d}.{kind}.npy", tensor.numpy())


def write_webdataset(cache: Path, number: int, shard: ShardContent) -> None:
    """Write a tar file for webdataset: per entry its tensors as .npy and its row of index.csv as .json."""
    from webdataset import TarWriter  # slow to import

    target = cache / "webdataset" / f"{name_of(number)}.tar"
    with naming(target):
        target.parent.mkdir(exist_ok=True)
        # A fixed time, so that the same content gives the same bytes.
        with atomic_write(target) as stream, TarWriter(stream, user="", group="", mode=0o644, mtime=0) as tar:
            for row in shard.rows:
                arrays = {f"{kind}.npy": tensor.numpy() for kind, tensor in shard.entry(row).items()}
                tar.write({"__key__": f"{row['number']:09d}", **arrays, "json": row})


WRITERS: dict[str, Callable[[Path, int, ShardContent], None]] = {"npy": write_npy, "webdataset": write_webdataset}


def read_json(file: Path, fields: type | None = None, hint: str = "encode again") -> Any:
    """Read a JSON file with any text, unlike io.read_json, and check it against a TypedDict. Raises CacheError."""
    try:
        content = json.loads(read_text(file, MAX_JSON_BYTES), parse_constant=_no_constant)
        if fields is not None:
            check_fields(content, fields)
    except (ValueError, RecursionError) as error:  # ValueError: also FileError, and integers of 5000 digits
        raise CacheError(f"{file} cannot be used: {error}; {hint}") from error
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")
