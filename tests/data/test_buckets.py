from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from vae3d.data.batches.batch_schedule import BatchSchedule, FrameCounts
from vae3d.data.batches.bucket_streams import SourceStreams, bucket_rows, bucket_streams, pixels_kept
from vae3d.data.batches.buckets import (
    Bucket,
    buckets_of,
    parse_aspect,
    relative_costs,
    rows_of,
    share_kept,
    size_of_aspect,
    sizes_for,
    uneven,
    with_batches,
    with_weights,
)
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.batches.held_out import held_out_of
from vae3d.data.media import DataError

WIDE, OLD, TALL = (1080, 1920), (480, 640), (1280, 720)  # 16:9, 4:3, 9:16


def rule(**changes):
    return SimpleNamespace(
        **{"shapes": None, "aspects": ["auto"], "frames": None, "multiple": 16, "clips_multiple": None} | changes
    )


def table(*sizes: tuple[int, int], frames: int | list[int] = 100) -> pd.DataFrame:
    heights, widths = zip(*sizes, strict=True)
    paths = [f"/{i}.mp4" for i in range(len(sizes))]
    return pd.DataFrame({"path": paths, "height": heights, "width": widths, "num_frames": frames, "fps": 24.0})


def streams_of(rows: pd.DataFrame, buckets: list[Bucket], clips: int = 8, divisor: int = 1, **kwargs) -> SourceStreams:
    """Streams of buckets at a reference of `clips` clips of 17 frames of 256x256."""
    reference = Bucket(17, 256, 256, clips)
    return bucket_streams(rows, ClipSettings(256, 256), buckets, reference, divisor, BatchSchedule, seed=0, **kwargs)


def sized(*sizes: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array(side, float) for side in zip(*sizes, strict=True))


@pytest.mark.parametrize("area", [256 * 256, 384 * 384, 512 * 512, 720 * 1280])
@pytest.mark.parametrize("aspect", ["16:9", "4:3", "1:1", "3:4", "9:16", "3:2", "1.9"])
def test_sizes_keep_the_aspect_ratio_and_the_area(aspect, area):
    height, width = size_of_aspect(parse_aspect(aspect), area, 16)
    assert height % 16 == width % 16 == 0
    assert float(share_kept(parse_aspect(aspect), (height, width))) >= 0.95
    assert abs(height * width / area - 1) <= 0.05


def test_a_square_keeps_its_size_and_sides_may_be_finer():
    assert size_of_aspect(1.0, 256 * 256, 16) == (256, 256)
    assert size_of_aspect(16 / 9, 256 * 256, 8) == (192, 344)
    assert size_of_aspect(8.0, 16 * 16, 16) == (16, 16)  # no smaller than the multiple


@pytest.mark.parametrize("text", ["16-9", "1:0", "wide", "969", "0"])
def test_what_is_no_aspect_ratio_is_refused(text):
    with pytest.raises(ValueError, match=text):
        parse_aspect(text)


def test_auto_takes_as_few_sizes_as_keep_95_percent():
    heights, widths = sized(*[WIDE] * 50, *[OLD] * 30, *[TALL] * 20)
    sizes = sizes_for(heights, widths, 256 * 256, 16)
    assert len(sizes) == 3
    kept = np.max([share_kept(widths / heights, size) for size in sizes], axis=0)
    assert kept.min() >= 0.95
    near = sized(*[(1080, 1920 + i) for i in range(50)])
    assert len(sizes_for(*near, 256 * 256, 16)) == 1
    odd = sized(*[WIDE] * 999, (100, 800))
    assert len(sizes_for(*odd, 256 * 256, 16)) == 1  # one odd file gets no size of its own


def test_the_issues_sets_keep_95_percent_at_even_cost():
    files = table(*[WIDE] * 50, *[OLD] * 30, *[TALL] * 20)
    for spec in (rule(), rule(aspects=["16:9", "4:3", "1:1", "3:4", "9:16"])):
        buckets = buckets_of(spec, [1, 9, 17], (256, 256), files["height"].to_numpy(), files["width"].to_numpy())
        made = streams_of(files, buckets)
        shares = made.schedule.shares()
        kept, in_one = pixels_kept(made.streams, shares, (256, 256))
        assert kept >= 0.95
        assert in_one < 0.65
        costs = relative_costs([stream.bucket for stream in made.streams], shares)
        assert costs.max() / costs.min() <= 1.10
        assert made.warnings == []
        assert {stream.bucket.size for stream in made.streams} == {(192, 336), (224, 288), (336, 192)}


