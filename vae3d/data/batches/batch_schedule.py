"""Which clips make up each training step: a pure function of (seed, step), equal on every rank, with no state to save.

Training order: positions 0, 1, 2, ... run through epoch after epoch. Each epoch is a permutation of the table's rows,
seeded by (seed, epoch): drawn by NumPy up to SHUFFLED rows, computed place by place above (see permutation.py). Step s
takes the positions from s * batch_size up to (s + 1) * batch_size.

With clips_per_file=n, positions k n, ..., k n + n - 1 take the k-th row of that order, so an epoch has n clips of every
row.

Buckets of shapes and mixtures of sources have several such streams. A step takes all its clips from one of them:
Interleaved says which, again as a pure function of (seed, step).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from vae3d.data.media import DataError
from vae3d.data.permutation import Permutation
from vae3d.seeding import seed_of
from vae3d.text import plural

SHUFFLED = 2**16  # rows; above, a permutation in memory costs more than it gives
MAX_CYCLE = 10_000  # steps after which every stream has had exactly its share


class ClipIndex(NamedTuple):
    """A clip to load: its position in the training order, its row in the stream's table, its number of frames, and the
    number of its stream."""

    position: int
    row: int
    frames: int
    stream: int = 0


class StepShape(NamedTuple):
    """A kind of step: the number of its stream, frames per clip, and clips per micro-batch."""

    stream: int
    frames: int
    micro_batch: int


class BatchShape(NamedTuple):
    """Of a micro-batch: the number of its stream, clips, and their frames, height and width."""

    stream: int
    clips: int
    frames: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.clips * self.frames * self.height * self.width


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

    def draw(self, rng: np.random.Generator, lengths: Callable[[], np.ndarray] | None = None) -> int:
        """The frame count of a step. lengths: returns the frames that each row of the step has; needed with `fit`, and
        slow for many rows, so that it is called then only."""
        if rng.random() < self.images:
            return 1
        return self.largest_fitting(lengths()) if self.fit else int(rng.choice(self.choices))

    def largest_fitting(self, lengths: np.ndarray) -> int:
        """The largest count that all rows have. Rows below the minimum are ignored: the schedule replaces them."""
        enough = lengths[lengths >= self.minimum]
        shortest = min(enough.min(), self.maximum) if len(enough) else self.minimum
        return self.choices[int(shortest - self.minimum) // self.step]

    def all(self) -> list[int]:
        """Every count that can be drawn, ascending."""
        videos = set(self.choices) if self.images < 1.0 else set()
        return sorted(videos | ({1} if self.images > 0.0 else set()))


class OneStream:
    """The methods of Interleaved, for a schedule of one stream: every step is its own, and has batch_size clips."""

    @property
    def micro_batch(self) -> int:
        return self.batch_size // (self.accumulate * self.world_size)

    def positions(self, step: int, micro: int) -> range:
        """This rank's places in the training order, of micro-batch `micro` of a step."""
        first = step * self.batch_size + (micro * self.world_size + self.rank) * self.micro_batch
        return range(first, first + self.micro_batch)

    @property
    def leaves(self) -> list[OneStream]:
        return [self]

    def locate(self, step: int) -> tuple[int, int]:
        return 0, step

    def steps_before(self, step: int) -> list[int]:
        return [step]

    def clips_before(self, step: int) -> int:
        return step * self.batch_size

    def batch_size_at(self, step: int) -> int:
        return self.batch_size

    def shares(self) -> list[float]:
        return [1.0]

    def shapes(self) -> list[StepShape]:
        return [StepShape(0, frames, self.micro_batch) for frames in self.frames.all()]


