"""Encoding a data set into a latent cache: by any number of processes, and again and again until it is complete."""

from __future__ import annotations

import json
import logging
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors
import torch
from torch import Tensor
from tqdm import tqdm

from vae3d import __version__
from vae3d.data.versions import source_version
from vae3d.data.workers import load
from vae3d.evaluation.tables import write_json
from vae3d.hashing import file_hash, json_hash
from vae3d.inference.folder import has_results, locked, settings_difference
from vae3d.io import naming, remove_unfinished, write_text
from vae3d.latents.cache import read_meta
from vae3d.latents.clips import FLIP, ClipReader, Error, Item, Read, Transform
from vae3d.latents.codec import LatentCodec, Moments
from vae3d.latents.identity import latent_config, vae_facts
from vae3d.latents.shards import (
    COMPLETE,
    FAULTS,
    INDEX,
    KINDS,
    META,
    STATISTICS,
    WRITERS,
    CacheError,
    Shard,
    damage,
    read_json,
    read_marker,
    read_statistics,
    write_shard,
)
from vae3d.latents.statistics import LatentStatistics, StatisticsError
from vae3d.precision import DTYPES
from vae3d.seeding import generator_of

SHOWN = 10  # errors in a message
# What of meta.json, beside autoencoder and transform, must be the same for a cache to be gone on with.
SAME = ("pixel_range", "precision", "store", "dtype", "flip", "seed", "clips", "clips_hash", "shard_size", "writers")
log = logging.getLogger("vae3d")


@dataclass
class Job:
    """What is encoded, and how it is kept.

    errors: rows of the source without a clip. store: moments (mean and deviation of the posterior), mean, or sample
    (drawn once, by (seed, key)). dtype: of the stored latents. flip: every clip also mirrored, as an entry of its own.
    shard_size: clips in a shard, which a process holds in memory and a kill loses. writers: further layouts, see
    shards.WRITERS. timeout: seconds without a clip after which WorkerTimeout is raised; 0: never. max_broken: share of
    clips that may fail. retry: encode shards with errors again. verify: how a resume finds replaced source files, by
    size and time (stat) or by content (hash, which also hashes the shards).
    """

    codec: LatentCodec
    checkpoint: str
    source: str
    folder: Path
    items: Sequence[Item]
    errors: Sequence[Error]
    transform: Transform
    store: str = "moments"
    dtype: str = "fp16"
    flip: bool = False
    seed: int = 0
    shard_size: int = 512
    batch_size: int = 8
    workers: int = 4
    timeout: float = 0.0
    reader: str = "auto"
    writers: list[str] = field(default_factory=list)
    max_broken: float = 0.2
    retry: bool = False
    verify: str = "stat"

    @property
    def shards(self) -> int:
        return math.ceil(len(self.items) / self.shard_size)

    def span(self, shard: int) -> range:
        """Numbers of a shard's items: a function of the source alone, not of the processes."""
        return range(shard * self.shard_size, min(len(self.items), (shard + 1) * self.shard_size))

    def meta(self) -> dict[str, Any]:
        """meta.json; `digest` stands for all that makes the cache what it is."""
        told = {
            "vae": vae_facts(self.codec, self.checkpoint),
            "pixel_range": self.codec.pixel_range,
            "precision": str(self.codec.dtype).removeprefix("torch."),
            "transform": asdict(self.transform),
            "transform_hash": json_hash(asdict(self.transform)),
            "store": self.store,
            "dtype": self.dtype,
            "latents": "raw; a diffusion model takes (z - shift) / scale, with the vae's shift and scale",
            "flip": self.flip,
            "seed": self.seed if self.store == "sample" else None,
            "source": self.source,
            "clips": len(self.items),
            "clips_hash": json_hash([item.key for item in self.items]),
            "shard_size": self.shard_size,
            "writers": self.writers,
            "versions": {
                "vae3d": __version__,
                "torch": torch.__version__,
                "safetensors": safetensors.__version__,
                "python": platform.python_version(),
            },
        }
        return {"digest": json_hash(identity(told)), **told}


def identity(meta: dict[str, Any]) -> dict[str, Any]:
    """What of meta.json must be the same for a cache to be gone on with, flat."""
    config = latent_config(meta["vae"]["config"] or {})
    return {
        "encoder's weights": meta["vae"]["encoder"],
        **{f"model.{name}": value for name, value in config.items()},
        **{f"transform.{name}": value for name, value in meta["transform"].items()},
        **{name: meta[name] for name in SAME},
    }


def encode_cache(job: Job, rank: int = 0, world_size: int = 1, wait: Callable[[], None] = lambda: None) -> None:
    """Make, or go on with, the cache of a job; `wait` returns when all ranks have called it.

    Complete shards whose source files are unchanged stay as they are; the others are made from the start, to the same
    bytes. Labels, splits and texts are those that the source has now.
    Raises CacheError for a folder that holds something else, and if more than max_broken of the clips fail; FolderError
    if another process writes to it.
    """
    with locked(job.folder, f"cache={job.folder}") if rank == 0 else nullcontext():
        _encode_locked(job, rank, world_size, wait)


