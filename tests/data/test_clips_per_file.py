"""data.clips_per_file: several clips of each file that is drawn, read in one pass."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from vae3d.config.diffusion import check_diffusion
from vae3d.config.issues import ConfigError
from vae3d.data.batches import clips
from vae3d.data.batches.batch_schedule import BatchSchedule, FrameCounts, Interleaved
from vae3d.data.batches.clips import ClipDataset, ClipSettings, MixedClips, Stream
from vae3d.data.batches.selection import clip_lengths
from vae3d.data.decoding.frame_source import FrameSource
from vae3d.data.decoding.kept_sources import close_kept_sources
from vae3d.data.decoding.readers import PyAVReader
from vae3d.data.loader import TrainingData, schedule_notes
from vae3d.data.media import MediaError


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> pd.DataFrame:
    """Three videos with one key frame each, and B-frames."""
    folder = tmp_path_factory.mktemp("long")
    paths = [folder / f"{i}.mp4" for i in range(3)]
    for i, path in enumerate(paths):
        tiny.write_video(path, tiny.frames(60, 32, 64, seed=i), bf="3", g="60")
    return pd.DataFrame({"path": map(str, paths), "num_frames": 60, "height": 32, "width": 64, "fps": 24.0})


def schedule(table, settings, clips_per_file=4, batch_size=8, frames=5, **kwargs) -> BatchSchedule:
    counts = FrameCounts(frames, frames)
    kwargs = {"seed": 3, "batch_size": batch_size, "clips_per_file": clips_per_file, **kwargs}
    return BatchSchedule(clip_lengths(table, settings), counts, **kwargs)


def test_each_row_is_drawn_n_times_in_a_row_in_the_order_of_single_clips():
    lengths = np.arange(5, 45)
    alone = BatchSchedule(lengths, FrameCounts(5, 5), seed=0, batch_size=6)
    shared = BatchSchedule(lengths, FrameCounts(5, 5), seed=0, batch_size=6, clips_per_file=3)
    rows = [index.row for step in range(40) for index in alone.step(step)[0]]
    again = [index.row for step in range(120) for index in shared.step(step)[0]]
    assert again == [row for row in rows for _ in range(3)]
    assert set(Counter(again[:120]).values()) == {3}


def test_a_file_that_is_too_short_is_replaced_by_one_file_for_all_its_clips():
    lengths = np.array([5] * 30 + [40] * 10)
    shared = BatchSchedule(lengths, FrameCounts(20, 20), seed=0, batch_size=4, clips_per_file=4)
    for step in range(40):
        assert len({index.row for index in shared.step(step)[0]}) == 1


def test_clips_of_a_file_begin_in_different_parts_of_it():
    shared = BatchSchedule(np.array([100]), FrameCounts(5, 5), seed=0, batch_size=4, clips_per_file=4)
    assert [shared.start_at(position, 0.5) for position in range(4, 8)] == [0.125, 0.375, 0.625, 0.875]
    assert shared.start_at(3, 1 - 2**-53) < 1
    assert BatchSchedule(np.array([9]), FrameCounts(5, 5), seed=0, batch_size=1).start_at(7, 0.3) == 0.3


@pytest.mark.parametrize(
    "settings",
    [
        ClipSettings(16, 16, crop="random", flip=True),
        ClipSettings(16, 16, short_side=20, crop="random", stride=3),
        ClipSettings(16, 16, sampling="first_last_random"),
        ClipSettings(16, 32, panorama=True, roll=True),
    ],
    ids=["contiguous", "stride", "first_last_random", "panorama"],
)
def test_a_batch_has_the_bits_of_clips_read_one_by_one(table, settings):
    plan = schedule(table, settings)
    dataset = ClipDataset(table, plan, settings)
    for step in range(2):
        batch = plan.step(step)[0]
        assert len({index.row for index in batch}) == 2
        for together, index in zip(dataset.__getitems__(batch), batch, strict=True):
            alone = dataset[index]
            assert torch.equal(together.video, alone.video)
            assert (together.index, together.path, together.errors) == (alone.index, alone.path, alone.errors)


def test_clips_of_a_file_open_it_once_and_decode_no_packet_twice(table, monkeypatch):
    settings = ClipSettings(16, 16)
    plan = schedule(table, settings, clips_per_file=4, batch_size=4, frames=17)  # they overlap
    dataset, opened, decoded = ClipDataset(table, plan, settings), [], Counter()
    whole, opening = FrameSource.decode, clips.open_frames

    def decode(*args, **kwargs):
        for number, frames in whole(*args, **kwargs):
            decoded[number] += 1
            yield number, frames

    monkeypatch.setattr(FrameSource, "decode", decode)
    monkeypatch.setattr(clips, "open_frames", lambda path, *args: opened.append(path) or opening(path, *args))
    close_kept_sources()
    dataset.__getitems__(plan.step(0)[0])
    assert len(opened) == 1
    assert set(decoded.values()) == {1}
    assert len(decoded) > 45  # the last clip begins in the last quarter
    decoded.clear()
    for index in plan.step(0)[0]:
        dataset[index]
    assert max(decoded.values()) > 2  # what reading in one pass saves


def test_only_the_clips_that_fail_are_replaced(table, monkeypatch):
    settings = ClipSettings(16, 16)
    plan = schedule(table, settings, batch_size=4)
    dataset, batch = ClipDataset(table, plan, settings), plan.step(0)[0]
    path, read = table["path"][batch[0].row], PyAVReader.read

    def damaged(reader, indices, size=None):
        if str(reader.path) == path and max(indices) > 45:
            raise MediaError(path, "is damaged")
        return read(reader, indices, size)

    monkeypatch.setattr(PyAVReader, "read", damaged)
    samples = dataset.__getitems__(batch)
    assert [bool(sample.errors) for sample in samples] == [False, False, False, True]
    assert set(samples[3].errors) == {(path, "is damaged")}  # its replacement is drawn among all files
    assert samples[3].path != path
    for sample, index in zip(samples, batch, strict=True):
        assert torch.equal(sample.video, dataset[index].video)


def test_ranks_and_a_later_start_do_not_change_the_clips(table):
    settings = ClipSettings(16, 16, crop="random")

    def videos(first, last, **kwargs):
        plan = schedule(table, settings, clips_per_file=2, batch_size=4, **kwargs)
        return [
            clip.video for clip in TrainingData([Stream(table, plan, settings)], plan, 0, 2, [], []).clips(first, last)
        ]

    whole, later = videos(0, 4), videos(2, 4)
    halves = [videos(0, 4, rank=rank, world_size=2) for rank in range(2)]
    assert all(map(torch.equal, whole[2:], later))
    assert all(torch.equal(torch.cat(pair), clip) for clip, *pair in zip(whole, *halves, strict=True))


def test_streams_of_a_mixture_have_clips_per_file_of_their_own(table):
    settings = ClipSettings(16, 16, crop="random")
    plans = [schedule(table, settings, clips_per_file=n, batch_size=4, seed=n) for n in (4, 1, 2)]
    mixed = Interleaved(plans, [1, 1, 2], seed=0)
    dataset = MixedClips([Stream(table, plan, settings) for plan in plans])
    seen = set()
    for step in range(8):
        (batch,) = mixed.step(step)
        stream = batch[0].stream
        seen.add(stream)
        starts = [plans[stream].start_at(index.position // 3, 0.5) for index in batch]
        assert starts == {0: [0.125, 0.375, 0.625, 0.875], 1: [0.5] * 4, 2: [0.25, 0.75] * 2}[stream]
        for together, index in zip(dataset.__getitems__(batch), batch, strict=True):
            assert torch.equal(together.video, dataset[index].video)
    assert seen == {0, 1, 2}


def test_a_batch_that_cuts_through_the_clips_of_a_file_is_noted(table):
    settings = ClipSettings(16, 16)
    assert schedule_notes(schedule(table, settings, clips_per_file=1)) == []
    (note,) = schedule_notes(schedule(table, settings, clips_per_file=4, batch_size=8))
    assert "data.clips_per_file=4" in note
    (*_, note) = schedule_notes(schedule(table, settings, clips_per_file=4, batch_size=8, world_size=4))
    assert "2 clips" in note


def test_caches_of_latents_have_no_clips_per_file(tmp_path):
    cfg = tiny.compose(f"cache={tmp_path}", "vae.path=x", "data.clips_per_file=2", config="diffusion")
    with pytest.raises(ConfigError) as error:
        check_diffusion(cfg)
    assert ("data.clips_per_file", 2) in [(issue.key, issue.value) for issue in error.value.issues]
