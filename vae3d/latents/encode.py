"""Encode a dataset into a latent cache, with any number of processes; the same command resumes.

Processes share only the storage of the cache (latents.cache_storage). Each claims one shard at a time
(latents.claims), so a slow one does not hold up the others, and a lost one is replaced. A clip's latents depend on its
shard alone, in which batches are formed, never on who encodes it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import random
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import safetensors
import torch
from torch import Tensor

from vae3d import __version__
from vae3d.data.decoding.readers import check_reader, decodes_on_gpu
from vae3d.data.table.rows import QUOTED_CSV
from vae3d.data.table.versions import source_version
from vae3d.data.workers import load, shared_memory_free, usable_workers
from vae3d.errors import UserError
from vae3d.hashing import file_hash, json_hash
from vae3d.io import FileError, write_json, write_text
from vae3d.latents import shards
from vae3d.latents.cache_storage import LocalStorage, ObjectStorage, storage_of
from vae3d.latents.claims import BEATS, Claims
from vae3d.latents.clips import FLIP, ClipError, ClipReader, Item, Read, Transform, runs_of_files
from vae3d.latents.codec import LatentCodec, Moments
from vae3d.latents.identity import latent_config, vae_metadata
from vae3d.latents.metadata import read_complete, read_meta_file
from vae3d.latents.shards import COMPLETE, ERRORS, INDEX, KINDS, META, STATISTICS, CacheError, IndexRow, ShardContent
from vae3d.latents.statistics import LatentStatistics, StatisticsError
from vae3d.models.interface import VideoAutoencoder
from vae3d.pixels import no_waiting_checks
from vae3d.precision import DTYPES
from vae3d.progress import progress
from vae3d.result_folder import settings_difference
from vae3d.seeding import generator_of
from vae3d.text import plural
from vae3d.transfer import on_host

if TYPE_CHECKING:
    from vae3d.config.latents import EncodeConfig

TILES = "tiles"  # key of meta.json, only there if they are blended
MAX_SHOWN = 10  # errors in a message
FINISH = "finish"  # the claim of the process that completes the cache
POLL = 2.0  # seconds between two looks at what others do
RUN_CLIPS, RUN_BYTES = 16, 2**24  # of one file, that a worker reads and sends at once, at most
# Keys of meta.json, beside autoencoder and transform, that must be equal to resume.
KEYS = ("pixel_range", "precision", "store", "dtype", "flip", "seed", "clips", "clips_hash", "shard_size", "writers")
log = logging.getLogger("vae3d")


@dataclass
class EncodeJob:
    """What to encode. errors: of rows without a clip. codec: None for a process that does not encode."""

    config: EncodeConfig
    codec: LatentCodec | None
    items: Sequence[Item]
    errors: Sequence[ClipError]
    transform: Transform

    @cached_property
    def storage(self) -> LocalStorage | ObjectStorage:
        """Where the cache is written."""
        return storage_of(self.config.cache)

    @property
    def folder(self) -> Path:
        """Where this process writes files before they are published: the cache itself, unless that is in a store."""
        return self.storage.folder

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


def encode_cache(
    job: EncodeJob, index: int = 0, count: int = 1, checked: Callable[[], None] = lambda: None, quiet: bool = False
) -> bool:
    """Make or resume a cache, beside any number of other processes that do the same. Returns whether it is complete.

    Each process takes one shard after another that has no marker and that no other process has claimed: first those of
    its share, every `count`-th from `index`, then what is left of others. The last one writes index and statistics.
    With config.wait a process stays until the cache is complete, to take over the shards of one that is lost.

    Complete shards with unchanged source files are kept; others are encoded from scratch, to the same bytes. Each
    process checks that for its share. Labels, splits and texts are updated from the source.
    checked: called after that; a barrier, for ranks that began together. quiet: show no progress.
    Raises CacheError for a folder with other content or settings, and if more than max_broken of the clips fail.
    """
    with job.storage.claims(job.config.stale) as claims:
        digest = begin(job, claims)
        discard_unusable(job, range(index, job.shards, count), digest)
        checked()
        others = [shard for shard in reversed(range(job.shards)) if shard % count != index]
        encoded = encode_shards(job, [*range(index, job.shards, count), *others], digest, claims, quiet)
        complete = finish(job, digest, claims, wait=job.config.wait)
        if not complete or encoded < job.shards:
            log.info("this process encoded %d of %s%s", encoded, plural(job.shards, "shard"), _left(job, claims))
        return complete


def encode_shards(
    job: EncodeJob, order: Sequence[int], digest: str, claims: Claims, quiet: bool = False, wait: bool | None = None
) -> int:
    """Encode those of the shards that no other process encodes. Returns how many this one did.

    wait: until all have markers, and take over those of lost processes; None: as config.wait.
    """
    wait = job.config.wait if wait is None else wait
    encoded = 0
    while True:
        free = _take_free(job, order, claims)
        first = next(free, None)
        if first is not None:
            encoded += _encode_shards(job, chain([first], free), digest, claims, quiet)
        elif wait and set(order) - job.storage.done():
            _pause(claims)
        else:
            return encoded


def _pause(claims: Claims) -> None:
    """Before the next look at what others do. Random, as two that claim the same at once may both fail."""
    time.sleep(min(POLL, claims.stale / BEATS) * random.uniform(0.5, 1.5))


def _take_free(job: EncodeJob, order: Iterable[int], claims: Claims) -> Iterator[int]:
    """Claims shards without marker, one when it is asked for, until there is none that is free."""
    done = job.storage.done()
    for shard in order:
        marker, name = shards.marker_name(shard), shards.claim_name(shard)
        if shard in done or job.storage.stamp(marker) or not claims.take(name):
            continue
        if job.storage.stamp(marker):  # it was released just now, because it is done
            claims.release(name)
            continue
        job.storage.remove(COMPLETE)
        yield shard


def _left(job: EncodeJob, claims: Claims) -> str:
    """What is not complete, and who is at work on it; empty for a complete cache."""
    if job.storage.stamp(COMPLETE):
        return ""
    done = len(job.storage.done())
    owners = sorted({f"{holder.host} (process {holder.pid})" for holder in claims.holders()})
    at_work = f", the others are encoded by {', '.join(owners[:MAX_SHOWN])}" if owners else ""
    command = shlex.join(["vae3d", "encode-status", job.storage.name])
    return f"; {done} are complete{at_work}; {command} shows when all are"


def begin(job: EncodeJob, claims: Claims) -> str:
    """Write meta.json, or check that the existing one has the same settings. Returns its digest. Raises CacheError."""
    storage, meta = job.storage, job.meta()
    storage.make()
    if not storage.stamp(META):
        if not storage.is_empty():
            raise CacheError(f"{storage.name} is not empty, and not a latent cache; choose another folder")
        while not claims.take(META):  # another process writes it
            _pause(claims)
        try:
            if not storage.stamp(META):
                write_json(storage.folder / META, meta)
                storage.put(META)
        finally:
            claims.release(META)
    storage.get(META)
    there = read_meta_file(storage.folder / META)
    before, now = identity(there), identity(meta)
    same_clips = {name: before[name] for name in ("clips", "clips_hash")}
    if why := settings_difference(before, now | same_clips):
        raise CacheError(
            f"{storage.name} was begun with other settings: {why}; choose another folder, or delete this one"
        )
    if before != now:
        raise CacheError(
            f"{storage.name} was begun with {plural(before['clips'], 'clip')}, and {job.config.source} now has "
            f"{'others' if before['clips'] == now['clips'] else now['clips']}: files were added, removed or renamed, "
            "or their lengths and sizes are read otherwise than then; choose another folder, or delete this one"
        )
    return there["digest"]


def discard_unusable(job: EncodeJob, numbers: Iterable[int], digest: str) -> None:
    """Delete the markers of shards that are damaged, whose source files were replaced, or that `retry` asks for."""
    for shard in numbers:
        marker = shards.marker_name(shard)
        before = job.storage.stamp(marker)
        if before is None or _is_done(job, shard, digest):
            continue
        if job.storage.stamp(marker) == before:  # else another process has just encoded it again
            job.storage.remove(marker)
            job.storage.remove(COMPLETE)


def _is_done(job: EncodeJob, shard: int, digest: str) -> bool:
    """Whether a shard is complete, undamaged, and its source files are unchanged."""
    try:
        job.storage.get(shards.marker_name(shard))
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
    why = why or job.storage.damage(shard, marker, verify)
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


def _other_bucket(job: EncodeJob, rows: Sequence[IndexRow]) -> str | None:
    """Which entry belongs in another bucket now, since the table has another size of its file; None if none does."""
    for row in rows:
        shape = _item(job, row).shape
        if shape is not None and shape != (row["frames"], row["height"], row["width"]):
            return f"{row['key']} goes to another bucket, {'x'.join(map(str, shape))}"
    return None


def _item(job: EncodeJob, row: IndexRow) -> Item:
    """The item of an entry."""
    return job.items[row["number"] // 2 if job.config.flip else row["number"]]


def _labels(job: EncodeJob, row: IndexRow) -> dict[str, str]:
    """Label, split and text of an entry, as the source has them now."""
    item = _item(job, row)
    return {"label": item.label, "split": item.split, "text": item.text}


def _encode_shards(job: EncodeJob, taken: Iterator[int], digest: str, claims: Claims, quiet: bool) -> int:
    """Encode claimed shards. taken: gives, and claims, the next one as soon as the workers have read the last one's
    clips; it never waits, as the shards that were claimed are only finished while their clips are asked for."""
    config, transform = job.config, job.transform
    shapes = transform.buckets or [(transform.frames, transform.height, transform.width)]
    pixels = 0 if None in shapes[0] else max(map(math.prod, shapes))
    check_reader(config.reader)
    workers, notes = usable_workers(config.workers, "workers")
    for note in notes if not quiet else ():
        log.info(note)
    clip_bytes = job.codec.model.pixel_channels * pixels
    together = _clips_together(clip_bytes, workers)
    begun: deque[int] = deque()  # shards whose clips are being read

    def runs_of_shards() -> Iterator[list[int]]:
        for shard in taken:
            begun.append(shard)
            yield from runs_of_files(job.items, job.order(shard), together)

    runs: Iterable[list[Read]] = load(
        ClipReader(job.items, job.transform, config.reader, config.verify == "hash", job.codec.model.pixel_channels),
        workers=workers,
        timeout=config.timeout,
        item_bytes=clip_bytes * together,
        held=config.batch_size // together + 2,
        spawn=decodes_on_gpu(config.reader),
        batch_sampler=runs_of_shards(),
        collate_fn=list,
    )
    reads = chain.from_iterable(runs)
    seen = job.storage.done()  # also by others
    bar = progress(total=len(job.items), initial=_clips_of(job, seen), unit="clip", hidden=quiet)
    batches: deque[list[Read]] = deque()

    def encoded() -> Iterator[tuple[int, dict[str, Moments]]]:
        """Shard and moments of each of `batches`."""
        rest = iter(reads)
        for first in rest:
            number = begun.popleft()
            clips = islice(chain([first], rest), len(job.span(number)))
            for batch in _batches((_check_size(job, clip) for clip in clips), job.clips_per_batch):
                batches.append(batch)
                yield number, _encode_batch(job, batch)

    errors: list[ClipError] = []
    count = 0
    with bar:
        for number, run in groupby(on_host(encoded(), job.codec.device), key=itemgetter(0)):
            shard, statistics = ShardContent(), LatentStatistics(job.codec.channels)
            for _, moments in run:
                batch = batches.popleft()
                _add_batch(job, number, batch, moments, shard, statistics)
                bar.update(len(batch))
            shard.rows.sort(key=itemgetter("number"))
            _write_claimed(job, number, shard, statistics, digest, claims)
            now = job.storage.done()
            bar.update(_clips_of(job, now - seen - {number}))
            seen, count = now | {number}, count + 1
            errors += shard.errors
            if len(errors) > config.max_broken * len(job.items):
                raise CacheError(_too_many(errors, len(job.items), config.max_broken))
    return count


def _clips_of(job: EncodeJob, numbers: Iterable[int]) -> int:
    return sum(len(job.span(number)) for number in numbers)


def _write_claimed(
    job: EncodeJob, number: int, shard: ShardContent, statistics: LatentStatistics, digest: str, claims: Claims
) -> None:
    """Write a shard and release its claim; nothing if another process took over and completed it meanwhile."""
    name, marker = shards.claim_name(number), shards.marker_name(number)
    if claims.owns(name) or not job.storage.stamp(marker):
        try:
            shards.write_shard(job.folder, number, shard, statistics, digest, job.config.writers)
            job.storage.put(*shards.files_of(number, job.config.writers), marker)
        except FileError:
            # The process that took over may have completed the cache, and deleted files that were not finished.
            if claims.owns(name) or not job.storage.stamp(marker):
                raise
    claims.release(name)


def _clips_together(clip_bytes: int, workers: int) -> int:
    """How many clips of a file a worker reads and sends at once: one if their size is unknown, fewer if there is little
    shared memory."""
    if not clip_bytes or not workers:
        return 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = shared_memory_free()
    share = RUN_BYTES if free is None else min(RUN_BYTES, free // (2 * ranks * (2 * workers + 3)))
    return max(1, min(RUN_CLIPS, share // clip_bytes))


def _check_size(job: EncodeJob, clip: Read) -> Read:
    """The clip, or the error of one that the autoencoder does not take at its size."""
    if clip.pixels is None:
        return clip
    height, width = clip.pixels.shape[-2:]
    try:
        job.codec.model.check_size(height, width)
    except UserError as error:
        return replace(clip, pixels=None, error=f"cannot be encoded at {height}x{width}: {error}")
    return clip


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
    shard: ShardContent,
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
            entry = dict(zip(KINDS[job.config.store], stored, strict=True))
            shard.tensors |= {f"{kind}/{key}": z for kind, z in entry.items()}
            place = 2 * read.number + flip if job.config.flip else read.number
            shard.rows.append(_row(item, read, key, place, number, bool(flip), entry))


def _stored_tensors(job: EncodeJob, key: str, mean: Tensor, std: Tensor) -> list[Tensor]:
    """Copies of the tensors of an entry, in the stored dtype."""
    if job.config.store == "sample":
        tensors = [Moments(mean, std).sample(generator_of(job.config.seed, key, "sample"))]
    else:
        tensors = [mean, std] if job.config.store == "moments" else [mean]
    return [tensor.to(DTYPES[job.config.dtype], copy=True).contiguous() for tensor in tensors]


def _row(
    item: Item, read: Read, key: str, number: int, shard: int, flip: bool, entry: Mapping[str, Tensor]
) -> IndexRow:
    frames, height, width = read.pixels.shape[1:]
    start, end = (None if np.isnan(second) else second for second in item.bounds)
    return {
        "number": number,
        "key": key,
        "shard": shard,
        "frames": frames,
        "height": height,
        "width": width,
        "latent": "x".join(map(str, next(iter(entry.values())).shape)),
        "fps": read.fps,
        "label": item.label,
        "split": item.split,
        "text": item.text,
        "flip": flip,
        "source": item.path,
        "start": start,
        "end": end,
        "row": item.row,
        "crc32": shards.checksum(entry),
    }


def finish(job: EncodeJob, digest: str, claims: Claims, wait: bool = True) -> bool:
    """Write errors, index and statistics, and last complete.json, once all shards have markers, unless another process
    has done so. Returns whether the cache is complete. Raises CacheError.

    wait: for shards, and for the process that is writing these files.
    """
    while True:
        missing = set(range(job.shards)) - job.storage.done()
        if not missing:
            if _is_complete(job):
                log.info("%s is complete", job.storage.name)
                return True
            if claims.take(FINISH):
                try:
                    if _is_complete(job) or _write_complete(job, digest, claims):
                        return True
                except FileError:
                    # As of a shard: who took over may have completed the cache, and deleted unfinished files.
                    if claims.owns(FINISH) or not _is_complete(job):
                        raise
                finally:
                    claims.release(FINISH)
        if not wait:
            return False
        if missing:  # found unusable by another process
            if job.codec is None:
                raise CacheError(
                    f"{job.storage.name}: shards {sorted(missing)[:MAX_SHOWN]} are not complete; run again"
                )
            encode_shards(job, sorted(missing), digest, claims)
        else:
            _pause(claims)


def _source_hash(job: EncodeJob) -> str:
    """Identifies what index.csv and data_errors.jsonl take from the source, beside the shards."""
    return json_hash([[[item.label, item.split, item.text] for item in job.items], list(job.errors)])


def _is_complete(job: EncodeJob) -> bool:
    """Whether complete.json is there, with the labels that the source has now, and describes the files beside it."""
    if not job.storage.get(COMPLETE, META, INDEX, STATISTICS) or not job.storage.stamp(ERRORS):
        return False
    try:
        complete = read_complete(job.folder / COMPLETE)
        hashes = {name: file_hash(job.folder / name) for name in complete["sha256"]}
    except (CacheError, FileError, OSError):
        return False
    same = complete.get("source") == _source_hash(job) and hashes == complete["sha256"]
    return same and complete["shards"] == job.shards


def _write_complete(job: EncodeJob, digest: str, claims: Claims) -> bool:
    """Write what is of all shards; False if one was found unusable by another process meanwhile. Raises CacheError."""
    stamps = job.storage.stamps()
    names = [name for number in range(job.shards) for name in shards.summaries_of(number)]
    if not job.storage.get(META, *names):
        if job.storage.stamps() != stamps:
            return False
        missing = [name for name in names if not job.storage.stamp(name)]
        raise CacheError(
            f"{job.storage.name} has lost {', '.join(missing[:MAX_SHOWN])}; run the command without --shard, which "
            "checks all shards"
        )
    markers = [shards.read_marker(job.folder, shard) for shard in range(job.shards)]
    if other := [shard for shard, marker in enumerate(markers) if marker["of"] != digest]:
        raise CacheError(
            f"{job.storage.name}: {len(other)} of {job.shards} shards belong to another cache ({other[:MAX_SHOWN]}); "
            "run the command without --shard, which checks all of them"
        )
    rows = [row | _labels(job, row) for marker in markers for row in marker["rows"]]
    errors = [*job.errors, *(error for marker in markers for error in marker["errors"])]
    write_text(job.folder / ERRORS, "".join(json.dumps(error) + "\n" for error in errors))
    job.storage.put(ERRORS)
    clips = len(job.items) + len(job.errors)
    if len(errors) > job.config.max_broken * clips or not rows:
        listed = f"\n  {job.storage.name}/{ERRORS} lists all"
        raise CacheError(_too_many(errors, clips, job.config.max_broken) + listed)
    write_text(job.folder / INDEX, pd.DataFrame(rows).to_csv(**QUOTED_CSV))
    statistics = shards.read_statistics(job.folder, range(job.shards)).summary()
    write_json(job.folder / STATISTICS, statistics)
    hashes = {name: file_hash(job.folder / name) for name in (META, INDEX, STATISTICS)}
    counts = {"shards": job.shards, "entries": len(rows), "errors": len(errors)}
    write_json(job.folder / COMPLETE, counts | {"source": _source_hash(job), "sha256": hashes})
    job.storage.put(INDEX, STATISTICS, COMPLETE)
    if job.storage.stamps() != stamps:  # whoever deletes a marker deletes complete.json after it; this one may be newer
        job.storage.remove(COMPLETE)
        return False
    claims.clear()  # of killed processes, as are the files that they left
    job.storage.clean()
    log.info("%s of %s -> %s", plural(len(rows), "entry"), plural(len(job.items), "clip"), job.storage.name)
    if errors:
        log.warning("%s could not be encoded; see %s", plural(len(errors), "clip"), f"{job.storage.name}/{ERRORS}")
    if job.config.store == "moments" and not any(statistics["posterior_std"]):
        log.info("the encoder is deterministic: store=mean needs half the disk space")
    return True


def _too_many(errors: Sequence[ClipError], clips: int, max_broken: float) -> str:
    shown = "\n".join(f"  {error['path']}: {error['reason']}" for error in errors[:MAX_SHOWN])
    return f"{len(errors)} of {clips} clips cannot be encoded, more than max_broken={max_broken}; the first:\n{shown}"