def _encode_locked(job: Job, rank: int, world_size: int, wait: Callable[[], None]) -> None:
    if rank == 0:
        begin(job.folder, job.meta())
        for name in ("shards", *WRITERS):
            remove_unfinished(job.folder / name)
    wait()
    digest = read_json(job.folder / META)["digest"]
    mine = [shard for shard in range(rank, job.shards, world_size) if not _done(job, shard, digest)]
    if mine:
        (job.folder / COMPLETE).unlink(missing_ok=True)
        _encode(job, mine, digest, quiet=rank > 0)
    wait()
    if rank == 0:
        finish(job, digest)


def begin(folder: Path, meta: dict[str, Any]) -> None:
    """Write meta.json, or see that the one that is there says the same. Raises CacheError."""
    if linked := [name for name in ("shards", *WRITERS) if (folder / name).is_symlink()]:
        raise CacheError(
            f"{folder / linked[0]} is a symbolic link, and files would be written where it points; delete it"
        )
    if not (folder / META).is_file():
        if has_results(folder):
            raise CacheError(f"{folder} is not empty, and no latent cache; choose another folder")
        write_json(folder / META, meta)
    elif why := settings_difference(identity(read_meta(folder)), identity(meta)):
        raise CacheError(f"{folder} was begun otherwise: {why}; choose another folder, or delete this one")


def _done(job: Job, shard: int, digest: str) -> bool:
    """Whether a shard is complete, undamaged, and of the files that are there now."""
    try:
        marker = read_marker(job.folder, shard)
    except CacheError as error:
        log.warning("shard %d is encoded again: %s", shard, error)
        return False
    if marker is None or marker["of"] != digest or (job.retry and marker["errors"]):
        return False
    if "webdataset" in job.writers and any(row != row | _told(job, row) for row in marker["rows"]):
        return False  # its tar file tells of another label
    why = _replaced(job, shard, marker["sources"]) or damage(job.folder, shard, marker, verify=job.verify == "hash")
    if why:
        log.warning("shard %d is encoded again: %s", shard, why)
    return why is None


def _replaced(job: Job, shard: int, sources: Mapping[str, Any]) -> str | None:
    """Which source file of a shard is not the one that was encoded; None if all are."""
    keys = ("sha256", "dataset") if job.verify == "hash" else ("bytes", "modified", "dataset")
    for path in dict.fromkeys(job.items[number].path for number in job.span(shard)):
        versions = sources.get(path), source_version(path, job.verify == "hash")
        there, here = ([(version or {}).get(key) for key in keys] for version in versions)
        if there != here:
            unknown = job.verify == "hash" and there[0] is None and here[0] is not None and versions[0] is not None
            return f"{path} {'was encoded without verify=hash' if unknown else 'was replaced since it was encoded'}"
    return None


