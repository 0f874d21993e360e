"""Streams of any source: agreement of the ranks, workers, held-out clips."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from PIL import Image

from vae3d.data.batches import streaming
from vae3d.data.batches.batch_schedule import FrameCounts
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.batches.streaming import StreamingData, StreamingSchedule, first_clips
from vae3d.data.decoding.depth import DepthSettings
from vae3d.data.media import DataError, StreamItem


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


@pytest.mark.parametrize("depth", [None, DepthSettings("log")])
def test_held_out_items_that_cannot_be_read_are_named_with_the_reason(depth):
    with pytest.raises(DataError) as raised:
        first_clips(Shards(), ClipSettings(8, 8, depth=depth), 1, 4)
    assert "none of the first 4 can be read" in str(raised.value)
    assert "\n  0.png: " in str(raised.value)
    assert "validation.frames" not in str(raised.value)
    assert ("data.depth" in str(raised.value)) == (depth is not None)


def test_held_out_items_that_are_too_short_are_counted_as_far_as_they_were_looked_at(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    good = StreamItem("a.png", (tmp_path / "a.png").read_bytes(), "image")
    stream = Shards()
    stream.read = lambda shard: [good, *Shards(2).read(0)]
    with pytest.raises(
        DataError, match=r"none of the first 3 has 5 frames.*validation\.frames.*\. 2 cannot be read:\n"
    ):
        first_clips(stream, ClipSettings(8, 8), 5, 4)
