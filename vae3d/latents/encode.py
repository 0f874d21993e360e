"""Encode a dataset into a latent cache, with any number of processes; the same command resumes."""

from __future__ import annotations

import json
import logging
import math
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import safetensors
import torch
from torch import Tensor

from vae3d import __version__
from vae3d.data.versions import source_version
from vae3d.data.workers import load, usable_workers
from vae3d.hashing import file_hash, json_hash
from vae3d.inference.folder import has_results, locked, settings_difference
from vae3d.io import remove_unfinished, write_json, write_text
from vae3d.latents import shards
from vae3d.latents.cache import read_meta
from vae3d.latents.clips import FLIP, ClipError, ClipReader, Item, Read, Transform
from vae3d.latents.codec import LatentCodec, Moments
from vae3d.latents.identity import latent_config, vae_metadata
from vae3d.latents.shards import COMPLETE, ERRORS, INDEX, KINDS, META, STATISTICS, WRITERS, CacheError, Shard
from vae3d.latents.statistics import LatentStatistics, StatisticsError
from vae3d.models.interface import VideoAutoencoder
from vae3d.pixels import no_waiting_checks
from vae3d.precision import DTYPES
from vae3d.progress import progress
from vae3d.seeding import generator_of
from vae3d.text import plural
from vae3d.transfer import on_host

if TYPE_CHECKING:
    from vae3d.config.latents import EncodeConfig

TILES = "tiles"  # key of meta.json, only there if they are blended
MAX_SHOWN = 10  # errors in a message
# Keys of meta.json, beside autoencoder and transform, that must be equal to resume.
KEYS = ("pixel_range", "precision", "store", "dtype", "flip", "seed", "clips", "clips_hash", "shard_size", "writers")
log = logging.getLogger("vae3d")


@dataclass
class EncodeJob:
    """What to encode. errors: of rows without a clip."""

    config: EncodeConfig
    codec: LatentCodec
    items: Sequence[Item]
    errors: Sequence[ClipError]
    transform: Transform

    @property
    def folder(self) -> Path:
        return Path(self.config.cache)

    @property
    def shards(self) -> int:
        return math.ceil(len(self.items) / self.config.shard_size)

    def span(self, shard: int) -> range:
        """Indices of a shard's items, the same for any number of processes."""
        return range(shard * self.config.shard_size, min(len(self.items), (shard + 1) * self.config.shard_size))

    def order(self, shard: int) -> list[int]:
        """Indices of a shard's items in the order in which they are encoded: bucket after bucket, so that batches
        fill."""
        return sorted(self.span(shard), key=lambda index: self.items[index].shape or ())

    def clips_per_batch(self, shape: Sequence[int]) -> int:
        """batch_size clips of the largest bucket; of a smaller one as many as have no more pixels. shape: (frames,
        height, width)."""
        largest = max(map(math.prod, self.transform.buckets or [shape]))
        return self.config.batch_size * largest // math.prod(shape)

    def meta(self) -> dict[str, Any]:
        """Content of meta.json; `digest` identifies the settings that must be equal to resume."""
        config = self.config
        content = {
            "vae": vae_metadata(self.codec, config.checkpoint),
            "pixel_range": self.codec.pixel_range,
            "precision": str(self.codec.dtype).removeprefix("torch."),
            "transform": self.transform.settings_dict(),
            "transform_hash": json_hash(self.transform.settings_dict()),
            "store": config.store,
            "dtype": config.dtype,
            **blended_tiles(self.codec.model),
            "latents": "raw; a diffusion model takes (z - latents_mean) / latents_std of the vae",
            "flip": config.flip,
            "seed": config.seed if config.store == "sample" else None,
            "source": str(config.source),
            "clips": len(self.items),
            "clips_hash": json_hash([item.key for item in self.items]),
            "shard_size": config.shard_size,
            "writers": config.writers,
            "versions": {
                "vae3d": __version__,
                "torch": torch.__version__,
                "safetensors": safetensors.__version__,
                "python": platform.python_version(),
            },
        }
        return {"digest": json_hash(identity(content)), **content}


