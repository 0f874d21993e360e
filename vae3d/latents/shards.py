"""A latent cache on disk: shards that are written aside, renamed, and marked when they are complete.

CACHE/meta.json                       what the latents are of, and how they were made
CACHE/shards/00000.safetensors        mean/KEY and std/KEY, mean/KEY, or sample/KEY, [C, t, h, w] each, raw
CACHE/shards/00000.statistics.safetensors
CACHE/shards/00000.json               its entries and faults, sizes and hashes of its files; written last
CACHE/index.csv, faults.jsonl, statistics.json, complete.json (once all shards are there)
CACHE/npy/00000/000000012.mean.npy    on request; the number is that of index.csv
CACHE/webdataset/00000.tar            on request; its samples are 000000012.mean.npy, ..., 000000012.json
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vae3d.errors import UserError
from vae3d.latents.identity import file_hash
from vae3d.latents.statistics import LatentStatistics

META, INDEX, FAULTS, STATISTICS, COMPLETE = (
    "meta.json", "index.csv", "faults.jsonl", "statistics.json", "complete.json",
)  # fmt: skip
PARTIAL = ".partial"
KINDS = {"moments": ("mean", "std"), "mean": ("mean",), "sample": ("sample",)}  # tensors of an entry, by what is stored


class CacheError(UserError):
    """A latent cache that is missing, not complete, damaged, or of something else."""


@dataclass
class Shard:
    """What a shard holds. rows: of index.csv, one per entry; tensors: by kind/key; faults: path, key, reason."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)

    def entry(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a row, by kind."""
        named = {kind: self.tensors.get(f"{kind}/{row['key']}") for kind in ("mean", "std", "sample")}
        return {kind: tensor for kind, tensor in named.items() if tensor is not None}


def shard_file(cache: Path, number: int) -> Path:
    return cache / "shards" / f"{number:05d}.safetensors"


def marker_file(cache: Path, number: int) -> Path:
    return shard_file(cache, number).with_suffix(".json")


def statistics_file(cache: Path, number: int) -> Path:
    return shard_file(cache, number).with_suffix(".statistics.safetensors")


def write_shard(
    cache: Path, number: int, shard: Shard, statistics: LatentStatistics, of: str, writers: list[str]
) -> None:
    """Write a shard, what `writers` make of it, and last its marker. of: digest of the cache that it belongs to.

    The same content gives the same bytes. Raises OSError, CacheError if the disk does not take it.
    """
    data, numbers = shard_file(cache, number), statistics_file(cache, number)
    for target, tensors in ((data, shard.tensors), (numbers, statistics.to_tensors())):
        try:
            with aside(target) as file:
                save_file(tensors, file)
        except SafetensorError as error:
            raise CacheError(f"{target}: {error}; the same command goes on from here") from error
    for writer in writers:
        WRITERS[writer](cache, number, shard)
    files = {file.name: {"bytes": file.stat().st_size, "sha256": file_hash(file)} for file in (data, numbers)}
    write_json(marker_file(cache, number), {"of": of, "files": files, "rows": shard.rows, "faults": shard.faults})


def read_marker(cache: Path, number: int) -> dict[str, Any] | None:
    """What is known of a complete shard; None if there is none. Raises CacheError if it cannot be read."""
    file = marker_file(cache, number)
    return read_json(file) if file.is_file() else None


def damage(cache: Path, number: int, marker: Mapping[str, Any], *, verify: bool = False) -> str | None:
    """What is wrong with a shard's files, by their sizes, or with `verify` by their hashes; None if nothing is."""
    for name, told in marker["files"].items():
        file = shard_file(cache, number).with_name(name)
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != told["bytes"]:
            return f"{file} has {file.stat().st_size} bytes; {told['bytes']} were written"
        if verify and file_hash(file) != told["sha256"]:
            return f"{file} is not what was written: its sha256 differs"
    return None


def read_statistics(cache: Path, shards: int) -> LatentStatistics:
    """Of all shards together, merged in their order."""
    parts = (LatentStatistics.from_tensors(load_file(statistics_file(cache, number))) for number in range(shards))
    total = next(parts)
    for part in parts:
        total.merge(part)
    return total


def write_npy(cache: Path, number: int, shard: Shard) -> None:
    """A .npy file per tensor."""
    with aside(cache / "npy" / f"{number:05d}") as folder:
        folder.mkdir()
        for row in shard.rows:
            for kind, tensor in shard.entry(row).items():
                np.save(folder / f"{row['number']:09d}.{kind}.npy", tensor.numpy())


def write_tar(cache: Path, number: int, shard: Shard) -> None:
    """A tar file as the library webdataset reads it: .npy files and the row of index.csv as .json."""
    with aside(cache / "webdataset" / f"{number:05d}.tar") as file, tarfile.open(file, "w") as tar:
        for row in shard.rows:
            members = {f"{kind}.npy": _npy(tensor) for kind, tensor in shard.entry(row).items()}
            members["json"] = json.dumps(row).encode()
            for name, content in members.items():
                info = tarfile.TarInfo(f"{row['number']:09d}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


WRITERS: dict[str, Callable[[Path, int, Shard], None]] = {"npy": write_npy, "webdataset": write_tar}


def _npy(tensor: Tensor) -> bytes:
    stream = io.BytesIO()
    np.save(stream, tensor.numpy())
    return stream.getvalue()


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A path to write a file or a folder at; it gets its name when the block ends well, and is gone when it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}{PARTIAL}")
    _remove(unfinished)
    try:
        yield unfinished
        if unfinished.is_file():
            with unfinished.open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            _remove(target)  # a folder does not replace another
        unfinished.replace(target)
    finally:
        _remove(unfinished)


def is_whole(file: Path) -> bool:
    """Whether it is not what a killed process left of `aside`."""
    return not file.name.endswith(PARTIAL)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write_json(file: Path, content: Any) -> None:
    with aside(file) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(file: Path) -> Any:
    """Raises CacheError."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CacheError(f"{file} cannot be read: {error}") from error
