"""Latents to train on: of a cache, or of clips that are encoded on the device, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vae3d.data.batch_schedule import BatchSchedule, ClipIndex, MicroBatchSampler
from vae3d.data.clips import Sample, Unreadable, collate
from vae3d.data.fingerprint import DataFingerprint
from vae3d.data.sources import DataError
from vae3d.data.workers import load
from vae3d.latents.cache import NONE, CacheError, LatentCache
from vae3d.latents.codec import LatentCodec
from vae3d.seeding import generator_of, seed_of
from vae3d.types import Clip


class Batch(NamedTuple):
    """values: normalised latents [B, C, t, h, w], or pixels [B, 3, T, H, W] uint8 still to be encoded; None where one
    file after another could not be read. labels: [B], NONE without classes. positions: in the endless training order.
    errors: (path, reason) of files that failed."""

    values: Tensor | None
    labels: Tensor
    positions: list[int]
    errors: list[tuple[str, str]]


@dataclass(frozen=True)
class LatentData:
    """Everything that training reads.

    dataset: by ClipIndex. size: frames, height and width of the clips that are sampled, latent_shape (C, t, h, w)
    that of their latents, and trained the latent frames of all clips that are trained on. sample: draw latents from the
    posterior. classes: their names, and known the numbers of those that are trained on: not all where labels are
    numbers, or held-out files have others. held_out: this rank's share, one clip each.
    """

    dataset: Dataset[Any]
    collate: Callable[[list[Any]], Batch]
    schedule: BatchSchedule
    codec: LatentCodec
    size: tuple[int, int, int]
    latent_shape: tuple[int, int, int, int]
    trained: tuple[int, ...]
    classes: list[str]
    known: list[int]
    held_out: list[Batch]
    sample: bool = True
    workers: int = 0
    prefetch: int = 2
    errors: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timeout: float = 0.0  # seconds without a batch after which WorkerTimeout is raised; 0: never
    fingerprint: DataFingerprint | None = None  # what a checkpoint remembers of the data

    def batches(self, first: int, last: int, stopping: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """Micro-batches of optimizer steps first..last-1, a pure function of the schedule.

        stopping: whether the run is to end after this step. Raises as workers.load does.
        """
        cached = isinstance(self.dataset, CachedLatents)
        one = (
            4 * math.prod(self.latent_shape)
            if cached
            else 3 * math.prod((self.schedule.frames.all()[-1], *self.size[1:]))
        )
        return load(
            self.dataset,
            workers=self.workers,
            prefetch=self.prefetch,
            timeout=self.timeout,
            stopping=stopping,
            item_bytes=self.schedule.micro_batch * one,
            held=self.schedule.accumulate,
            batch_sampler=MicroBatchSampler(self.schedule, first, last),
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
        )

    def latents(self, batch: Batch, device: torch.device) -> Tensor:
        """[B, C, t, h, w], normalised, on the device; sampled by (seed, position) on the CPU, as LatentCache does."""
        if batch.values.dtype != torch.uint8:
            return batch.values.to(device, non_blocking=True)
        pixels = batch.values.to(device, non_blocking=True)
        if not self.sample:
            return self.codec.encode(pixels)
        generators = [generator_of(self.schedule.seed, position, "noise") for position in batch.positions]
        return self.codec.encode(pixels, "sample", generators)


class CachedLatents(Dataset[Batch]):
    """Some entries of a cache, indexed by ClipIndex."""

    def __init__(self, cache: LatentCache, places: Sequence[int], labelled: bool) -> None:
        self.cache, self.places, self.labelled = cache, np.asarray(places), labelled

    def __getitem__(self, index: ClipIndex) -> Batch:
        latent = self.cache[(int(self.places[index.row]), index.position)]
        label = latent.label if self.labelled else NONE
        return Batch(latent.z[None], torch.tensor([label]), [index.position], [])


def joined(batches: Sequence[Batch]) -> Batch:
    """Of latents of one shape."""
    values, labels = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    return Batch(values, labels, [position for batch in batches for position in batch.positions], [])


@dataclass(frozen=True)
class LabelledClips:
    """Collates samples of a ClipDataset with the labels of the rows that they were read from."""

    labels: np.ndarray

    def __call__(self, samples: list[Sample]) -> Batch:
        clip = collate(samples)
        labels = torch.tensor([int(self.labels[sample.index.row]) for sample in samples])
        positions = [sample.index.position for sample in samples]
        return Batch(None if isinstance(clip, Unreadable) else clip.video, labels, positions, clip.errors)


def of_clips(clips: Sequence[Clip], labels: Sequence[int]) -> list[Batch]:
    """Held-out clips, whose positions are rows of a table with these labels."""
    return [
        Batch(clip.video, torch.tensor([labels[int(clip.positions)]]), clip.positions.tolist(), []) for clip in clips
    ]


def split_cache(index: pd.DataFrame, num_val_files: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the entries to train on and, without mirrored ones, of those held out.

    Those of split `val` if there are any, else of the `num_val_files` files whose names hash lowest, but at most of a
    tenth of them. Split `test` is left out of both.
    """
    held_out, possible = index["split"] == "val", index["split"] != "test"
    if not held_out.any():
        names = index.groupby("source")["key"].transform("min")
        hashes = np.array([seed_of(name) for name in names], dtype=np.int64)
        files = np.unique(hashes[possible])
        held_out = possible & np.isin(hashes, files[: min(num_val_files, len(files) // 10)])
    rest = possible & ~held_out
    if not rest.any():
        raise DataError("the cache has no entries to train on; is its split `val` or `test` throughout?")
    return np.flatnonzero(rest), np.flatnonzero(held_out & ~index["flip"])


def size_of(cache: LatentCache) -> tuple[tuple[int, int, int], tuple[int, int, int, int]]:
    """Frames, height and width of a cache's clips, and (C, t, h, w) of their latents.

    Raises CacheError if they are of several sizes, which do not fit into one batch.
    """
    sizes = cache.index.groupby(["frames", "height", "width", "latent"]).size().sort_values(ascending=False)
    if len(sizes) > 1:
        told = ", ".join(f"{count} of {'x'.join(map(str, size[:3]))}" for size, count in sizes.head(5).items())
        raise CacheError(
            f"{cache.folder} holds clips of {len(sizes)} sizes ({told}), of which batches cannot be made; encode again "
            "with height, width and frames"
        )
    frames, height, width, latent = sizes.index[0]
    return (int(frames), int(height), int(width)), tuple(int(side) for side in latent.split("x"))


def require_labels(labels: Sequence[int], names: Sequence[str], what: str) -> None:
    """Raises DataError if some have no label, or all have the same."""
    missing = [name for name, label in zip(names, labels, strict=True) if label == NONE]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} {what} have no label, such as {missing[0]}, and a denoiser with classes "
            "needs them all: a column `label`, or a folder per class; labels=none trains without classes"
        )
    if len(set(labels)) < 2:
        raise DataError(
            f"all {len(names)} {what} have the same label (that of their folder, where there is no column `label`), so "
            "that there is nothing to tell; use labels=none"
        )