def blended_tiles(model: VideoAutoencoder) -> dict[str, str]:
    """An entry for tiles that change latents; exact ones do not."""
    return {} if model.tiling is None or model.tiling.exact else {TILES: str(model.tiling)}


def identity(meta: dict[str, Any]) -> dict[str, Any]:
    """The settings in meta.json that must be equal to resume, flat."""
    config = latent_config(meta["vae"]["config"] or {})
    return {
        "encoder's weights": meta["vae"]["encoder"],
        **{f"model.{name}": value for name, value in config.items()},
        **{f"transform.{name}": value for name, value in meta["transform"].items()},
        **{name: meta[name] for name in (*KEYS, *([TILES] if TILES in meta else []))},
    }


def encode_cache(job: EncodeJob, rank: int = 0, world_size: int = 1, wait: Callable[[], None] = lambda: None) -> None:
    """Make or resume a cache. wait: a barrier of all ranks.

    Complete shards with unchanged source files are kept; others are encoded from scratch, to the same bytes. Labels,
    splits and texts are updated from the source.
    Raises CacheError for a folder with other content or settings, and if more than max_broken of the clips fail;
    FolderError if another process writes to it.
    """
    with locked(job.folder, f"cache={job.folder}") if rank == 0 else nullcontext():
        if rank == 0:
            begin(job.folder, job.meta())
            for name in ("shards", *WRITERS):
                remove_unfinished(job.folder / name)
        wait()
        digest = read_meta(job.folder)["digest"]
        todo = [shard for shard in range(rank, job.shards, world_size) if not _is_done(job, shard, digest)]
        if todo:
            (job.folder / COMPLETE).unlink(missing_ok=True)
            _encode_shards(job, todo, digest, quiet=rank > 0)
        wait()
        if rank == 0:
            finish(job, digest)


def begin(folder: Path, meta: dict[str, Any]) -> None:
    """Write meta.json, or check that the existing one has the same settings. Raises CacheError."""
    if linked := [name for name in ("shards", *WRITERS) if (folder / name).is_symlink()]:
        raise CacheError(f"{folder / linked[0]} is a symbolic link; files would be written to its target: delete it")
    if not (folder / META).is_file():
        if has_results(folder):
            raise CacheError(f"{folder} is not empty, and not a latent cache; choose another folder")
        write_json(folder / META, meta)
    elif why := settings_difference(identity(read_meta(folder)), identity(meta)):
        raise CacheError(f"{folder} was begun with other settings: {why}; choose another folder, or delete this one")


def _is_done(job: EncodeJob, shard: int, digest: str) -> bool:
    """Whether a shard is complete, undamaged, and its source files are unchanged."""
    try:
        marker = shards.read_marker(job.folder, shard)
    except CacheError as error:
        log.warning("shard %d is encoded again: %s", shard, error)
        return False
    if marker is None or marker["of"] != digest or (job.config.retry and marker["errors"]):
        return False
    if "webdataset" in job.config.writers and any(row != row | _labels(job, row) for row in marker["rows"]):
        return False  # its tar file has old labels
    verify = job.config.verify == "hash"
    why = _replaced(job, shard, marker["sources"]) or _other_bucket(job, marker["rows"])
    why = why or shards.damage(job.folder, shard, marker, verify=verify)
    if why:
        log.warning("shard %d is encoded again: %s", shard, why)
    return why is None


def _replaced(job: EncodeJob, shard: int, sources: Mapping[str, Any]) -> str | None:
    """Which source file of a shard was replaced since it was encoded; None if none was."""
    hashed = job.config.verify == "hash"
    keys = ("sha256", "dataset") if hashed else ("bytes", "modified", "dataset")
    for path in dict.fromkeys(job.items[number].path for number in job.span(shard)):
        old, new = sources.get(path), source_version(path, hashed)
        if [(old or {}).get(key) for key in keys] != [(new or {}).get(key) for key in keys]:
            unhashed = hashed and old is not None and "sha256" not in old and "sha256" in (new or {})
            return f"{path} {'was encoded without verify=hash' if unhashed else 'was replaced since it was encoded'}"
    return None


