from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vae3d.data.batches.clips import ClipSettings, frame_indices

SAMPLINGS = ("contiguous", "first_last_random", "strided")


def drawn(sampling: str, count: int, frames: int, step: float = 1.0, start: float = 0.0, seed: int | None = 0):
    rng = None if seed is None else np.random.default_rng(seed)
    return frame_indices(sampling, count, frames, step, start, rng)


def test_first_last_random_keeps_the_ends_and_draws_between_without_repeats():
    seen = Counter()
    for seed in range(400):
        numbers = drawn("first_last_random", 9, 5, seed=seed)
        assert numbers[0] == 0
        assert numbers[-1] == 8
        assert numbers == sorted(set(numbers))
        assert len(numbers) == 5
        seen.update(numbers[1:-1])
    assert set(seen) == set(range(1, 8))
    assert max(abs(n - 400 * 3 / 7) for n in seen.values()) < 40  # four standard deviations


def test_first_last_random_is_a_function_of_the_generator():
    assert drawn("first_last_random", 50, 9, seed=3) == drawn("first_last_random", 50, 9, start=0.9, seed=3)
    assert drawn("first_last_random", 50, 9, seed=3) != drawn("first_last_random", 50, 9, seed=4)


@pytest.mark.parametrize(
    ("count", "frames", "expected"),
    [(5, 5, [0, 1, 2, 3, 4]), (9, 5, [0, 2, 4, 6, 8]), (8, 5, [0, 1, 3, 5, 7]), (7, 2, [0, 6]), (7, 3, [0, 3, 6])],
)
def test_first_last_random_without_chance_is_even(count, frames, expected):
    assert drawn("first_last_random", count, frames, seed=None) == expected


def test_first_last_random_of_exactly_as_many_frames_takes_all():
    assert drawn("first_last_random", 5, 5) == [0, 1, 2, 3, 4]
    assert drawn("first_last_random", 2, 2) == [0, 1]


def test_first_last_random_draws_from_what_the_rate_leaves():
    for seed in range(20):
        numbers = drawn("first_last_random", 21, 5, step=2.5, seed=seed)  # 0 2 5 7 10 12 15 17 20
        assert {0, 20} < set(numbers) <= {0, 2, 5, 7, 10, 12, 15, 17, 20}
        assert len(set(numbers)) == 5


def test_strided_takes_the_largest_stride_that_fits():
    assert drawn("strided", 9, 5) == [0, 2, 4, 6, 8]
    assert drawn("strided", 12, 5) == [0, 2, 4, 6, 8]
    assert drawn("strided", 12, 5, start=0.999) == [3, 5, 7, 9, 11]
    assert drawn("strided", 8, 5, start=0.5) == [2, 3, 4, 5, 6]
    assert {drawn("strided", 12, 5, start=s)[0] for s in np.linspace(0, 0.99, 50)} == {0, 1, 2, 3}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_one_frame_may_be_any(sampling):
    assert {drawn(sampling, 4, 1, start=s)[0] for s in (0.0, 0.3, 0.6, 0.99)} == {0, 1, 2, 3}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("step", [1.0, 1.5, 2.4, 3.0])
def test_every_clip_that_is_long_enough_is_ascending_and_in_the_file(sampling, step):
    for frames in (1, 2, 3, 5, 9):
        for count in range(int((frames - 1) * step) + 1, 40):
            for start in (0.0, 0.5, 0.999):
                numbers = drawn(sampling, count, frames, step, start)
                assert len(numbers) == len(set(numbers)) == frames
                assert numbers == sorted(numbers)
                assert 0 <= numbers[0] <= numbers[-1] < count


@pytest.mark.parametrize("rate", [23.976, 24, 25, 24000 / 1001, 30000 / 1001, 29.97, 30, 50, 59.94, 60])
def test_the_length_of_a_clip_is_how_many_of_its_frames_are_in_the_file(rate):
    count = np.arange(1, 400)
    for fps in range(1, 31):
        for stride in (1, 2, 3, 5):
            settings = ClipSettings(8, 8, stride=stride, fps=fps)
            step = float(settings.step(rate))
            exact = np.searchsorted([int(i * step) for i in range(400)], count)  # how many are below each count
            assert np.array_equal(settings.length(count, np.full(len(count), rate)), exact), (rate, fps, stride)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("count", "stride", "fps"), [(36, 3, 10), (40, 5, 9), (264, 1, 11)])
def test_the_longest_clip_is_in_the_file_whatever_is_rounded(sampling, count, stride, fps):
    settings = ClipSettings(8, 8, stride=stride, fps=fps)
    length, step = int(settings.length(count, 24.0)), float(settings.step(24.0))
    numbers = drawn(sampling, count, length, step, seed=None)
    assert 0 <= numbers[0] <= numbers[-1] < count
    assert len(set(numbers)) == length
