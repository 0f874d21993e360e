"""Training data: latents from a cache, or clips that the device encodes batch by batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vae3d import distributed
from vae3d.data.batch_schedule import BatchSchedule, ClipIndex
from vae3d.data.clips import Sample, Unreadable, collate
from vae3d.data.fingerprint import DataFingerprint
from vae3d.data.sources import DataError
from vae3d.data.workers import load
from vae3d.inference.scale import LatentStats, ScaleError
from vae3d.latents.cache import NO_LABEL, CacheError, LatentCache
from vae3d.latents.codec import LatentCodec
from vae3d.running_stats import RunningStats
from vae3d.seeding import generator_of, seed_of
from vae3d.text import plural
from vae3d.transfer import to_device
from vae3d.types import ClipBatch

log = logging.getLogger("vae3d")


class Batch(NamedTuple):
    """values: normalised latents [B, C, t, h, w], or pixels [B, 3, T, H, W] uint8 to encode; None after too many
    unreadable files in a row. labels: [B], NO_LABEL without classes. positions: in the endless training order.
    errors: (path, reason) of unreadable files."""

    values: Tensor | None
    labels: Tensor
    positions: list[int]
    errors: list[tuple[str, str]]


@dataclass(frozen=True)
class LatentData:
    """Training and validation data.

    dataset: indexed by ClipIndex. size: frames, height and width of sampled clips. latent_shape: (C, t, h, w) of their
    latents. trained: numbers of latent frames of the training clips. sample: draw latents from the posterior; else take
    its mean. classes: names. trained_classes: indices of the classes that occur in the training data; numeric
    labels leave gaps, and validation files may have others. held_out: this rank's validation clips, one per batch.
    timeout: seconds without a batch until WorkerError; 0: never. fingerprint: of the data, for checkpoints.
    """

    dataset: Dataset[Any]
    collate: Callable[[list[Any]], Batch]
    schedule: BatchSchedule
    codec: LatentCodec
    size: tuple[int, int, int]
    latent_shape: tuple[int, int, int, int]
    trained: tuple[int, ...]
    classes: list[str]
    trained_classes: list[int]
    held_out: list[Batch]
    sample: bool = True
    workers: int = 0
    prefetch: int = 2
    errors: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timeout: float = 0.0
    fingerprint: DataFingerprint | None = None

    @property
    def item_bytes(self) -> int:
        """Of the largest batch that a worker reads."""
        if isinstance(self.dataset, CachedLatents):
            return self.schedule.micro_batch * 4 * math.prod(self.latent_shape)
        values = self.codec.model.pixel_channels * math.prod((self.schedule.frames.all()[-1], *self.size[1:]))
        return self.schedule.micro_batch * values

    def batches(self, first: int, last: int, stopping: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """Micro-batches of optimizer steps first..last-1, a pure function of the schedule.

        stopping: whether the run ends after this step. Raises as workers.load does.
        """
        return load(
            self.dataset,
            workers=self.workers,
            prefetch=self.prefetch,
            timeout=self.timeout,
            stopping=stopping,
            item_bytes=self.item_bytes,
            held=self.schedule.accumulate,
            batch_sampler=self.schedule.micro_batches(first, last),
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
        )

    def latents(self, batch: Batch, device: torch.device) -> Tensor:
        """Normalised latents [B, C, t, h, w] on the device.

        Posterior noise is a function of (seed, position), drawn on the CPU, as LatentCache draws it.
        """
        values = to_device(batch.values, device)
        if values.dtype != torch.uint8:
            return values
        if not self.sample:
            return self.codec.encode(values)
        generators = [generator_of(self.schedule.seed, position, "noise") for position in batch.positions]
        return self.codec.encode(values, "sample", generators)

    def measure(self, count: int, device: torch.device) -> LatentStats:
        """Statistics of at least `count` latents of all ranks, from the first training steps, even where a run overfits
        one batch.

        Raises ScaleError if no file can be read.
        """
        data = replace(self, schedule=replace(self.schedule, overfit=False))
        stats = RunningStats(self.latent_shape[0], device)
        seen = torch.zeros((), dtype=torch.int64, device=device)
        for batch in data.batches(0, math.ceil(count / self.schedule.batch_size)):
            if batch.values is not None:
                z = self.latents(batch, device)
                stats.update_channels(z)
                seen += len(z)
        distributed.all_reduce_sum(seen)
        stats.all_reduce()
        if not seen:
            raise ScaleError("the latents cannot be measured: no file of the first steps can be read")
        return LatentStats.of(stats, int(seen))


class CachedLatents(Dataset[Batch]):
    """The entries of a cache at `indices`, indexed by ClipIndex."""

    def __init__(self, cache: LatentCache, indices: Sequence[int], labelled: bool) -> None:
        self.cache, self.indices, self.labelled = cache, np.asarray(indices), labelled

    def __getitem__(self, index: ClipIndex) -> Batch:
        latent = self.cache[(int(self.indices[index.row]), index.position)]
        label = latent.label if self.labelled else NO_LABEL
        return Batch(latent.z[None], torch.tensor([label]), [index.position], [])


def collate_latents(batches: Sequence[Batch]) -> Batch:
    """Concatenate batches of latents of one shape."""
    values = torch.cat([batch.values for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    return Batch(values, labels, [position for batch in batches for position in batch.positions], [])


@dataclass(frozen=True)
class LabelledClips:
    """Collate samples of a ClipDataset, with the labels of their rows."""

    labels: np.ndarray

    def __call__(self, samples: list[Sample]) -> Batch:
        clip = collate(samples)
        labels = torch.tensor([int(self.labels[sample.index.row]) for sample in samples])
        positions = [sample.index.position for sample in samples]
        return Batch(None if isinstance(clip, Unreadable) else clip.video, labels, positions, clip.errors)


def val_batches(clips: Sequence[ClipBatch], labels: Sequence[int]) -> list[Batch]:
    """A batch per validation clip; its position is its row, and so the index of its label."""
    return [
        Batch(clip.video, torch.tensor([labels[int(clip.positions)]]), clip.positions.tolist(), []) for clip in clips
    ]


def warn_of_untrained(classes: Sequence[str], train: Iterable[int], held_out: Iterable[int]) -> None:
    """Warn of classes all of whose files are held out. train, held_out: class of each file; NO_LABEL for none."""
    untrained = sorted({*held_out} - {*train} - {NO_LABEL})
    if untrained:
        names = [classes[index] for index in untrained]
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        log.warning(
            f"validation holds out every file of {plural(len(names), 'class')}, which will never be trained: {shown}; "
            "add files, choose the held-out ones by a column `split`, or set data.num_val_files=0"
        )


def split_cache(index: pd.DataFrame, num_val_files: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training entries and of validation entries, the latter without mirrored ones.

    Validation entries are those of split `val`, or without one those of the `num_val_files` files whose names hash
    lowest, at most a tenth of all files. Split `test` is in neither.
    """
    held_out, possible = index["split"] == "val", index["split"] != "test"
    if not held_out.any():
        names = index.groupby("source")["key"].transform("min")
        hashes = np.array([seed_of(name) for name in names], dtype=np.int64)
        files = np.unique(hashes[possible])
        held_out = possible & np.isin(hashes, files[: min(num_val_files, len(files) // 10)])
    rest = possible & ~held_out
    if not rest.any():
        raise DataError("the cache has no entries to train on: all are of split `val` or `test`")
    return np.flatnonzero(rest), np.flatnonzero(held_out & ~index["flip"])


def clip_and_latent_size(cache: LatentCache) -> tuple[tuple[int, int, int], tuple[int, int, int, int]]:
    """(T, H, W) of a cache's clips and (C, t, h, w) of their latents. Raises CacheError for clips of several sizes."""
    sizes = cache.index.groupby(["frames", "height", "width", "latent"]).size().sort_values(ascending=False)
    if len(sizes) > 1:
        counts = ", ".join(f"{count} of {'x'.join(map(str, size[:3]))}" for size, count in sizes.head(5).items())
        raise CacheError(
            f"{cache.folder} holds clips of {len(sizes)} sizes ({counts}), which do not fit into one batch; encode "
            "again with height, width and frames"
        )
    frames, height, width, latent = sizes.index[0]
    return (int(frames), int(height), int(width)), tuple(int(side) for side in latent.split("x"))


def require_labels(labels: np.ndarray, missing: str, what: str) -> None:
    """Raises DataError if a label is missing, or all are the same. missing: name of the first without one, if there is
    one. what: noun for the names."""
    if count := int((labels == NO_LABEL).sum()):
        raise DataError(
            f"{count} of {len(labels)} {what} have no label, such as {missing}; a denoiser with classes needs "
            "one for each: add a column `label`, or a folder per class; labels=none trains without classes"
        )
    if len(np.unique(labels)) < 2:
        raise DataError(
            f"all {len(labels)} {what} have the same label (that of their folder, without a column `label`); use "
            "labels=none"
        )
