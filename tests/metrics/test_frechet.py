from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from tests.metrics.clips import frechet_distance
from vae3d.metrics.base import MetricError
from vae3d.metrics.distribution import FeatureStats, frechet


def features(n: int, d: int = 24, seed: int = 0, steepness: float = 2.0) -> Tensor:
    """[n, d] correlated fp64 features whose variances span `steepness` decades, with a mean far from zero."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    mix *= torch.logspace(0, -steepness / 2, d, dtype=torch.float64)
    return torch.randn(n, d, generator=rng, dtype=torch.float64) @ mix + 5


def moments(*chunks: Tensor) -> FeatureStats:
    m = FeatureStats()
    for chunk in chunks:
        m.update(chunk)
    return m


def textbook(a: Tensor, b: Tensor, root: str) -> float:
    """The definition in NumPy; tr (S1 S2)^1/2 from SciPy's matrix root or from the eigenvalues of the product."""
    s1, s2 = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    gap = ((a.mean(0) - b.mean(0)) ** 2).sum().item()
    if root == "sqrtm":
        cross = np.trace(scipy.linalg.sqrtm(s1 @ s2)).real
    else:
        cross = np.sqrt(np.linalg.eigvals(s1 @ s2).real.clip(0)).sum()
    return gap + np.trace(s1) + np.trace(s2) - 2 * cross


def test_a_shift_gives_its_square():
    a = features(100)
    shift = torch.linspace(-1, 1, 24, dtype=torch.float64)
    assert frechet(moments(a), moments(a + shift)) == pytest.approx(shift.square().sum().item(), rel=1e-9)


def test_a_scale_gives_the_variance_of_the_difference():
    """Of N(0, S) and N(0, c^2 S): (c - 1)^2 tr S."""
    a = features(100)
    a = a - a.mean(0)
    assert frechet(moments(a), moments(3 * a)) == pytest.approx(4 * a.T.cov().trace().item(), rel=1e-9)


def test_one_dimension_by_hand():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [9.0]])  # means 1 and 6, variances 2 and 18
    by_hand = 25 + (18**0.5 - 2**0.5) ** 2
    assert frechet_distance(a, b) == pytest.approx(by_hand, rel=1e-12)
    assert frechet(moments(a), moments(b)) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("n", [2, 10, 25, 200])
def test_equal_sets_are_at_zero(n):
    a = features(n)
    scale = a.T.cov().trace().item()
    for distance in (frechet_distance(a, a), frechet_distance(a, a.flip(0)), frechet(moments(a), moments(a))):
        assert 0 <= distance < 1e-8 * scale


@pytest.mark.parametrize(("n", "m"), [(10, 10), (20, 12), (10, 100), (100, 10), (200, 300)])
def test_all_forms_agree_with_fewer_and_more_rows_than_columns(n, m):
    a, b = features(n), features(m, seed=1) * 1.1
    distance = frechet_distance(a, b)
    assert frechet(moments(a), moments(b)) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-9)
    for root in ("sqrtm", "eigvals"):
        assert textbook(a, b, root) == pytest.approx(distance, rel=1e-4)


def test_small_distances_of_steep_spectra_stay_exact():
    """Of diagonal covariances in closed form, where the eigenvalues of their product span 24 decades."""
    d = 13
    rows = torch.cat([torch.eye(d), -torch.eye(d)]).double()
    sigma = torch.logspace(0, -6, d, dtype=torch.float64)
    a, b = rows * sigma, rows * (sigma + 1e-6)
    expected = (
        d * 1e-12 * (2 / (2 * d - 1))
    )  # (standard deviations' difference)^2, each with a mean square of 2 / (n - 1)
    assert frechet(moments(a), moments(b)) == pytest.approx(expected, abs=1e-15)


def test_a_set_without_variance_has_a_distance():
    a, b = torch.zeros(5, 3), torch.ones(4, 3)
    assert frechet_distance(a, b) == 3
    assert frechet(moments(a), moments(b)) == 3


def test_features_of_fp32_are_gathered_in_fp64():
    a = (features(400, d=3) + 1e4).float()
    torch.testing.assert_close(moments(*a.split(7)).cov(), a.double().T.cov(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("sizes", [(50,), (1,) * 50, (1, 49), (49, 1), (7, 0, 20, 23), (0, 50)])
@pytest.mark.parametrize("order", [1, -1])
def test_chunks_give_the_moments_of_the_whole_in_any_split_and_order(sizes, order):
    a = features(50)
    m = moments(*a.split(sizes)[::order])
    assert m.count == 50
    torch.testing.assert_close(m.mean, a.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(m.cov(), a.T.cov(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_merging_gives_the_moments_of_the_whole_in_any_order(order):
    a = features(60)
    parts = [moments(part) for part in a.split((2, 0, 17, 41))]
    whole = FeatureStats()
    for i in order:
        whole.merge(parts[i])
    assert whole.count == 60
    torch.testing.assert_close(whole.mean, a.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.cov(), a.T.cov(), rtol=1e-10, atol=1e-12)


def test_a_merge_leaves_the_merged_part_as_it_was():
    first, second = moments(features(5)), moments(features(6, seed=1))
    before = first.cov(), second.cov()
    whole = FeatureStats()
    for part in (first, second, second):
        whole.merge(part)
    assert whole.count == 17
    assert torch.equal(first.cov(), before[0])
    assert torch.equal(second.cov(), before[1])


@pytest.mark.parametrize(("n", "m"), [(1, 5), (5, 1), (0, 5), (1, 100), (0, 100)])
def test_fewer_than_two_rows_are_refused(n, m):
    a, b = features(100)[:n], features(100)[:m]
    with pytest.raises(MetricError, match=f"at least 2 feature vectors on each side; there are {min(n, m)}$"):
        frechet(moments(a), moments(b))


@pytest.mark.parametrize("n", [2, 100])
def test_sets_of_different_width_are_refused(n):
    a, b = features(n, d=4), features(n, d=6)
    for call in (lambda a, b: frechet(moments(a), moments(b)), moments):
        with pytest.raises(MetricError, match="width: 4 and 6"):
            call(a, b)


def test_features_that_are_not_finite_or_not_rows_are_refused():
    bad = features(10)
    bad[3, 2] = float("nan")
    bad[5] = float("inf")
    with pytest.raises(MetricError, match="2 of 10 feature vectors are not finite"):
        moments(bad)
    with pytest.raises(MetricError, match=r"features must be \[n, d\]; got \[3, 4, 5\]"):
        moments(torch.zeros(3, 4, 5))
