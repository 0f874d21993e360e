from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests import tiny
from vae3d.data.batches.batch_schedule import BatchSchedule, FrameCounts
from vae3d.data.batches.clips import (
    ATTEMPTS,
    ClipDataset,
    ClipSettings,
    Stream,
    Unreadable,
    collate,
    read_clip,
    resize_crop_params,
)
from vae3d.data.batches.held_out import long_enough, read_held_out, validation_clips
from vae3d.data.batches.selection import clip_lengths
from vae3d.data.decoding.images import resize_circular
from vae3d.data.decoding.readers import open_media
from vae3d.data.loader import TrainingData
from vae3d.data.media import DataError, MediaError
from vae3d.data.sources.folder import Folder
from vae3d.data.sources.table import Table
from vae3d.data.table.probe import fill_metadata


def training_data(table, workers=0, frames=(1, 9), settings=None, **kwargs) -> TrainingData:
    settings = settings or ClipSettings(16, 16, crop="random", flip=True)
    rows, errors = fill_metadata(Table(table).table())
    schedule = BatchSchedule(clip_lengths(rows, settings), FrameCounts(*frames), seed=3, batch_size=4, **kwargs)
    return TrainingData([Stream(rows, schedule, settings)], schedule, workers, 2, [], errors)


def number(frame: np.ndarray) -> int:
    """The number that tiny.frames wrote into the corner."""
    return round(float(frame[1:7, 1:7].mean()) / 5)


def test_workers_and_start_do_not_change_the_clips(videos):
    alone = list(training_data(videos).clips(0, 6))
    shared = list(training_data(videos, workers=2).clips(0, 6))
    resumed = list(training_data(videos, workers=2).clips(4, 6))
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a.video, b.video)
        assert a.paths == b.paths
    for a, b in zip(alone[4:], resumed, strict=True):
        assert torch.equal(a.video, b.video)


def test_two_ranks_share_the_clips_of_one(videos):
    whole = list(training_data(videos).clips(0, 3))
    halves = [list(training_data(videos, rank=r, world_size=2).clips(0, 3)) for r in range(2)]
    for step in range(3):
        both = torch.cat([halves[r][step].video for r in range(2)])
        assert torch.equal(both, whole[step].video)


def test_clips_are_uint8_until_moved_and_then_in_minus_one_to_one(videos):
    clip = next(iter(training_data(videos).clips(0, 1)))
    assert clip.video.dtype == torch.uint8
    moved = clip.to("cpu")
    assert moved.video.dtype == torch.float32
    torch.testing.assert_close((moved.video + 1) * 127.5, clip.video.float(), rtol=0, atol=1e-3)
    assert moved.video.min() >= -1
    assert moved.video.max() <= 1


def test_every_start_is_drawn_and_frames_are_consecutive(tmp_path):
    path = tiny.write_video(tmp_path / "a.mp4", tiny.frames(18), crf="0")
    reader = open_media(path)
    settings = ClipSettings(32, 40)
    starts = Counter()
    for start in np.random.default_rng(0).random(60):
        numbers = [number(frame) for frame in read_clip(reader, str(path), settings, 17, start)]
        assert np.diff(numbers).tolist() == [1] * 16
        starts[numbers[0]] += 1
    assert set(starts) == {0, 1}
    assert min(starts.values()) > 15


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (ClipSettings(32, 40, stride=3), [0, 3, 6, 9]),
        (ClipSettings(32, 40, fps=8.0), [0, 3, 6, 9]),  # the file has 24
        (ClipSettings(32, 40, fps=10.0), [0, 2, 4, 7]),
        (ClipSettings(32, 40, fps=60.0), [0, 1, 2, 3]),
        (ClipSettings(32, 40, stride=2, fps=12.0), [0, 4, 8, 12]),
    ],
)
def test_stride_and_rate(tmp_path, settings, expected):
    path = tiny.write_video(tmp_path / "a.mp4", tiny.frames(20), crf="0")
    frames = read_clip(open_media(path), str(path), settings, 4, start=0.0)
    assert [number(frame) for frame in frames] == expected
    assert settings.length(20, 24.0) == len([i for i in range(20) if int(i * settings.step(24.0)) < 20])


def test_a_file_shorter_than_its_row_is_refused(tmp_path):
    path = tiny.write_video(tmp_path / "a.mp4", tiny.frames(5))
    with pytest.raises(MediaError, match=r"has 5 frames, .* needs 9"):
        read_clip(open_media(path), str(path), ClipSettings(32, 40), 9, 0.0)


