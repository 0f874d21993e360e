"""Training on a stream: a source that is read in its own order, since it has no table of its rows and no random access.

stream_order.py says in which order the readers take its items. The clips of a run depend on (seed, ranks, workers,
shuffle). A checkpoint has the position of each reader, six integers, from which the same command goes on with the same
clips. With other ranks or workers a new pass begins.
"""

from __future__ import annotations

import io
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vae3d.arguments import ArgumentError
from vae3d.data.batches.batch_schedule import ClipIndex, FrameCounts, OneStream
from vae3d.data.batches.clips import (
    ATTEMPTS,
    ClipSettings,
    Sample,
    StepShapes,
    Stream,
    Unreadable,
    augmented_clips,
    collate,
    open_frames,
    read_clip,
    to_sample,
)
from vae3d.data.batches.held_out import HeldOutFiles
from vae3d.data.batches.stream_order import Position, ShardedStream, ShuffledItems
from vae3d.data.decoding.images import ImageReader
from vae3d.data.decoding.readers import READERS, decodes_on_gpu
from vae3d.data.media import DataError, MediaError, Reader, StreamItem
from vae3d.data.storage.memory_file import memory_file
from vae3d.data.table.file_table import as_file_table
from vae3d.data.table.rows import rows_from_paths
from vae3d.data.workers import load
from vae3d.seeding import seed_of
from vae3d.text import plural
from vae3d.types import ClipBatch

MAX_UNUSABLE = 1000  # items in a row that are too short or too small
WARN_AFTER = 100  # items, of which more than half were too short or too small
SHOWN = 5  # items that cannot be read, in a message
LOOKED_AT = 10  # times as many held-out items as are needed


class StreamingSource(Protocol):
    """A source whose `streaming` is true. shuffle: items that each reader keeps. notes: lines for the log."""

    streaming: bool
    shuffle: int
    notes: list[str]

    def stream(self, role: str) -> ShardedStream | None:
        """For training (`train`) or validation (`val`); None if there is none. Raises DataError."""


def is_streaming(source: Any) -> bool:
    """Whether a source is read as a stream, and is a StreamingSource."""
    return bool(getattr(source, "streaming", False))


# --- batches


@dataclass(frozen=True)
class StreamingSchedule(OneStream):
    """Which frame count each step has, and which clips of a step this rank reads; see BatchSchedule."""

    frames: FrameCounts
    seed: int
    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.frames.fit:
            raise DataError("data.frames.fit needs the frame counts of all files, which a stream does not have")

    def frames_at(self, step: int) -> int:
        """Frames per clip of a step."""
        return self.frames.draw(np.random.default_rng(seed_of(self.seed, step, "frames")))

    def clips(self, number: int) -> list[ClipIndex]:
        """Positions and frame counts of this rank's micro-batch `number`, of all its micro-batches."""
        step, micro = divmod(number, self.accumulate)
        frames = self.frames_at(step)
        return [ClipIndex(position, 0, frames) for position in self.positions(step, micro)]


class StreamingClips(IterableDataset):
    """(number, reader, batch, the reader's position behind it) of the micro-batches numbered first, ..., last - 1.

    Worker w of the DataLoader, which takes batches from its workers in turn, is the reader (first + w) % workers.
    positions: of the readers of this rank, at the start.
    """

    def __init__(
        self,
        stream: ShardedStream,
        schedule: StreamingSchedule,
        settings: ClipSettings,
        shuffle: int,
        positions: Sequence[Position],
        first: int,
        last: int,
    ) -> None:
        self.stream, self.schedule, self.settings, self.shuffle = stream, schedule, settings, shuffle
        self.positions, self.first, self.last = positions, first, last
        self.read = self.unusable = 0  # items
        self.warned = False

    def __iter__(self) -> Iterator[tuple[int, int, ClipBatch | Unreadable, Position]]:
        worker, workers = getattr(get_worker_info(), "id", 0), len(self.positions)
        reader = (self.first + worker) % workers
        items = ShuffledItems(
            self.stream,
            self.schedule.seed,
            self.schedule.rank * workers + reader,
            self.schedule.world_size * workers,
            self.shuffle,
            self.positions[reader],
        )
        for number in range(self.first + worker, self.last, workers):
            batch = collate([self._sample(index, items) for index in self.schedule.clips(number)])
            yield number, reader, batch, items.position

    def _sample(self, index: ClipIndex, items: Iterator[StreamItem]) -> Sample:
        """A clip of the next item that has one. Items that are too short for the step are used up all the same."""
        errors: list[tuple[str, str]] = []
        for _ in range(MAX_UNUSABLE):
            item = next(items)
            self.read += 1
            try:
                with opened(item, self.settings) as reader:
                    if has_clip(reader, self.settings, index.frames):
                        seed = self.schedule.seed
                        sample = augmented_clips(reader, item.path, [index], self.settings, seed)[0]
                        return replace(sample, errors=errors)
                self.unusable += 1
            except MediaError as error:
                errors.append((error.path, error.reason))
                if len(errors) == ATTEMPTS:
                    return Sample(None, index, item.path, errors)
            if self.read >= WARN_AFTER and 2 * self.unusable > self.read and not self.warned:
                self.warned = True
                warnings.warn(f"{self.unusable} of {self.read} videos {self._reason(index.frames)}", stacklevel=2)
        raise DataError(f"{self.stream.name}: {MAX_UNUSABLE} in a row {self._reason(index.frames)}")

    def _reason(self, frames: int) -> str:
        small = "" if self.settings.min_side is None else f", or a side below data.min_side={self.settings.min_side}"
        return (
            f"have fewer frames than their step needs (now {frames}){small}, and were not used; lower data.frames.max "
            "(or data.stride, or raise data.fps)"
        )


