"""Which clips make up each training step: a pure function of (seed, step), equal on every rank, with no state to save.

Training order: positions 0, 1, 2, ... run through epoch after epoch. Each epoch is a permutation of the table's rows,
seeded by (seed, epoch): drawn by NumPy up to SHUFFLED rows, computed place by place above (see permutation.py). Step s
takes the positions from s * batch_size up to (s + 1) * batch_size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vae3d.data.media import DataError
from vae3d.data.permutation import Permutation
from vae3d.seeding import seed_of
from vae3d.text import plural

SHUFFLED = 2**16  # rows; above, a permutation in memory costs more than it gives


class ClipIndex(NamedTuple):
    """A clip to load: its position in the training order, its row in the table, its number of frames."""

    position: int
    row: int
    frames: int


@dataclass(frozen=True)
class FrameCounts:
    """Frames per clip: 1 with probability `images`, else minimum, minimum + step, ..., maximum with equal probability.

    fit: no random draw, but the largest of these counts that all clips of the step have.
    """

    minimum: int
    maximum: int
    step: int = 1
    images: float = 0.0
    fit: bool = False

    @property
    def choices(self) -> range:
        return range(self.minimum, self.maximum + 1, self.step)

    def draw(self, rng: np.random.Generator, lengths: np.ndarray) -> int:
        """The frame count of a step. lengths: frames that each row of the step has."""
        if rng.random() < self.images:
            return 1
        return self.largest_fitting(lengths) if self.fit else int(rng.choice(self.choices))

    def largest_fitting(self, lengths: np.ndarray) -> int:
        """The largest count that all rows have. Rows below the minimum are ignored: the schedule replaces them."""
        enough = lengths[lengths >= self.minimum]
        shortest = min(enough.min(), self.maximum) if len(enough) else self.minimum
        return self.choices[int(shortest - self.minimum) // self.step]

    def all(self) -> list[int]:
        """Every count that can be drawn, ascending."""
        videos = set(self.choices) if self.images < 1.0 else set()
        return sorted(videos | ({1} if self.images > 0.0 else set()))


@dataclass
class BatchSchedule:
    """The clips of every step.

    Epochs run into each other, so no batch is short and no row is dropped. A row with fewer frames than the step needs
    is replaced by a random row that has enough.

    lengths: [rows] frames that each row can give at the configured stride or rate. batch_size: clips per step over all
    ranks. overfit: repeat step 0. by_length: rows in a stable order of their lengths; None: sorted here. Of a large
    table, both are memory-mapped.
    Raises DataError if no row has as many frames as a count that can be drawn or, with frames.fit, as the minimum.
    """

    lengths: np.ndarray
    frames: FrameCounts
    seed: int
    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    overfit: bool = False
    by_length: np.ndarray | None = None

    def __post_init__(self) -> None:
        self._by_length = np.argsort(self.lengths, kind="stable") if self.by_length is None else self.by_length
        longest = max(0, int(self.lengths[self._by_length[-1]])) if len(self.lengths) else 0
        needed = [self.frames.minimum] if self.frames.fit else self.frames.all()
        too_long = [frames for frames in needed if frames > longest]
        if too_long:
            raise DataError(
                f"clips of {plural(too_long[0], 'frame')} are requested, but the longest video gives {longest}; "
                "lower data.frames.max (or data.stride, or raise data.fps)"
            )
        self._epoch = -1
        self._permutation: np.ndarray | Permutation = np.empty(0, int)  # of epoch `_epoch`

    @property
    def micro_batch(self) -> int:
        return self.batch_size // (self.accumulate * self.world_size)

    def frames_at(self, step: int) -> int:
        """Frames per clip of a step."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        lengths = self.lengths[[self._row_at(position) for position in positions]]
        return self.frames.draw(np.random.default_rng(seed_of(self.seed, step, "frames")), lengths)

    def step(self, step: int) -> list[list[ClipIndex]]:
        """This rank's clips of a step, one list per micro-batch.

        The step as a whole does not depend on world size and accumulation; only which rank loads which clip does.
        """
        step = 0 if self.overfit else step
        frames = self.frames_at(step)
        batches = []
        for micro in range(self.accumulate):
            first = step * self.batch_size + (micro * self.world_size + self.rank) * self.micro_batch
            batches.append([self.clip_at(position, frames) for position in range(first, first + self.micro_batch)])
        return batches

    def micro_batches(self, first: int, last: int) -> Iterator[list[ClipIndex]]:
        """This rank's micro-batches of the steps first, ..., last - 1: the batch_sampler of a DataLoader."""
        for step in range(first, last):
            yield from self.step(step)

    def clip_at(self, position: int, frames: int) -> ClipIndex:
        row = self._row_at(position)
        if self.lengths[row] < frames:
            row = self.replacement(position, frames, "short")
        return ClipIndex(position, row, frames)

    def replacement(self, position: int, frames: int, why: str | int) -> int:
        """Another row with enough frames, seeded by (seed, position, why)."""
        rng = np.random.default_rng(seed_of(self.seed, position, why, "replacement"))
        return int(rng.choice(self.with_at_least(frames)))

    def with_at_least(self, frames: int) -> np.ndarray:
        """Rows with at least so many frames, shortest first."""
        lengths, rows = self.lengths, self._by_length
        return rows[bisect_left(range(len(rows)), frames, key=lambda place: lengths[rows[place]]) :]

    def _row_at(self, position: int) -> int:
        count = len(self.lengths)
        epoch, index = divmod(position, count)
        if self._epoch != epoch:
            self._epoch, self._permutation = epoch, self._shuffled(epoch)
        return int(self._permutation[index])

    def _shuffled(self, epoch: int) -> np.ndarray | Permutation:
        count = len(self.lengths)
        if count > SHUFFLED:
            return Permutation(count, self.seed, epoch, "shuffle")
        return np.random.default_rng(seed_of(self.seed, epoch, "shuffle")).permutation(count)
