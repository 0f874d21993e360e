"""Streams of any source: agreement of the ranks, workers, held-out clips."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from vae3d.data import streaming
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
    assert {key for key in digests[0] if digests[0][key] != digests[1][key]} == {
        "data: its readers (ranks x data.workers)"
    }


@pytest.mark.parametrize(("reader", "spawns"), [("auto", False), ("torchcodec_cuda", True)])
def test_workers_that_decode_on_the_gpu_are_spawned(monkeypatch, reader, spawns):
    loaded = []
    monkeypatch.setattr(streaming, "load", lambda dataset, **options: loaded.append((dataset, options)) or iter(()))
    assert list(data_of(workers=2, reader=reader).clips(0, 1)) == []
    [(dataset, options)] = loaded
    assert options.get("spawn", False) == spawns
    pickle.dumps(dataset)  # a new interpreter gets it so