@contextmanager
def opened(item: StreamItem, settings: ClipSettings) -> Iterator[Reader]:
    """A reader of an item within the block. Raises MediaError."""
    if item.error is not None:
        raise MediaError(item.path, item.error)
    with ExitStack() as stack:
        if item.content is None:
            reader = open_frames(item.path, settings)
        elif settings.depth is not None:
            raise MediaError(item.path, "is no file; data.depth reads files")
        elif not item.content:
            raise MediaError(item.path, "is empty (0 bytes)")
        elif item.kind == "image":
            reader = ImageReader(item.path, io.BytesIO(item.content), settings.channels == 4)
        else:
            file = stack.enter_context(memory_file(item.path, item.content))
            reader = READERS[settings.reader](file, 1, settings.channels == 4)
        yield stack.enter_context(closing(reader))


def has_clip(reader: Reader, settings: ClipSettings, frames: int) -> bool:
    """Whether a file has enough frames, and enough pixels for settings.min_side."""
    info = reader.info
    return settings.length(info.num_frames, info.fps) >= frames and min(info.square_size) >= (settings.min_side or 0)


# --- a run's data


@dataclass
class StreamingData(StepShapes):
    """The data of a training run from a stream; see loader.TrainingData, which has the same interface."""

    stream: ShardedStream
    schedule: StreamingSchedule
    settings: ClipSettings
    shuffle: int
    workers: int
    prefetch: int
    held_out: list[ClipBatch]
    errors: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)
    skipped_files: list[tuple[str, str]] = field(default_factory=list)
    timeout: float = 0.0
    val_groups: Sequence[tuple[str, ...]] = ()
    held_out_files: Sequence[HeldOutFiles] = ()
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.streams = [Stream(as_file_table(rows_from_paths([], [])), self.schedule, self.settings)]
        self.positions = [Position()] * max(1, self.workers)
        # (micro-batch, the reader's position behind it), as far back as a checkpoint may need them
        self._passed: list[deque[tuple[int, Position]]] = [deque() for _ in self.positions]
        readers = self.schedule.world_size * len(self.positions)
        self.fingerprint = StreamingFingerprint(self.stream.name, self.stream.shards, readers)

    def clips(
        self, first: int, last: int, stopping: Callable[[], bool] = lambda: False
    ) -> Iterator[ClipBatch | Unreadable]:
        """Micro-batches of the optimizer steps first, ..., last - 1, from `positions` on.

        stopping: whether the run ends after the current step. Raises as workers.load does.
        """
        count = self.schedule.accumulate
        for positions in self._passed:
            positions.clear()
        dataset = StreamingClips(
            self.stream, self.schedule, self.settings, self.shuffle, self.positions, first * count, last * count
        )
        batches = load(
            dataset,
            workers=self.workers,
            prefetch=self.prefetch,
            timeout=self.timeout,
            stopping=stopping,
            item_bytes=self.item_bytes,
            held=count,
            spawn=decodes_on_gpu(self.settings.reader),
            batch_size=None,
            collate_fn=tuple,  # each item as it is
            pin_memory=torch.cuda.is_available(),
        )
        for number, reader, batch, position in batches:
            passed = self._passed[reader]
            passed.append((number, Position(*position)))
            # The trainer reads the next step's batches before it saves the current one.
            while len(passed) > 1 and passed[1][0] < number - 2 * count:
                passed.popleft()
            yield batch

    def positions_at(self, step: int) -> list[Position]:
        """Of the readers of this rank, after so many steps: one of the last two that were read."""
        end = step * self.schedule.accumulate
        return [
            next((position for number, position in reversed(passed) if number < end), start)
            for passed, start in zip(self._passed, self.positions, strict=True)
        ]


@dataclass(frozen=True)
class StreamingFingerprint:
    """readers: of all ranks, if the others have as many as this one: else shards are read twice, or never."""

    name: str
    shards: int
    readers: int

    def digests(self) -> dict[str, Any]:
        """Values that must be equal on all ranks."""
        readers = {"data: its readers (ranks x data.workers)": self.readers}
        return {"data: the stream": self.name, "data: its shards": self.shards, **readers}


