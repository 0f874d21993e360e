"""Which clips make up a step: a pure function of (seed, step), the same on every rank, with nothing to save."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from vae3d.data.sources import DataError
from vae3d.seeding import seed_of


class Draw(NamedTuple):
    """A clip to load. position: its place in the endless training order; record: row of the table."""

    position: int
    record: int
    frames: int


@dataclass(frozen=True)
class FrameCounts:
    """Frames per clip: minimum, minimum + step, ... maximum alike, or 1 with probability `images`.

    fit: not drawn, but the largest that all clips of a step have.
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
        """The frame count of a step whose records have `lengths`."""
        if rng.random() < self.images:
            return 1
        return self.fitting(lengths) if self.fit else int(rng.choice(self.choices))

    def fitting(self, lengths: np.ndarray) -> int:
        """The largest count that all have; those without even the smallest are replaced, and do not count."""
        enough = lengths[lengths >= self.minimum]
        shortest = min(enough.min(), self.maximum) if len(enough) else self.minimum
        return self.choices[int(shortest - self.minimum) // self.step]

    def all(self) -> list[int]:
        """Every count that can be drawn, ascending."""
        videos = set(self.choices) if self.images < 1.0 else set()
        return sorted(videos | ({1} if self.images > 0.0 else set()))


@dataclass
class Lengths:
    """How many frames each record can give at the wanted stride or rate, and who can give a certain number."""

    lengths: np.ndarray
    order: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.order = np.argsort(self.lengths, kind="stable")
        self._sorted = self.lengths[self.order]

    def eligible(self, frames: int) -> np.ndarray:
        return self.order[np.searchsorted(self._sorted, frames) :]


@dataclass
class Plan:
    """The training order.

    Records are shuffled anew in every epoch; epochs run into each other, so no batch is short and no record is
    dropped. A record too short for the step's frame count gives its place to one that is long enough.
    Raises DataError if a frame count can be drawn that no record has, or, where counts fit the records, no record
    has the smallest.
    """

    lengths: Lengths
    frames: FrameCounts
    seed: int
    batch_size: int  # clips per step over all ranks
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    overfit: bool = False

    def __post_init__(self) -> None:
        longest = int(self.lengths.lengths.max(initial=0))
        needed = [self.frames.minimum] if self.frames.fit else self.frames.all()
        too_long = [frames for frames in needed if frames > longest]
        if too_long:
            raise DataError(
                f"clips of {too_long[0]} frames are asked for, but the longest video gives {longest}; "
                "lower data.frames.max (or data.stride, or raise data.fps)"
            )
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    @property
    def micro_batch(self) -> int:
        return self.batch_size // (self.accumulate * self.world_size)

    def frames_at(self, step: int) -> int:
        clips = range(step * self.batch_size, (step + 1) * self.batch_size)
        lengths = self.lengths.lengths[[self._record(position) for position in clips]]
        return self.frames.draw(np.random.default_rng(seed_of(self.seed, step, "frames")), lengths)

    def step(self, step: int) -> list[list[Draw]]:
        """This rank's draws of optimizer step `step`, one list per micro-batch.

        The clips of a step are the same for any world size and accumulation; only who loads which differs.
        """
        step = 0 if self.overfit else step
        frames = self.frames_at(step)
        batches = []
        for micro in range(self.accumulate):
            first = step * self.batch_size + (micro * self.world_size + self.rank) * self.micro_batch
            batches.append([self.draw(position, frames) for position in range(first, first + self.micro_batch)])
        return batches

    def draw(self, position: int, frames: int) -> Draw:
        record = self._record(position)
        if self.lengths.lengths[record] < frames:
            record = self.replacement(position, frames, "short")
        return Draw(position, record, frames)

    def replacement(self, position: int, frames: int, why: str | int) -> int:
        """Another record that has enough frames, drawn from (seed, position, why)."""
        rng = np.random.default_rng(seed_of(self.seed, position, why, "replacement"))
        return int(rng.choice(self.lengths.eligible(frames)))

    def _record(self, position: int) -> int:
        count = len(self.lengths.lengths)
        epoch, place = divmod(position, count)
        if self._epoch[0] != epoch:
            rng = np.random.default_rng(seed_of(self.seed, epoch, "shuffle"))
            self._epoch = (epoch, rng.permutation(count))
        return int(self._epoch[1][place])


class StepSampler(Sampler[list[Draw]]):
    """Batch sampler over micro-batches from optimizer step `first` up to `last` (exclusive)."""

    def __init__(self, plan: Plan, first: int, last: int) -> None:
        self.plan, self.first, self.last = plan, first, last

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.first, self.last):
            yield from self.plan.step(step)

    def __len__(self) -> int:
        return (self.last - self.first) * self.plan.accumulate
