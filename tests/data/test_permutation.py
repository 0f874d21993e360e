"""The keyed permutation: a bijection, uniform, equal on every machine."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2

from vae3d.data.permutation import Permutation


@pytest.mark.parametrize("count", [1, 2, 3, 10, 16, 17, 255, 256, 257, 65537, 300_000])
def test_it_is_a_bijection(count):
    found = Permutation(count, 3, "shuffle").take(np.arange(count))
    assert np.array_equal(np.sort(found), np.arange(count))


def test_single_indices_and_arrays_agree():
    permutation = Permutation(10**7 + 3, 5, 2)
    indices = np.random.default_rng(0).integers(len(permutation), size=500)
    assert [permutation[int(i)] for i in indices] == permutation.take(indices).tolist()


def test_places_do_not_change_with_versions():
    permutation = Permutation(10**7, 0, 0, "shuffle")
    places = [0, 1, 2, 3, 10**7 - 1]
    assert [permutation[i] for i in places] == [7418714, 9853463, 7676791, 4105322, 9989772]


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_is_refused(index):
    permutation = Permutation(10, 0)
    with pytest.raises(IndexError):
        permutation[index]
    with pytest.raises(IndexError):
        permutation.take(np.array([index]))


def p_value(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), counts.size - 1))


def test_every_row_is_equally_likely_at_a_place():
    """Over 5,000 keys, the first and the last index are spread evenly over 70,001 rows, in 100 bins."""
    count, keys = 70_001, 5_000
    permutations = [Permutation(count, seed) for seed in range(keys)]
    for place in (0, count - 1):
        bins = np.array([permutation[place] for permutation in permutations]) * 100 // count
        assert p_value(np.bincount(bins, minlength=100)) > 1e-4


def test_neighbours_are_independent():
    """Pairs of the rows at neighbouring places, and at places `side` apart, fill a grid evenly."""
    count = 10**6
    for seed in range(4):
        permutation = Permutation(count, seed)
        found = permutation.take(np.arange(count)) * 32 // count
        for apart in (1, permutation.side):
            pairs = found[:-apart:2] * 32 + found[apart::2][: len(found[:-apart:2])]
            assert p_value(np.bincount(pairs, minlength=1024)) > 1e-4


def test_small_permutations_are_all_equally_likely():
    """The 24 orders of 4 rows, over 4,000 keys: also the rounds of a tiny network mix enough."""
    orders = [tuple(Permutation(4, seed).take(np.arange(4)).tolist()) for seed in range(4000)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert p_value(counts) > 1e-4


def test_epochs_are_unrelated():
    one, two = (Permutation(10**5, 0, epoch).take(np.arange(10**5)) for epoch in (0, 1))
    assert (one == two).sum() < 10  # one is expected
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.02