def test_a_row_goes_to_the_size_that_loses_fewest_pixels_with_every_frame_count_it_has():
    buckets = [Bucket(f, *size) for size in ((192, 336), (256, 256)) for f in (1, 17, 33)]
    rows = rows_of(buckets, *sized(WIDE, (720, 720), WIDE, (720, 720)), np.array([40, 40, 20, 1]))
    assert [list(of) for of in rows] == [[0, 2], [0, 2], [0], [1, 3], [1], [1]]


def test_between_two_aspect_ratios_a_row_goes_to_one():
    buckets = [Bucket(17, 192, 336), Bucket(17, 224, 288)]  # 1.75 and 1.286, with 3:2 in their middle
    rows = rows_of(buckets, *sized((480, 720)), np.array([40]))
    assert sorted(map(len, rows)) == [0, 1]


def test_resolutions_of_one_aspect_ratio_share_the_files_that_need_no_enlarging():
    buckets = [Bucket(33, 192, 336), Bucket(9, 384, 688), Bucket(17, 256, 256)]
    rows = rows_of(buckets, *sized(WIDE, (240, 426), (100, 178)), np.array([40, 40, 40]))
    assert [list(of) for of in rows] == [[0, 1, 2], [0, 2], []]  # the last is enlarged whatever it goes to


def test_images_and_videos_choose_their_sizes_separately():
    buckets = [Bucket(33, 256, 256), Bucket(1, 512, 512), Bucket(1, 384, 688)]
    rows = rows_of(buckets, *sized(WIDE, WIDE), np.array([40, 1]))
    assert [list(of) for of in rows] == [[0], [], [0, 1]]


def test_clips_per_step_follow_the_cost_and_divide_over_the_ranks():
    buckets = [Bucket(f, 256, 256) for f in (1, 9, 17, 33)]
    reference = Bucket(17, 256, 256, 8)
    assert [b.batch_size for b in with_batches(buckets, reference, 1)] == [136, 15, 8, 4]
    assert [b.batch_size for b in with_batches(buckets, reference, 8)] == [136, 16, 8, 8]
    given = with_batches([replace(buckets[0], batch_size=40), buckets[1]], reference, 4)
    assert [b.batch_size for b in given] == [40, 16]


def test_measured_costs_replace_the_number_of_pixels():
    buckets = [Bucket(1, 64, 64, cost=0.5), Bucket(17, 64, 64, cost=2.0)]
    reference = Bucket(17, 64, 64, 6)
    assert [b.batch_size for b in with_batches(buckets, reference, 1)] == [24, 6]
    with pytest.raises(ValueError, match="17x32x32"):
        with_batches(buckets, replace(reference, height=32, width=32), 1)


def test_uneven_costs_are_told_with_their_numbers():
    buckets = with_batches([Bucket(17, 256, 256), Bucket(11, 256, 256)], Bucket(17, 256, 256, 2), 2)
    (line,) = uneven(buckets, [0.5, 0.5], 2)
    assert "17x256x256 (2 x 1114112: 0.87)" in line
    assert "multiples of 2" in line
    assert uneven(buckets[:1], [1.0], 2) == []


def test_default_weights_draw_every_file_of_every_bucket_equally_often():
    files = table(*[WIDE] * 60, *[OLD] * 20)
    buckets = [Bucket(17, 192, 336), Bucket(17, 224, 288), Bucket(1, 192, 336), Bucket(1, 224, 288)]
    made = streams_of(files, buckets)
    drawn: dict[int, Counter] = {17: Counter(), 1: Counter()}
    cycle = sum(made.schedule.counts)
    for step in range(8 * cycle):  # epochs end within cycles
        for index in made.schedule.step(step)[0]:
            drawn[index.frames][index.row] += 1
    for counts in drawn.values():
        assert set(counts) == set(range(80))
        assert max(counts.values()) - min(counts.values()) <= 1
    weights = [
        bucket.weight for bucket in with_weights([replace(b, batch_size=4, weight=3.0) for b in buckets], [1] * 4)
    ]
    assert weights == [3.0] * 4  # given ones stay


