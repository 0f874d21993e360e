"""The order in which a stream is read.

A stream has shards, which are read from their first row to their last. `workers` worker processes on each of `ranks`
ranks are its readers. In each pass a reader takes shards of its own, in an order drawn from (seed, pass); if there are
fewer shards than readers, all readers read all shards, and each uses every so many-th row. Of its rows a reader keeps a
block of `shuffle` in memory, which it uses in an order drawn from (seed, block) while it fills the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from vae3d.data.media import DataError, StreamItem
from vae3d.seeding import seed_of


class ShardedStream(Protocol):
    """name: equal on all ranks, for messages and checkpoints. shards: how many there are."""

    name: str

    @property
    def shards(self) -> int: ...

    def read(self, shard: int, first: int = 0) -> Iterator[StreamItem]:
        """The items of a shard from number `first` on. Raises DataError if it cannot be read."""


class Position(NamedTuple):
    """Where a reader is. passed: items of the pass so far. block, drawn: blocks used up, and items used of the next,
    which begins at (epoch, place, row, passed)."""

    epoch: int = 0
    place: int = 0  # of the shard, in the order of the pass
    row: int = 0  # of the shard
    passed: int = 0
    block: int = 0
    drawn: int = 0


class ShuffledItems:
    """The endless items of one reader, from `position` on. `position` is that of the next item."""

    def __init__(
        self, stream: ShardedStream, seed: int, reader: int, readers: int, shuffle: int, position: Position
    ) -> None:
        self.stream, self.seed, self.reader, self.readers = stream, seed, reader, readers
        self.shuffle = shuffle
        self.position = position._replace(drawn=0)
        self._items = self._in_order(position)
        self._next_start = self.position
        self._block = [self._take() for _ in range(shuffle)]
        self._begin_block(self.position)
        for _ in range(position.drawn):
            next(self)

    def __iter__(self) -> ShuffledItems:
        return self

    def __next__(self) -> StreamItem:
        item = self._block[self._order[self.position.drawn]]
        self._filling.append(self._take())
        self.position = self.position._replace(drawn=self.position.drawn + 1)
        if self.position.drawn == self.shuffle:
            self._block = self._filling
            self._begin_block(self._start._replace(block=self.position.block + 1, drawn=0))
        return item

    def _begin_block(self, position: Position) -> None:
        self.position = position
        self._start, self._filling = self._next_start, []
        rng = np.random.default_rng(seed_of(self.seed, self.reader, self.readers, position.block, "stream"))
        self._order = rng.permutation(self.shuffle).tolist()

    def _take(self) -> StreamItem:
        self._next_start, item = next(self._items)
        return item

    def _in_order(self, position: Position) -> Iterator[tuple[Position, StreamItem]]:
        """Items as stored, each with the position behind it."""
        epoch, place, first, passed, *_ = position
        shards = self.stream.shards
        alone = shards >= self.readers  # no other reader reads these shards
        while True:
            order = np.random.default_rng(seed_of(self.seed, epoch, "shards")).permutation(shards).tolist()
            order = order[self.reader :: self.readers] if alone else order
            found = passed > 0
            while place < len(order):
                for row, item in enumerate(self.stream.read(order[place], first), first):
                    passed += 1
                    if alone or (passed - 1) % self.readers == self.reader:
                        found = True
                        yield Position(epoch, place, row + 1, passed), item
                place, first = place + 1, 0
            if not found:
                raise DataError(
                    f"{self.stream.name}: reader {self.reader + 1} of {self.readers} found no rows; use fewer ranks or "
                    "a lower data.workers, or data.source.streaming=false"
                )
            epoch, place, passed = epoch + 1, 0, 0