def _told(job: Job, row: dict[str, Any]) -> dict[str, str]:
    """What the source tells of an entry, which is no part of its latents."""
    item = job.items[row["number"] // 2 if job.flip else row["number"]]
    return {"label": item.label, "split": item.split, "text": item.text}


def _encode(job: Job, shards: Sequence[int], digest: str, quiet: bool) -> None:
    """Encode and write these shards."""
    numbers = [number for shard in shards for number in job.span(shard)]
    sides = job.transform.height, job.transform.width, job.transform.frames
    reads: Iterable[Read] = load(
        ClipReader(job.items, job.transform, job.reader, hashed=job.verify == "hash"),
        workers=job.workers,
        timeout=job.timeout,
        item_bytes=0 if None in sides else 3 * math.prod(sides),
        held=job.batch_size,
        sampler=numbers,
        batch_size=None,
        collate_fn=_as_it_is,
    )
    progress = iter(tqdm(reads, total=len(numbers), unit="clip", disable=True if quiet else None))
    errors: list[Error] = []
    for number in shards:
        shard, statistics = Shard(), LatentStatistics(job.codec.channels)
        for batch in _batches(islice(progress, len(job.span(number))), job.batch_size):
            _code(job, number, batch, shard, statistics)
        write_shard(job.folder, number, shard, statistics, digest, job.writers)
        errors += shard.errors
        if len(errors) > job.max_broken * len(job.items):
            raise CacheError(_too_many(errors, len(job.items), job.max_broken))


def _as_it_is(read: Read) -> Read:
    return read


def _batches(reads: Iterable[Read], size: int) -> Iterator[list[Read]]:
    """Clips that follow each other and are of one shape; errors alone."""
    batch: list[Read] = []
    for read in reads:
        if batch and (len(batch) == size or _shape(read) != _shape(batch[0]) or read.pixels is None):
            yield batch
            batch = []
        batch.append(read)
    if batch:
        yield batch


def _shape(read: Read) -> torch.Size | None:
    return None if read.pixels is None else read.pixels.shape


def _code(job: Job, number: int, batch: list[Read], shard: Shard, statistics: LatentStatistics) -> None:
    """Add the entries of a batch to a shard, or its error."""
    for read in batch:
        shard.sources.setdefault(job.items[read.number].path, read.version)
    if batch[0].pixels is None:
        item = job.items[batch[0].number]
        shard.errors.append({"key": item.key, "path": item.path, "reason": batch[0].error})
        return
    pixels = torch.stack([read.pixels for read in batch])
    versions = {"": job.codec.raw_moments(pixels)}
    if job.flip:
        versions[FLIP] = job.codec.raw_moments(pixels.flip(-1))
    for place, read in enumerate(batch):
        item = job.items[read.number]
        for flip, (suffix, moments) in enumerate(versions.items()):
            key = item.key + suffix
            kept = _kept(job, key, moments.mean[place], moments.std[place])
            try:
                statistics.update(*kept)
            except StatisticsError as error:
                shard.errors.append({"key": key, "path": item.path, "reason": str(error)})
                continue
            shard.tensors |= {f"{kind}/{key}": z for kind, z in zip(KINDS[job.store], kept, strict=True)}
            entry = 2 * read.number + flip if job.flip else read.number
            shard.rows.append(_row(item, read, key, entry, number, bool(flip), kept[0]))


def _kept(job: Job, key: str, mean: Tensor, std: Tensor) -> list[Tensor]:
    """What is stored of an entry, in its dtype, on the CPU."""
    kept = {"moments": [mean, std], "mean": [mean]}.get(job.store)
    if kept is None:
        generator = generator_of(job.seed, key, "sample")
        kept = [Moments(mean.cpu(), std.cpu()).sample(generator)]
    return [tensor.to("cpu", DTYPES[job.dtype]).contiguous() for tensor in kept]


def _row(item: Item, read: Read, key: str, entry: int, shard: int, flip: bool, z: Tensor) -> dict[str, Any]:
    """Of index.csv."""
    frames, height, width = read.pixels.shape[1:]
    start, end = (None if np.isnan(second) else second for second in item.bounds)
    return {
        "number": entry,
        "key": key,
        "shard": shard,
        "frames": frames,
        "height": height,
        "width": width,
        "latent": "x".join(map(str, z.shape)),
        "fps": read.fps,
        "label": item.label,
        "split": item.split,
        "text": item.text,
        "flip": flip,
        "source": item.path,
        "start": start,
        "end": end,
        "row": item.row,
    }


def finish(job: Job, digest: str) -> None:
    """Write what is told of all shards, and last that the cache is complete. Raises CacheError."""
    markers = [read_marker(job.folder, shard) for shard in range(job.shards)]
    if missing := [shard for shard, marker in enumerate(markers) if marker is None or marker["of"] != digest]:
        raise CacheError(
            f"{job.folder}: {len(missing)} of {job.shards} shards are missing ({missing[:SHOWN]}); do all processes "
            "write to the same folder?"
        )
    rows = [row | _told(job, row) for marker in markers for row in marker["rows"]]
    errors = [*job.errors, *(error for marker in markers for error in marker["errors"])]
    with naming(job.folder / FAULTS):
        write_text(job.folder / FAULTS, "".join(json.dumps(error) + "\n" for error in errors))
    clips = len(job.items) + len(job.errors)
    if len(errors) > job.max_broken * clips or not rows:
        raise CacheError(_too_many(errors, clips, job.max_broken) + f"; {job.folder / FAULTS} lists all")
    with naming(job.folder / INDEX):
        write_text(job.folder / INDEX, pd.DataFrame(rows).to_csv(index=False))
    statistics = read_statistics(job.folder, job.shards).summary()
    write_json(job.folder / STATISTICS, statistics)
    told = {"shards": job.shards, "entries": len(rows), "errors": len(errors)}
    hashes = {name: file_hash(job.folder / name) for name in (META, INDEX, STATISTICS)}
    write_json(job.folder / COMPLETE, told | {"sha256": hashes})
    log.info("%d entries of %d clips -> %s", len(rows), len(job.items), job.folder)
    if errors:
        log.warning("%d clips could not be encoded; %s tells which and why", len(errors), job.folder / FAULTS)
    if job.store == "moments" and not any(statistics["posterior_std"]):
        log.info("the encoder is deterministic: store=mean would take half the space")


def _too_many(errors: Sequence[Error], clips: int, most: float) -> str:
    shown = "; ".join(f"{error['path']}: {error['reason']}" for error in errors[:SHOWN])
    return f"{len(errors)} of {clips} clips cannot be encoded, more than max_broken={most}; the first: {shown}"