@pytest.mark.parametrize("short", [394, 474, 478, 1012, 480, 720, 1080, 65])
def test_crops_cover_the_target_for_every_size(short):
    for height, width in ((short, short * 16 // 9), (short * 16 // 9, short)):
        crop = resize_crop_params(height, width, (256, 256))
        assert min(crop.size) == 256
        assert crop.size[0] / crop.size[1] == pytest.approx(height / width, rel=0.01)
        assert (crop.top, crop.left) == ((crop.size[0] - 256) // 2, (crop.size[1] - 256) // 2)


def test_random_crops_reach_every_corner():
    rng = np.random.default_rng(0)
    places = {(c.top, c.left) for c in (resize_crop_params(20, 20, (18, 18), rng=rng) for _ in range(200))}
    assert places == {(0, 0)}  # nothing to choose: the size is covered exactly
    places = {c.left for c in (resize_crop_params(18, 21, (18, 18), rng=rng) for _ in range(200))}
    assert places == {0, 1, 2, 3}
    crops = [resize_crop_params(40, 60, (18, 18), 20, rng) for _ in range(300)]
    assert {c.size for c in crops} == {(20, 30)}
    assert {c.top for c in crops} == {0, 1, 2}
    assert {c.left for c in crops} == set(range(13))


def broken(videos, tmp_path, share: int):
    rows, _ = fill_metadata(Table(videos).table())
    rows = rows[rows["num_frames"] > 1].reset_index(drop=True)
    for i in range(share):
        (tmp_path / f"gone{i}.mp4").write_bytes(b"")
        rows.loc[i, "path"] = str(tmp_path / f"gone{i}.mp4")
    settings = ClipSettings(16, 16)
    return rows, BatchSchedule(clip_lengths(rows, settings), FrameCounts(5, 5), seed=0, batch_size=2), settings


def test_a_broken_file_is_reported_and_replaced_by_a_seeded_draw(videos, tmp_path):
    rows, schedule, settings = broken(videos, tmp_path, 2)
    dataset = ClipDataset(rows, schedule, settings)
    samples = [dataset[index] for step in range(10) for index in schedule.step(step)[0]]
    replaced = [sample for sample in samples if sample.errors]
    assert replaced
    for sample in samples:
        assert sample.video.shape == (3, 5, 16, 16)
        assert sample.video.float().std() > 5  # a picture, no placeholder
        assert "gone" not in sample.path
    assert {reason for sample in replaced for _, reason in sample.errors} == {"is empty (0 bytes)"}
    again = ClipDataset(rows, schedule, settings)
    assert torch.equal(again[replaced[0].index._replace(row=0)].video, dataset[replaced[0].index._replace(row=0)].video)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_files_gives_their_names_in_place_of_clips(videos, tmp_path, workers):
    rows, schedule, settings = broken(videos, tmp_path, 10)
    data = TrainingData([Stream(rows, schedule, settings)], schedule, workers, 2, [], [])
    given = list(data.clips(0, 3))
    assert len(given) == 3  # and reading goes on
    for unreadable in given:
        assert isinstance(unreadable, Unreadable)
        assert len(unreadable.errors) >= ATTEMPTS
        assert all(path.endswith(".mp4") and reason == "is empty (0 bytes)" for path, reason in unreadable.errors)


def test_batches_collect_errors(videos, tmp_path):
    rows, schedule, settings = broken(videos, tmp_path, 3)
    dataset = ClipDataset(rows, schedule, settings)
    samples = [dataset[index] for index in schedule.step(0)[0]]
    samples[0].errors = [("x.mp4", "is odd")]
    assert ("x.mp4", "is odd") in collate(samples).errors


def test_validation_clips_are_always_the_same_and_shared_among_ranks(videos):
    rows, _ = fill_metadata(Table(videos).table())
    settings = ClipSettings(16, 16)
    clips, errors = validation_clips(rows, settings, 9, 5)
    assert errors == []
    assert [int(clip.positions) for clip in clips] == [0, 1, 2, 3, 4]
    shared = [read_held_out(long_enough(rows, settings, 9, 5), rank, 2)[0] for rank in range(2)]
    assert torch.equal(shared[1][0].video, clips[1].video)
    assert len(shared[0]) + len(shared[1]) == 5
    with pytest.raises(DataError, match=r"no held-out video has 30 frames for validation \(12 are held out\)"):
        validation_clips(rows, settings, 30, 5)


def test_a_broken_held_out_video_is_reported_and_skipped(videos, tmp_path):
    rows, _, settings = broken(videos, tmp_path, 1)
    clips, errors = validation_clips(rows, settings, 5, 3)
    assert len(clips) == 2
    assert errors == [(str(tmp_path / "gone0.mp4"), "is empty (0 bytes)")]


def test_rows_that_promise_more_than_the_file_has_are_replaced(videos):
    rows, _ = fill_metadata(Table(videos).table())
    rows = pd.concat([rows.iloc[:3].assign(num_frames=21), rows.iloc[9:10]], ignore_index=True)  # 12, 13, 14, 21
    settings = ClipSettings(16, 16)
    schedule = BatchSchedule(clip_lengths(rows, settings), FrameCounts(21, 21), seed=0, batch_size=4)
    clip = next(TrainingData([Stream(rows, schedule, settings)], schedule, 0, 2, [], []).clips(0, 1))
    assert all("clip9" in path for path in clip.paths)
    assert all("clip needs" in reason for _, reason in clip.errors)


# --- panoramas


def panoramas(folder, count=6, height=16, width=32) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(tiny.frames(count, height, width)):
        Image.fromarray(picture).save(folder / f"panorama_{i}.png")
    return str(folder / "panorama_*.png")


def test_panoramas_are_shown_whole(tmp_path):
    path = panoramas(tmp_path)
    settings = ClipSettings(16, 32, panorama=True)
    frames = read_clip(open_media(path), path, settings, 6, 0.0)
    np.testing.assert_array_equal(frames, tiny.frames(6, 16, 32))
    small = read_clip(open_media(path), path, ClipSettings(8, 16, panorama=True), 6, 0.0)
    np.testing.assert_array_equal(small[3], resize_circular(frames[3], (8, 16)))


def test_within_a_hundredth_of_2_to_1_nothing_is_cut_off(tmp_path):
    path = panoramas(tmp_path, height=100, width=201)
    settings = ClipSettings(100, 200, panorama=True)
    frames = read_clip(open_media(path), path, settings, 1, 0.0)
    np.testing.assert_array_equal(frames[0], resize_circular(tiny.frames(6, 100, 201)[0], (100, 200)))


@pytest.mark.parametrize("width", [31, 33, 64, 16])
def test_other_pictures_are_no_panoramas(tmp_path, width):
    path = panoramas(tmp_path, width=width)
    with pytest.raises(MediaError, match=f"is 16x{width}: no equirectangular panorama, which is twice as wide as high"):
        read_clip(open_media(path), path, ClipSettings(16, 32, panorama=True), 1, 0.0)


def of_rooms(tmp_path, **settings) -> tuple[ClipDataset, ClipSettings]:
    rows, _ = fill_metadata(Folder(panoramas(tmp_path)).table())
    chosen = ClipSettings(16, 32, panorama=True, **settings)
    return ClipDataset(
        rows, BatchSchedule(clip_lengths(rows, chosen), FrameCounts(6, 6), seed=0, batch_size=1), chosen
    ), chosen


def test_rolls_lose_nothing_and_reach_every_column(tmp_path):
    plain, _ = of_rooms(tmp_path)
    rolled, _ = of_rooms(tmp_path, roll=True)
    shifts = Counter()
    for position in range(200):
        index = plain.schedule.clip_at(position, 6)
        a, b = plain[index].video, rolled[index].video
        (shift,) = (k for k in range(32) if torch.equal(torch.roll(a, k, dims=-1), b))
        shifts[shift] += 1
    assert set(shifts) == set(range(32))
    assert max(shifts.values()) < 18
    assert torch.equal(rolled[index].video, b)


def test_half_of_the_clips_are_mirrored_whether_or_not_they_roll(tmp_path):
    plain, _ = of_rooms(tmp_path)
    both, _ = of_rooms(tmp_path, roll=True, flip=True)
    mirrored = 0
    for position in range(60):
        index = plain.schedule.clip_at(position, 6)
        a, b = plain[index].video, both[index].video
        straight = any(torch.equal(torch.roll(a, k, dims=-1), b) for k in range(32))
        mirrored += not straight
        assert straight or any(torch.equal(torch.roll(a.flip(-1), k, dims=-1), b) for k in range(32))
    assert 15 < mirrored < 45


def test_held_out_clips_are_neither_rolled_nor_mirrored_nor_drawn(tmp_path):
    dataset, settings = of_rooms(tmp_path, roll=True, flip=True, sampling="first_last_random")
    rows, _ = fill_metadata(Folder(dataset.table.path(0)).table())
    (clip,), _ = validation_clips(rows, settings, 3, 1)
    expected = tiny.frames(6, 16, 32)[[0, 2, 5]]
    np.testing.assert_array_equal(clip.video[0].permute(1, 2, 3, 0).numpy(), expected)


def test_samplings_of_a_video_file(tmp_path):
    path = str(tiny.write_video(tmp_path / "a.mp4", tiny.frames(20), crf="0"))
    for sampling, expected in (("strided", [0, 4, 8, 12, 16]), ("first_last_random", [0, 4, 9, 14, 19])):
        frames = read_clip(open_media(path), path, ClipSettings(32, 40, sampling=sampling), 5, 0.0)
        assert [number(frame) for frame in frames] == expected