@dataclass
class BatchSchedule(OneStream):
    """The clips of every step.

    Epochs run into each other, so no batch is short and no row is dropped. A row with fewer frames than the step needs
    is replaced by a random row that has enough.

    lengths: [rows] frames that each row can give at the configured stride or rate. batch_size: clips per step over all
    ranks. overfit: repeat step 0. rows: [rows] their numbers in the table; None: they are all of its rows.
    clips_per_file: consecutive clips from each row that is drawn. by_length: rows in a stable order of their lengths;
    None: sorted here. Of a large table, lengths and by_length are mapped into memory.
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
    rows: np.ndarray | None = None
    clips_per_file: int = 1
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

    def frames_at(self, step: int) -> int:
        """Frames per clip of a step."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return self.frames.draw(
            np.random.default_rng(seed_of(self.seed, step, "frames")),
            lambda: self.lengths[[self._row_at(position) for position in positions]],
        )

    def step(self, step: int) -> list[list[ClipIndex]]:
        """This rank's clips of a step, one list per micro-batch.

        The step as a whole does not depend on world size and accumulation; only which rank loads which clip does.
        """
        step = 0 if self.overfit else step
        frames = self.frames_at(step)
        return [
            [self.clip_at(position, frames) for position in self.positions(step, micro)]
            for micro in range(self.accumulate)
        ]

    def micro_batches(self, first: int, last: int) -> Iterator[list[ClipIndex]]:
        """This rank's micro-batches of the steps first, ..., last - 1: the batch_sampler of a DataLoader."""
        for step in range(first, last):
            yield from self.step(step)

    def clip_at(self, position: int, frames: int) -> ClipIndex:
        """The clip at a position of the training order; of another row if that one has fewer frames."""
        row = self._row_at(position)
        if self.lengths[row] < frames:
            return ClipIndex(position, self.replacement(position, frames, "short"), frames)
        return ClipIndex(position, self._in_table(row), frames)

    def replacement(self, position: int, frames: int, why: str | int) -> int:
        """Another row of the table with enough frames, seeded by (seed, position // clips_per_file, why)."""
        rng = np.random.default_rng(seed_of(self.seed, position // self.clips_per_file, why, "replacement"))
        return self._in_table(int(rng.choice(self.with_at_least(frames))))

    def start_at(self, position: int, draw: float) -> float:
        """Where a clip begins, as a fraction in [0, 1) of its possible places in the file.

        draw: uniform in [0, 1). The clips of one file share it evenly: the i-th of n begins in the i-th n-th.
        """
        start = (position % self.clips_per_file + draw) / self.clips_per_file
        return min(start, math.nextafter(1.0, 0.0))  # the sum may round up

    def with_at_least(self, frames: int) -> np.ndarray:
        """Rows with at least so many frames, shortest first."""
        lengths, rows = self.lengths, self._by_length
        return rows[bisect_left(range(len(rows)), frames, key=lambda place: lengths[rows[place]]) :]

    def _in_table(self, row: int) -> int:
        return row if self.rows is None else int(self.rows[row])

    def _row_at(self, position: int) -> int:
        epoch, index = divmod(position // self.clips_per_file, len(self.lengths))
        if self._epoch != epoch:
            self._epoch, self._permutation = epoch, self._shuffled(epoch)
        return int(self._permutation[index])

    def _shuffled(self, epoch: int) -> np.ndarray | Permutation:
        count = len(self.lengths)
        if count > SHUFFLED:
            return Permutation(count, self.seed, epoch, "shuffle")
        return np.random.default_rng(seed_of(self.seed, epoch, "shuffle")).permutation(count)


@dataclass
class Interleaved:
    """Several schedules, one of which gives all clips of a step. There is no state: it is a pure function of the step.

    Steps run through cycles, in each of which every schedule has exactly its share of steps: `weights`, as fractions,
    and with a cycle of at most MAX_CYCLE steps. Within a cycle the steps of a schedule are spread evenly, each at a
    random time of its own interval, seeded by (seed, cycle): so shares hold within a few steps at any time. A schedule
    then takes its own step number n in its n-th step.

    schedules: BatchSchedule or Interleaved, such as sources and their buckets, of the same ranks and accumulation. The
    BatchSchedules at the bottom are the streams, numbered in order (`leaves`). overfit: repeat step 0.
    Raises ValueError for a weight that is not above 0.
    """

    schedules: Sequence[Schedule]
    weights: Sequence[float | Fraction]
    seed: int
    overfit: bool = False

    def __post_init__(self) -> None:
        self.counts = cycle_counts(self.weights)
        self.leaves = [leaf for schedule in self.schedules for leaf in schedule.leaves]
        firsts = np.cumsum([0, *(len(schedule.leaves) for schedule in self.schedules)])
        self._first_leaf = firsts[:-1].tolist()
        self._cycle, self._order, self._earlier = -1, np.empty(0, int), np.empty(0, int)  # of cycle `_cycle`

    @property
    def accumulate(self) -> int:
        return self.leaves[0].accumulate

    @property
    def rank(self) -> int:
        return self.leaves[0].rank

    @property
    def world_size(self) -> int:
        return self.leaves[0].world_size

    @property
    def micro_batch(self) -> int:
        """The largest."""
        return max(leaf.micro_batch for leaf in self.leaves)

    def shares(self) -> list[float]:
        """Of all steps, those of each stream."""
        shares = zip(self.counts, self.schedules, strict=True)
        return [count / sum(self.counts) * share for count, schedule in shares for share in schedule.shares()]

    def shapes(self) -> list[StepShape]:
        """Every kind of step."""
        return [shape._replace(stream=i) for i, leaf in enumerate(self.leaves) for shape in leaf.shapes()]

    def locate(self, step: int) -> tuple[int, int]:
        """The stream of a step, and the number of the step in it."""
        cycle, place = divmod(0 if self.overfit else step, sum(self.counts))
        self._draw(cycle)
        which = int(self._order[place])
        leaf, local = self.schedules[which].locate(cycle * self.counts[which] + int(self._earlier[place]))
        return self._first_leaf[which] + leaf, local

    def steps_before(self, step: int) -> list[int]:
        """How many of the steps before this one each stream has given."""
        if self.overfit:
            repeated = self.locate(0)[0]
            return [step * (i == repeated) for i in range(len(self.leaves))]
        cycle, place = divmod(step, sum(self.counts))
        self._draw(cycle)
        begun = np.bincount(self._order[:place], minlength=len(self.counts)).tolist()
        taken = (cycle * count + more for count, more in zip(self.counts, begun, strict=True))
        return [n for schedule, steps in zip(self.schedules, taken, strict=True) for n in schedule.steps_before(steps)]

    def clips_before(self, step: int) -> int:
        """How many clips all ranks have drawn before this step."""
        return sum(n * leaf.batch_size for n, leaf in zip(self.steps_before(step), self.leaves, strict=True))

    def batch_size_at(self, step: int) -> int:
        """Clips of a step over all ranks."""
        return self.leaves[self.locate(step)[0]].batch_size

    def frames_at(self, step: int) -> int:
        """Frames per clip of a step."""
        leaf, local = self.locate(step)
        return self.leaves[leaf].frames_at(local)

    def step(self, step: int) -> list[list[ClipIndex]]:
        """This rank's clips of a step, one list per micro-batch, all of one stream."""
        stream, local = self.locate(step)
        streams = len(self.leaves)
        return [
            [ClipIndex(i.position * streams + stream, i.row, i.frames, stream) for i in micro]
            for micro in self.leaves[stream].step(local)
        ]

    def micro_batches(self, first: int, last: int) -> Iterator[list[ClipIndex]]:
        """This rank's micro-batches of the steps first, ..., last - 1: the batch_sampler of a DataLoader."""
        for step in range(first, last):
            yield from self.step(step)

    def _draw(self, cycle: int) -> None:
        """Which schedule gives each step of a cycle, and how many of its steps come earlier in the cycle."""
        if self._cycle == cycle:
            return
        rng = np.random.default_rng(seed_of(self.seed, cycle, "streams"))
        times = np.concatenate([(np.arange(count) + rng.random(count)) / count for count in self.counts])
        numbers = np.concatenate([np.arange(count) for count in self.counts])
        order = np.argsort(times, kind="stable")
        self._cycle, self._order = cycle, np.repeat(np.arange(len(self.counts)), self.counts)[order]
        self._earlier = numbers[order]


Schedule = BatchSchedule | Interleaved


def stream_counts(schedule: Schedule, groups: Sequence[Sequence[str]], step: int) -> dict[str, float]:
    """Steps and clips before a step of each group of streams, for the log. groups: names of those each stream is in."""
    counts: dict[str, float] = {}
    for leaf, names, steps in zip(schedule.leaves, groups, schedule.steps_before(step), strict=True):
        for name in names:
            for what, count in (("steps", steps), ("clips", steps * leaf.batch_size)):
                counts[f"data/{what}_{name}"] = counts.get(f"data/{what}_{name}", 0) + count
    return counts


def cycle_counts(weights: Sequence[float | Fraction]) -> list[int]:
    """The steps of each stream in the shortest cycle that holds the weights exactly: 0.5 and 1.5 give 1 and 3.

    With a cycle longer than MAX_CYCLE: the nearest counts that add up to MAX_CYCLE, at least 1 each.
    Raises ValueError for a weight that is not above 0.
    """
    shares = [Fraction(str(weight)) for weight in weights]  # 0.1 is one tenth
    if min(shares) <= 0:
        raise ValueError(f"weights must be above 0, and these are {', '.join(map(str, weights))}")
    unit = math.lcm(*(share.denominator for share in shares))
    counts = [int(share * unit) for share in shares]
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    if sum(counts) <= MAX_CYCLE:
        return counts
    exact = [Fraction(count * MAX_CYCLE, sum(counts)) for count in counts]
    rounded = [max(1, int(count)) for count in exact]
    remainders = sorted(range(len(counts)), key=lambda i: (rounded[i] - exact[i], i))  # the most that is lacking first
    for i in remainders[: max(0, MAX_CYCLE - sum(rounded))]:
        rounded[i] += 1
    return rounded
