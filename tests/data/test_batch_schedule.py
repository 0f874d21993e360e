from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vae3d.data.batches.batch_schedule import SHUFFLED, BatchSchedule, FrameCounts
from vae3d.data.media import DataError
from vae3d.seeding import seed_of


def schedule(lengths=tuple(range(5, 45)), frames=(1, 33), **kwargs) -> BatchSchedule:
    settings = {"seed": 0, "batch_size": 4, **kwargs}
    counts = frames if isinstance(frames, FrameCounts) else FrameCounts(*frames)
    return BatchSchedule(np.array(lengths), counts, **settings)


def test_a_step_is_the_same_whatever_came_before():
    a, b = schedule(), schedule()
    later = [a.step(s) for s in range(100)][60:]
    assert [b.step(s) for s in range(60, 100)] == later
    assert list(schedule().micro_batches(60, 62)) == [batch for s in (60, 61) for batch in later[s - 60]]


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)])
def test_clips_of_a_step_do_not_depend_on_ranks_or_accumulation(world, accumulate):
    reference = sorted(schedule().step(7)[0])
    ranks = [schedule(world_size=world, rank=r, accumulate=accumulate).step(7) for r in range(world)]
    assert sorted(index for rank in ranks for micro in rank for index in micro) == reference
    assert {len(micro) for rank in ranks for micro in rank} == {4 // (world * accumulate)}


def test_all_ranks_and_micro_batches_of_a_step_have_one_frame_count():
    for step in range(20):
        counts = {
            index.frames
            for rank in range(2)
            for micro in schedule(world_size=2, rank=rank, accumulate=2).step(step)
            for index in micro
        }
        assert len(counts) == 1


def test_frame_counts_are_uniform_over_their_range():
    p = schedule(frames=(1, 33))
    drawn = Counter(p.frames_at(step) for step in range(6600))
    assert set(drawn) == set(range(1, 34))
    assert max(abs(n - 200) for n in drawn.values()) < 60  # four standard deviations


def test_a_frame_count_that_needs_no_lengths_looks_up_no_rows(monkeypatch):
    p, fitting = schedule(), schedule(frames=FrameCounts(5, 33, 4, fit=True))
    monkeypatch.setattr(BatchSchedule, "_row_at", None)
    assert 1 <= p.frames_at(7) <= 33
    with pytest.raises(TypeError):
        fitting.frames_at(7)


def test_a_fifth_of_the_steps_are_images():
    p = schedule(frames=FrameCounts(17, 17, 1, 0.2))
    drawn = Counter(p.frames_at(step) for step in range(5000))
    assert set(drawn) == {1, 17}
    assert drawn[1] / 5000 == pytest.approx(0.2, abs=0.025)


def test_counts_keep_to_their_step():
    assert FrameCounts(1, 33, 4).all() == [1, 5, 9, 13, 17, 21, 25, 29, 33]
    assert FrameCounts(5, 17, 4, 0.5).all() == [1, 5, 9, 13, 17]
    assert FrameCounts(17, 17, 1, 1.0).all() == [1]


def test_a_fitting_step_has_the_largest_count_that_all_its_clips_have():
    """T = the largest 4n+1 <= min(N, max_frames), for one clip per step."""
    counts = FrameCounts(5, 13, 4, fit=True)
    fitting = {n: counts.largest_fitting(np.array([n])) for n in (5, 8, 9, 12, 13, 100)}
    assert fitting == {5: 5, 8: 5, 9: 9, 12: 9, 13: 13, 100: 13}
    assert counts.largest_fitting(np.array([13, 10, 100])) == 9
    assert counts.largest_fitting(np.array([3, 13])) == 13  # rows below the minimum are replaced
    assert counts.largest_fitting(np.array([3, 4])) == 5


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (2, 2)])
def test_fitting_counts_are_the_same_for_all_ranks(world, accumulate):
    lengths = np.array([3, 5, 6, 9, 12, 13, 20, 40])
    counts = FrameCounts(5, 17, 4, fit=True)
    seen = set()
    for step in range(60):
        indices = [
            index
            for rank in range(world)
            for micro in schedule(lengths, counts, world_size=world, rank=rank, accumulate=accumulate).step(step)
            for index in micro
        ]
        (frames,) = {index.frames for index in indices}
        assert frames == schedule(lengths, counts).step(step)[0][0].frames
        assert all(lengths[index.row] >= frames for index in indices)
        seen.add(frames)
    assert {5, 9} <= seen <= {5, 9, 13, 17}


def test_fitting_needs_one_row_of_the_smallest_count_only():
    schedule([6, 7], FrameCounts(5, 81, 4, fit=True))
    with pytest.raises(DataError, match=r"clips of 5 frames .* gives 4;"):
        schedule([3, 4], FrameCounts(5, 81, 4, fit=True))


def test_every_row_comes_once_per_epoch_and_epochs_differ():
    p = schedule(lengths=[50] * 10, batch_size=4)
    rows = [index.row for step in range(5) for index in p.step(step)[0]]
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))
    assert rows[:10] != rows[10:20]


def test_short_rows_serve_short_clips_only():
    p = schedule(lengths=[1, 1, 1, 20, 40], frames=(1, 33))
    seen = Counter()
    for step in range(200):
        for index in p.step(step)[0]:
            assert p.lengths[index.row] >= index.frames
            seen[index.row] += index.frames == 1
    assert all(seen[row] > 0 for row in range(5))


def test_a_frame_count_that_no_video_has_is_refused():
    with pytest.raises(DataError, match=r"clips of 22 frames .* gives 21;"):
        schedule(lengths=[5, 21], frames=(1, 33))


def test_seeds_give_other_orders():
    assert schedule(seed=0).step(3) != schedule(seed=1).step(3)


def test_overfitting_draws_the_first_step_every_time():
    p = schedule(overfit=True)
    assert p.step(0) == p.step(99) == schedule().step(0)


def test_replacements_are_seeded_and_long_enough():
    p = schedule()
    assert p.replacement(12, 30, 0) == schedule().replacement(12, 30, 0)
    assert len({p.replacement(12, 30, why) for why in range(50)}) > 5
    assert all(p.lengths[p.replacement(i, 30, 0)] >= 30 for i in range(50))


def test_a_large_table_is_shuffled_without_a_permutation_in_memory():
    count = SHUFFLED + 7
    lengths = np.full(count, 9)
    p = BatchSchedule(lengths, FrameCounts(9, 9), seed=3, batch_size=64, by_length=np.arange(count, dtype=np.int32))
    rows = [p._row_at(position) for position in range(2 * count)]
    epochs = rows[:count], rows[count:]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert not isinstance(p._permutation, np.ndarray)
    small = BatchSchedule(lengths[:SHUFFLED], FrameCounts(9, 9), seed=3, batch_size=64)
    expected = np.random.default_rng(seed_of(3, 0, "shuffle")).permutation(SHUFFLED)
    assert [small._row_at(position) for position in range(100)] == expected[:100].tolist()


def test_a_given_order_by_length_is_used_as_a_computed_one():
    lengths = np.random.default_rng(0).integers(1, 40, 500)
    order = np.argsort(lengths, kind="stable").astype(np.int32)
    given, computed = schedule(lengths, by_length=order), schedule(lengths)
    assert given.step(5) == computed.step(5)
    for frames in (0, 1, 17, 39, 40, 99):
        assert given.with_at_least(frames).tolist() == computed.with_at_least(frames).tolist()
        assert set(given.with_at_least(frames)) == set(np.flatnonzero(lengths >= frames))
    assert given.replacement(7, 20, "short") == computed.replacement(7, 20, "short")