def test_the_draw_of_buckets_passes_a_chi_square_test():
    files = table(*[WIDE] * 47, *[OLD] * 31, *[TALL] * 22)
    buckets = buckets_of(rule(frames=[1, 9, 17]), [], (256, 256), *sized(*files[["height", "width"]].to_numpy()))
    made, steps = streams_of(files, buckets), 100_000
    weights = np.array([float(stream.bucket.weight) for stream in made.streams])
    expected = steps * weights / weights.sum()
    drawn = np.bincount([made.schedule.locate(step)[0] for step in range(steps)])
    assert len(drawn) == 9
    assert ((drawn - expected) ** 2 / expected).sum() < 15.5  # the 95 % quantile of 8 degrees of freedom
    assert made.schedule.steps_before(steps) == drawn.tolist()


def test_random_frame_counts_are_buckets_of_one_size_and_one_batch_size():
    """Stage 3 of Open-Sora draws 1 to 33 frames, each with equal probability, from all files that have so many."""
    files = table(*[(256, 256)] * 20)
    buckets = [Bucket(frames, 256, 256, batch_size=4) for frames in range(1, 34)]
    made = streams_of(files, buckets)
    assert set(made.schedule.counts) == {1}  # each frame count once in 33 steps
    plain = BatchSchedule(np.full(20, 100), FrameCounts(1, 33), 0, 4)
    drawn = [Counter(schedule.frames_at(step) for step in range(3300)) for schedule in (made.schedule, plain)]
    assert set(drawn[0].values()) == {100}
    assert set(drawn[1]) == set(drawn[0])
    assert max(abs(count - 100) for count in drawn[1].values()) < 40


def test_rows_and_buckets_that_do_not_fit_are_named():
    files = table(WIDE, OLD, WIDE, frames=[40, 5, 3])
    buckets = [Bucket(17, 192, 336), Bucket(5, 224, 288), Bucket(33, 336, 192)]
    made = streams_of(files, buckets)
    assert [stream.name for stream in made.streams] == ["17x192x336", "5x224x288"]
    assert made.skipped_files == [("/2.mp4", "has 3 frames, and no bucket has fewer than 5")]
    told = "\n".join(made.notes)
    assert "33x336x192" in told
    assert "/2.mp4" in told
    with pytest.raises(DataError, match=r"17 frames.*gives more than 3"):
        streams_of(files.iloc[2:], [Bucket(17, 192, 336)])


def test_files_smaller_than_their_bucket_are_counted():
    assert streams_of(table(WIDE, (100, 178)), [Bucket(17, 192, 336)]).notes[0].startswith("1 of 2 files")
    assert streams_of(table(WIDE), [Bucket(17, 192, 336)]).notes == []


def test_the_table_of_buckets_has_their_numbers():
    made = streams_of(table(*[WIDE] * 3, OLD), [Bucket(17, 192, 336), Bucket(17, 224, 288)], source="a")
    head, cells = bucket_rows(made.streams, made.schedule.shares())
    assert head == ["bucket", "clips", "cost", "files", "steps", "pixels kept"]
    assert cells == [
        ["17x192x336", "8", "1.00", "3", "75.0 %", "98.4 %"],
        ["17x224x288", "8", "1.00", "1", "25.0 %", "96.4 %"],
    ]
    assert [stream.name for stream in made.streams] == ["a_17x192x336", "a_17x224x288"]
    assert [(stream.settings.height, stream.settings.width) for stream in made.streams] == [(192, 336), (224, 288)]


def test_held_out_clips_have_the_size_of_their_bucket_and_count_for_it():
    buckets = [Bucket(17, 192, 336), Bucket(17, 224, 288), Bucket(1, 256, 256)]
    files = table(OLD, WIDE, WIDE, (256, 256), frames=[40, 40, 3, 40]).assign(start=np.nan, end=np.nan)
    clips = held_out_of(files, ClipSettings(256, 256), 17, 9, "a", buckets)
    assert [(c.path, c.settings.height, c.settings.width) for c in clips] == [
        ("/0.mp4", 224, 288), ("/1.mp4", 192, 336), ("/3.mp4", 224, 288),
    ]  # fmt: skip
    assert clips[0].groups == ("a", "a_224x288")
    assert [c.groups for c in held_out_of(files, ClipSettings(256, 256), 17, 1, "", buckets)] == [("224x288",)]
    assert [c.groups for c in held_out_of(files, ClipSettings(256, 256), 17, 1, "")] == [()]
