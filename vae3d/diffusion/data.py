"""Training data: latents from a cache, or clips that the device encodes batch by batch."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vae3d import distributed
from vae3d.config.issues import ConfigIssue, raise_if_any
from vae3d.data.batches.batch_schedule import ClipIndex, Schedule
from vae3d.data.batches.clips import MixedClips, Sample, Unreadable, collate
from vae3d.data.batches.selection import is_held_out
from vae3d.data.media import DataError
from vae3d.data.table.fingerprint import Fingerprint, SourceFingerprints
from vae3d.data.table.rows import file_hashes
from vae3d.data.workers import load
from vae3d.latents.cache import NO_LABEL, LatentCache
from vae3d.latents.clips import names_of
from vae3d.latents.codec import LatentCodec
from vae3d.latents.scale import LatentStats, ScaleError
from vae3d.running_stats import RunningStats
from vae3d.seeding import generator_of
from vae3d.text import plural
from vae3d.transfer import to_device

log = logging.getLogger("vae3d")
ClipSize = tuple[int, int, int]  # frames, height, width


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

    dataset: indexed by ClipIndex. rows: of the tables that are trained on. stream_sizes: height and width of the clips
    of each stream of the schedule. stream_groups: names under which its steps are counted. size: frames, height and
    width of sampled clips. sample: draw latents from the posterior; else take its mean. classes: names.
    trained_classes: indices of the classes that occur in the training data; numeric labels leave gaps, and validation
    files may have others. held_out: this rank's validation clips, one per batch. held_out_sizes: of those of all ranks,
    each with latents of another shape. skipped_files: (path, reason) of readable files that are not used. timeout:
    seconds without a batch until WorkerError; 0: never. fingerprint: of the data, for checkpoints.
    """

    dataset: Dataset[Any]
    collate: Callable[[list[Any]], Batch]
    schedule: Schedule
    rows: int
    codec: LatentCodec
    stream_sizes: list[tuple[int, int]]
    stream_groups: list[list[str]]
    size: ClipSize
    classes: list[str]
    trained_classes: list[int]
    held_out: list[Batch]
    held_out_sizes: list[ClipSize]
    sample: bool = True
    workers: int = 0
    prefetch: int = 2
    errors: list[tuple[str, str]] = field(default_factory=list)
    skipped_files: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timeout: float = 0.0
    fingerprint: Fingerprint | SourceFingerprints | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, t, h, w) of the latents of sampled clips."""
        return self.codec.latent_shape(*self.size)

    @property
    def batch_sizes(self) -> list[tuple[ClipSize, int]]:
        """Frames, height and width of the clips of every kind of step, and clips per micro-batch; ascending."""
        shapes = self.schedule.shapes()
        return sorted({((s.frames, *self.stream_sizes[s.stream]), s.micro_batch) for s in shapes})

    @property
    def sizes(self) -> list[ClipSize]:
        """Of the training clips, ascending."""
        return sorted({size for size, _ in self.batch_sizes})

    @property
    def latent_shapes(self) -> list[tuple[int, int, int, int]]:
        """(C, t, h, w) of the training latents, each once."""
        return list(dict.fromkeys(self.codec.latent_shape(*size) for size in self.sizes))

    def clips_per_step(self) -> dict[str, int]:
        """Of each source and size, by name; nothing of one stream alone."""
        streams = zip(self.stream_groups, self.schedule.leaves, strict=True)
        return {names[-1]: stream.batch_size for names, stream in streams if names}

    def batch_size_at(self, step: int) -> tuple[ClipSize, int]:
        """Frames, height and width of the clips of a step, and clips per micro-batch."""
        stream = self.schedule.locate(step)[0]
        frames = self.schedule.frames_at(step)
        return (frames, *self.stream_sizes[stream]), self.schedule.leaves[stream].micro_batch

    def latent_values(self, batch: tuple[ClipSize, int]) -> int:
        """Values of the latents of a micro-batch, which make its cost. batch: as in batch_sizes."""
        size, clips = batch
        return clips * math.prod(self.codec.latent_shape(*size))

    @property
    def item_bytes(self) -> int:
        """Of the largest batch that a worker reads."""
        if isinstance(self.dataset, CachedLatents):
            return 4 * max(map(self.latent_values, self.batch_sizes))
        return max(count * self.codec.model.pixel_channels * math.prod(size) for size, count in self.batch_sizes)

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
            spawn=isinstance(self.dataset, MixedClips) and self.dataset.decodes_on_gpu,
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
        steps = next(step for step in itertools.count() if data.schedule.clips_before(step) >= count)
        stats = RunningStats(self.latent_shape[0], device)
        seen = torch.zeros((), dtype=torch.int64, device=device)
        for batch in data.batches(0, steps):
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
    """Collate samples of clips, with the labels of their rows. labels: of the table of each stream."""

    labels: Sequence[np.ndarray]

    def __call__(self, samples: list[Sample]) -> Batch:
        clip = collate(samples)
        labels = torch.tensor([int(self.labels[sample.index.stream][sample.index.row]) for sample in samples])
        positions = [sample.index.position for sample in samples]
        return Batch(None if isinstance(clip, Unreadable) else clip.video, labels, positions, clip.errors)


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

    Validation entries are those of split `val`, or without one those that is_held_out chooses: of a whole source the
    same files as where its clips are trained on. Split `test` is in neither.
    """
    held_out, possible = index["split"] == "val", index["split"] != "test"
    if not held_out.any():
        table = pd.DataFrame({"path": index["source"], "name": names_of(index["key"])})[possible]
        held_out.loc[possible] = is_held_out(file_hashes(table), num_val_files)
    rest = possible & ~held_out
    if not rest.any():
        raise DataError("the cache has no entries to train on: all are of split `val` or `test`")
    return np.flatnonzero(rest), np.flatnonzero(held_out & ~index["flip"])


def choose_size(counts: Mapping[ClipSize, int], height: int | None, width: int | None) -> ClipSize:
    """The size of samples: the commonest one of the training clips, and of equally common ones the largest.

    counts: of training clips. height, width: only sizes with these. Raises ConfigError if there are none.
    """
    chosen = {size: count for size, count in counts.items() if height is None or size[1:] == (height, width)}
    if not chosen:
        sizes = ", ".join(f"{h}x{w}" for h, w in sorted({size[1:] for size in counts}))
        message = f"validation.width={width}: no training clip has this size; they have {sizes}"
        raise_if_any([ConfigIssue("validation.height", height, message, "use one of them, or null")])
    return max(chosen, key=lambda size: (chosen[size], size))


def distinct_sizes(codec: LatentCodec, sizes: Iterable[ClipSize]) -> list[ClipSize]:
    """One size, the largest, for each shape of latents; ascending."""
    return sorted({codec.latent_shape(*size): size for size in sorted(sizes)}.values())


def take_turns(entries: Sequence[int], groups: Iterable[Sequence[int]]) -> np.ndarray:
    """`entries`, so that the groups take turns: the first of each group, the second of each, and so on."""
    turn = {entry: number for group in groups for number, entry in enumerate(group)}
    return np.array(sorted(entries, key=turn.__getitem__), int)  # stable


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