class StreamingState:
    """Positions of all readers in a stream, saved with checkpoints: those of each rank in its own state.

    step: returns how many steps are done. lines: for the log, after a load.
    """

    def __init__(self, data: StreamingData, step: Callable[[], int]) -> None:
        self.data, self.step = data, step
        self.lines: list[str] = []
        self._continues = False

    def state_dict(self) -> dict[str, Any]:
        epochs = [position.epoch for position in self.data.positions_at(self.step())]
        return {"stream": self._layout(), "epoch": max(epochs)}

    def _layout(self) -> dict[str, Any]:
        schedule = self.data.schedule
        return {
            "name": self.data.stream.name,
            "shards": self.data.stream.shards,
            "data.source.shuffle": self.data.shuffle,
            "run.seed": schedule.seed,
            "data.batch_size": schedule.batch_size,
            "trainer.accumulate": schedule.accumulate,
            "ranks": schedule.world_size,
            "workers": len(self.data.positions),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Positions are loaded by load_rank_state_dict, or a new pass begins if the readers are others."""
        if "stream" not in state:
            self.lines = ["the checkpoint's data was no stream; this one starts at its beginning"]
            return
        layout, saved = self._layout(), state["stream"]
        if not isinstance(saved, Mapping) or not isinstance(state.get("epoch"), int):
            raise ArgumentError("the state of the stream is damaged")
        changed = [f"{key} {saved.get(key)}, now {value}" for key, value in layout.items() if saved.get(key) != value]
        self._continues = not changed
        if changed:
            epoch = state["epoch"] + 1
            self.data.positions = [Position(epoch)] * len(self.data.positions)
            self.lines = [
                f"the stream was read with {'; '.join(changed)}: it cannot go on where it was, and begins its pass "
                f"{epoch + 1}; some clips of the pass before come twice, others not at all"
            ]

    def rank_state_dict(self) -> dict[str, Tensor]:
        return {"positions": torch.tensor(self.data.positions_at(self.step()), dtype=torch.int64)}

    def load_rank_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if not self._continues:
            return
        positions = state.get("positions")
        shape = (len(self.data.positions), len(Position._fields))
        if not isinstance(positions, Tensor) or positions.shape != shape:
            found = tuple(positions.shape) if isinstance(positions, Tensor) else None
            raise ArgumentError(f"positions in the stream are {found}, not {shape}")
        self.data.positions = [Position(*row) for row in positions.tolist()]


def stream_notes(stream: ShardedStream, shuffle: int, readers: int) -> list[str]:
    """Lines for the log: what is read, and what a stream cannot promise."""
    lines = [f"{stream.name}: a stream of {plural(stream.shards, 'shard')}, shuffled in blocks of {shuffle}"]
    if stream.shards < readers:
        lines.append(
            f"{plural(readers, 'reader')} (ranks x data.workers) share {plural(stream.shards, 'shard')}: each reads "
            f"all of it and uses one row of {readers}; write the dataset as at least {readers} files to read it once"
        )
    lines.append(
        "samples are used about equally often. The same command resumes with the same clips, on another number of "
        "ranks or workers with others. data.source.streaming=false does both exactly"
    )
    return lines


def first_clips(
    stream: ShardedStream, settings: ClipSettings, frames: int, count: int, rank: int = 0, world_size: int = 1
) -> tuple[list[ClipBatch], list[tuple[str, str]]]:
    """This rank's share of one clip from each of the first `count` items with at least `frames` frames, from their
    middle; and (path, reason) of items that failed. Raises DataError if none can be read, or none is long enough.
    """
    clips, errors, found, looked_at = [], [], 0, 0
    items = (item for shard in range(stream.shards) for item in stream.read(shard))
    for number, item in enumerate(itertools.islice(items, LOOKED_AT * count)):
        if found == count:
            break
        looked_at += 1
        try:
            with opened(item, settings) as reader:
                if has_clip(reader, settings, frames):
                    found += 1
                    if (found - 1) % world_size == rank:
                        pixels = read_clip(reader, item.path, settings, frames, start=0.5)
                        clips.append(
                            collate([to_sample(pixels, ClipIndex(number, number, frames), item.path, settings)])
                        )
        except MediaError as error:
            errors.append((error.path, error.reason))
    if not found:
        unread = "".join(f"\n  {path}: {reason}" for path, reason in errors[:SHOWN])
        if errors and len(errors) == looked_at:
            raise DataError(f"{stream.name}: none of the first {looked_at} can be read:{unread}")
        raise DataError(
            f"{stream.name}: none of the first {looked_at} has {plural(frames, 'frame')}; lower validation.frames or "
            f"data.frames.max{unread and f'. {len(errors)} cannot be read:{unread}'}"
        )
    return clips, errors