def _other_bucket(job: EncodeJob, rows: Sequence[dict[str, Any]]) -> str | None:
    """Which entry belongs in another bucket now, since the table has another size of its file; None if none does."""
    for row in rows:
        shape = _item(job, row).shape
        if shape is not None and shape != (row["frames"], row["height"], row["width"]):
            return f"{row['key']} goes to another bucket, {'x'.join(map(str, shape))}"
    return None


def _item(job: EncodeJob, row: dict[str, Any]) -> Item:
    """The item of an entry."""
    return job.items[row["number"] // 2 if job.config.flip else row["number"]]


def _labels(job: EncodeJob, row: dict[str, Any]) -> dict[str, str]:
    """Label, split and text of an entry, as the source has them now."""
    item = _item(job, row)
    return {"label": item.label, "split": item.split, "text": item.text}


def _encode_shards(job: EncodeJob, todo: Sequence[int], digest: str, quiet: bool) -> None:
    numbers = [number for shard in todo for number in job.order(shard)]
    config, transform = job.config, job.transform
    shapes = transform.buckets or [(transform.frames, transform.height, transform.width)]
    pixels = 0 if None in shapes[0] else max(map(math.prod, shapes))
    workers, notes = usable_workers(config.workers, "workers")
    for note in notes if not quiet else ():
        log.info(note)
    reads: Iterable[Read] = load(
        ClipReader(job.items, job.transform, config.reader, config.verify == "hash", job.codec.model.pixel_channels),
        workers=workers,
        timeout=config.timeout,
        item_bytes=job.codec.model.pixel_channels * pixels,
        held=config.batch_size,
        sampler=numbers,
        batch_size=None,
    )
    clips = iter(progress(reads, total=len(numbers), unit="clip", hidden=quiet))
    batches: deque[list[Read]] = deque()

    def encoded() -> Iterator[tuple[int, dict[str, Moments]]]:
        """Shard and moments of each of `batches`."""
        for number in todo:
            for batch in _batches(islice(clips, len(job.span(number))), job.clips_per_batch):
                batches.append(batch)
                yield number, _encode_batch(job, batch)

    errors: list[ClipError] = []
    for number, run in groupby(on_host(encoded(), job.codec.device), key=itemgetter(0)):
        shard, statistics = Shard(), LatentStatistics(job.codec.channels)
        for _, moments in run:
            _add_batch(job, number, batches.popleft(), moments, shard, statistics)
        shard.rows.sort(key=itemgetter("number"))
        shards.write_shard(job.folder, number, shard, statistics, digest, config.writers)
        errors += shard.errors
        if len(errors) > config.max_broken * len(job.items):
            raise CacheError(_too_many(errors, len(job.items), config.max_broken))


def _batches(reads: Iterable[Read], size: Callable[[Sequence[int]], int]) -> Iterator[list[Read]]:
    """Consecutive clips of one shape, `size` of (frames, height, width) at a time; errors stand alone."""
    for shape, run in groupby(reads, lambda read: None if read.pixels is None else read.pixels.shape):
        while batch := list(islice(run, 1 if shape is None else size(shape[1:]))):
            yield batch


def _encode_batch(job: EncodeJob, batch: list[Read]) -> dict[str, Moments]:
    """Suffix of the key -> moments of a batch, computed without waiting for a GPU; {} if it is an error."""
    if batch[0].pixels is None:
        return {}
    pixels = torch.stack([read.pixels for read in batch])
    with no_waiting_checks(job.codec.device):
        moments = {"": job.codec.raw_moments(pixels)}
        if job.config.flip:
            moments[FLIP] = job.codec.raw_moments(pixels.flip(-1))
    return moments


def _add_batch(
    job: EncodeJob,
    number: int,
    batch: list[Read],
    moments: Mapping[str, Moments],
    shard: Shard,
    statistics: LatentStatistics,
) -> None:
    """Add a batch to shard `number`, or its error. moments: of _encode_batch, in host memory that is used again."""
    for read in batch:
        shard.sources.setdefault(job.items[read.number].path, read.version)
    if not moments:
        item = job.items[batch[0].number]
        shard.errors.append({"key": item.key, "path": item.path, "reason": batch[0].error})
        return
    for index, read in enumerate(batch):
        item = job.items[read.number]
        for flip, (suffix, posterior) in enumerate(moments.items()):
            key = item.key + suffix
            stored = _stored_tensors(job, key, posterior.mean[index], posterior.std[index])
            try:
                statistics.update(*stored)
            except StatisticsError as error:
                shard.errors.append({"key": key, "path": item.path, "reason": str(error)})
                continue
            shard.tensors |= {f"{kind}/{key}": z for kind, z in zip(KINDS[job.config.store], stored, strict=True)}
            entry = 2 * read.number + flip if job.config.flip else read.number
            shard.rows.append(_row(item, read, key, entry, number, bool(flip), stored[0]))


def _stored_tensors(job: EncodeJob, key: str, mean: Tensor, std: Tensor) -> list[Tensor]:
    """Copies of the tensors of an entry, in the stored dtype."""
    if job.config.store == "sample":
        tensors = [Moments(mean, std).sample(generator_of(job.config.seed, key, "sample"))]
    else:
        tensors = [mean, std] if job.config.store == "moments" else [mean]
    return [tensor.to(DTYPES[job.config.dtype], copy=True).contiguous() for tensor in tensors]


def _row(item: Item, read: Read, key: str, entry: int, shard: int, flip: bool, z: Tensor) -> dict[str, Any]:
    """The row of an entry in index.csv."""
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


def finish(job: EncodeJob, digest: str) -> None:
    """Write errors, index and statistics of all shards, and last complete.json. Raises CacheError."""
    markers = [shards.read_marker(job.folder, shard) for shard in range(job.shards)]
    if missing := [shard for shard, marker in enumerate(markers) if marker is None or marker["of"] != digest]:
        raise CacheError(
            f"{job.folder}: {len(missing)} of {job.shards} shards are missing ({missing[:MAX_SHOWN]}); do all "
            "processes write to the same folder?"
        )
    rows = [row | _labels(job, row) for marker in markers for row in marker["rows"]]
    errors = [*job.errors, *(error for marker in markers for error in marker["errors"])]
    write_text(job.folder / ERRORS, "".join(json.dumps(error) + "\n" for error in errors))
    clips = len(job.items) + len(job.errors)
    if len(errors) > job.config.max_broken * clips or not rows:
        raise CacheError(_too_many(errors, clips, job.config.max_broken) + f"; {job.folder / ERRORS} lists all")
    write_text(job.folder / INDEX, pd.DataFrame(rows).to_csv(index=False))
    statistics = shards.read_statistics(job.folder, job.shards).summary()
    write_json(job.folder / STATISTICS, statistics)
    hashes = {name: file_hash(job.folder / name) for name in (META, INDEX, STATISTICS)}
    counts = {"shards": job.shards, "entries": len(rows), "errors": len(errors)}
    write_json(job.folder / COMPLETE, counts | {"sha256": hashes})
    log.info("%s of %s -> %s", plural(len(rows), "entry"), plural(len(job.items), "clip"), job.folder)
    if errors:
        log.warning("%s could not be encoded; see %s", plural(len(errors), "clip"), job.folder / ERRORS)
    if job.config.store == "moments" and not any(statistics["posterior_std"]):
        log.info("the encoder is deterministic: store=mean needs half the disk space")


def _too_many(errors: Sequence[ClipError], clips: int, max_broken: float) -> str:
    shown = "; ".join(f"{error['path']}: {error['reason']}" for error in errors[:MAX_SHOWN])
    return f"{len(errors)} of {clips} clips cannot be encoded, more than max_broken={max_broken}; the first: {shown}"
