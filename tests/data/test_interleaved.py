from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from vae3d.data.batches.batch_schedule import MAX_CYCLE, BatchSchedule, FrameCounts, Interleaved, cycle_counts

LENGTHS = np.full(10, 40)


def stream(frames: int = 5, batch_size: int = 4, seed: int = 0, rows: int = 10, **kwargs) -> BatchSchedule:
    return BatchSchedule(np.full(rows, 40), FrameCounts(frames, frames), seed, batch_size, **kwargs)


def mixture(**kwargs) -> Interleaved:
    """Two sources, the second of two buckets: weights 2 : 1, and 3 : 1 within the second."""
    overfit = kwargs.pop("overfit", False)
    second = Interleaved([stream(1, 16, 1, **kwargs), stream(9, 8, 2, **kwargs)], [3, 1], seed=0)
    return Interleaved([stream(5, 4, 3, **kwargs), second], [2.0, 1.0], seed=0, overfit=overfit)


def streams_of(schedule: Interleaved, first: int, last: int) -> list[int]:
    return [schedule.locate(step)[0] for step in range(first, last)]


def test_weights_are_exact_after_every_cycle():
    schedule = mixture()
    for cycle in (0, 1, 17):
        drawn = Counter(streams_of(schedule, 12 * cycle, 12 * (cycle + 1)))
        assert drawn == {0: 8, 1: 3, 2: 1}


@pytest.mark.parametrize("weights", [[2, 1], [0.3, 0.7], [5, 3, 1], [0.123456, 1.7, 0.05], [1, 997]])
def test_weights_hold_within_a_percent_after_ten_thousand_steps(weights):
    schedule = Interleaved([stream(seed=i) for i in range(len(weights))], weights, seed=4)
    for steps in (10_000, 10_001, 14_321):
        taken = np.array(schedule.steps_before(steps))
        assert taken.sum() == steps
        exact = steps * np.array(weights) / sum(weights)
        assert (abs(taken - exact) < np.maximum(0.01 * exact, 2)).all(), (steps, taken, exact)


def test_counts_of_a_cycle_are_the_smallest_that_hold_the_weights():
    assert cycle_counts([0.5, 1.5]) == [1, 3]
    assert cycle_counts([0.1, 0.2, 0.7]) == [1, 2, 7]
    assert cycle_counts([Fraction(100, 8), Fraction(100, 16), Fraction(50, 16)]) == [4, 2, 1]
    assert cycle_counts([6]) == [1]
    long = cycle_counts([1, np.pi, 1e-9])
    assert sum(long) <= MAX_CYCLE + 1
    assert long[2] == 1
    assert long[1] / long[0] == pytest.approx(np.pi, rel=1e-3)


@pytest.mark.parametrize("weights", [[1, 0], [1, -2]])
def test_a_weight_must_be_above_zero(weights):
    with pytest.raises(ValueError, match=str(weights[1])):
        Interleaved([stream(), stream()], weights, seed=0)


def test_a_step_is_the_same_whatever_came_before():
    later = [mixture().step(step) for step in range(40)][25:]
    fresh = mixture()
    assert [fresh.step(step) for step in reversed(range(25, 40))] == later[::-1]
    assert list(mixture().micro_batches(25, 27)) == [batch for step in later[:2] for batch in step]


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (4, 1), (2, 2)])
def test_all_ranks_take_the_same_stream_and_together_its_clips(world, accumulate):
    for step in range(20):
        reference = sorted(mixture().step(step)[0])
        ranks = [mixture(world_size=world, rank=r, accumulate=accumulate).step(step) for r in range(world)]
        assert sorted(index for rank in ranks for micro in rank for index in micro) == reference
        assert len({index.stream for index in reference}) == len({index.frames for index in reference}) == 1


def test_positions_are_unique_and_each_stream_goes_through_its_epochs():
    schedule = mixture()
    drawn = [index for step in range(60) for index in schedule.step(step)[0]]
    assert len({index.position for index in drawn}) == len(drawn)
    for number in range(3):
        rows = [index.row for index in drawn if index.stream == number]
        assert len(rows) >= 40
        assert all(sorted(rows[i : i + 10]) == list(range(10)) for i in range(0, len(rows) // 10 * 10, 10))


def test_what_a_step_is_is_known_without_drawing_its_clips():
    schedule, clips = mixture(), 0
    for step in range(30):
        (batch,) = schedule.step(step)
        assert schedule.batch_size_at(step) == len(batch)
        assert schedule.frames_at(step) == batch[0].frames
        assert schedule.clips_before(step) == clips
        clips += len(batch)
    assert sum(schedule.steps_before(30)) == 30
    assert schedule.shapes() == [(0, 5, 4), (1, 1, 16), (2, 9, 8)]
    assert (schedule.micro_batch, schedule.accumulate, schedule.world_size) == (16, 1, 1)


def test_overfitting_repeats_the_first_step():
    schedule = mixture(overfit=True)
    assert {schedule.locate(step) for step in range(40)} == {schedule.locate(0)}
    assert schedule.step(0) == schedule.step(31) == mixture().step(0)
    assert schedule.frames_at(31) == mixture().frames_at(0)
    assert schedule.clips_before(10) == 10 * mixture().batch_size_at(0)


def test_one_stream_draws_what_it_draws_alone():
    alone = stream(seed=9)
    assert Interleaved([stream(seed=9)], [3], seed=0).step(7) == alone.step(7)
    assert (alone.locate(7), alone.steps_before(7), alone.clips_before(7)) == ((0, 7), [7], 28)


def test_the_order_is_no_fixed_pattern_and_depends_on_the_seed():
    def order(seed: int) -> list[int]:
        return streams_of(Interleaved([stream(seed=1), stream(seed=2)], [1, 1], seed=seed), 0, 200)

    pairs = {tuple(order(0)[i : i + 2]) for i in range(0, 200, 2)}
    assert pairs == {(0, 1), (1, 0)}
    assert order(0) != order(1)


def test_rows_of_a_part_of_a_table_are_numbered_as_in_the_table():
    rows = np.array([3, 8, 21], dtype=np.int32)
    schedule = BatchSchedule(np.full(3, 40), FrameCounts(5, 5), 0, 3, rows=rows)
    assert sorted(index.row for index in schedule.step(0)[0]) == [3, 8, 21]
    assert schedule.replacement(4, 5, 0) in rows
