"""Streams of any source: agreement of the ranks, workers, held-out clips."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vae3d.data.batch_schedule import FrameCounts
from vae3d.data.clips import ClipSettings
from vae3d.data.media import StreamItem
from vae3d.data.streaming import StreamingData, StreamingSchedule


@dataclass
class Shards:
    """A stream of damaged images."""

    count: int = 4
    shards: int = 1
    name: str = "shards/*.tar (val)"

    def read(self, shard: int, first: int = 0) -> Iterator[StreamItem]:
        for number in range(first, self.count):
            yield StreamItem(f"{number}.png", b"\x89PNG broken", "image")


def data_of(workers: int = 0, ranks: int = 1, **settings) -> StreamingData:
    schedule = StreamingSchedule(FrameCounts(1, 1), 0, ranks, world_size=ranks)
    return StreamingData(Shards(), schedule, ClipSettings(8, 8, **settings), 1, workers, 2, [], [])


def test_ranks_with_other_numbers_of_workers_do_not_agree():
    digests = [data_of(workers, ranks=2).fingerprint.digests() for workers in (4, 2, 4)]
    assert digests[0] == digests[2]
    assert {key for key in digests[0] if digests[0][key] != digests[1][key]} == {"data: its readers"}
