from __future__ import annotations

import pytest
import torch

from vae3d.diffusion.quality import distances, sliced_wasserstein


def test_one_dimension_by_hand():
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [0.0]])
    assert sliced_wasserstein(a, b) == pytest.approx(2**0.5)  # 0-0 and 1-3: sqrt((0 + 4) / 2)


def test_sets_of_unlike_size_by_hand():
    """Quantile functions 0, 6 (halves) and 0, 3, 6 (thirds): apart by 3 between 1/3 and 2/3."""
    a, b = torch.tensor([[0.0], [6.0]]), torch.tensor([[0.0], [3.0], [6.0]])
    assert sliced_wasserstein(a, b) == pytest.approx((9 / 3) ** 0.5)
    assert sliced_wasserstein(a, b.repeat(5, 1)) == pytest.approx(3**0.5)


def test_a_shift_by_hand():
    """W2 of a set and itself moved by v is |u.v| on u, whose mean square over the sphere is |v|^2 / d."""
    a = torch.randn(50, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert sliced_wasserstein(a, a) == 0
    assert sliced_wasserstein(a, a + 0.7, projections=5000) == pytest.approx(0.7, rel=0.03)
    far = a.clone()
    far[:, 0, 0, 0, 0] += 4.0
    assert sliced_wasserstein(a, far, projections=5000) == pytest.approx(1.0, rel=0.05)


def test_a_scale_by_hand():
    """Scaled by s about 0: |s - 1| times the root mean square on u."""
    a = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    rms = a.double().square().mean().sqrt().item()
    assert sliced_wasserstein(a, 3 * a, projections=2000) == pytest.approx(2 * rms, rel=0.03)


def test_two_draws_of_one_distribution_come_closer():
    draws = [torch.randn(2000, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    few, many = (sliced_wasserstein(draws[0][:n], draws[1][:n]) for n in (100, 2000))
    assert many < 0.06 < 0.1 < few


def test_it_is_symmetric_and_a_function_of_the_seed():
    a, b = (torch.randn(n, 3, 2, generator=torch.Generator().manual_seed(n)) for n in (20, 31))
    first = sliced_wasserstein(a, b, projections=8)
    assert first == sliced_wasserstein(a, b, projections=8) == pytest.approx(sliced_wasserstein(b, a, projections=8))
    assert first == sliced_wasserstein(a.flip(0), b, projections=8)


def test_what_cannot_be_compared_is_named():
    a = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"shapes \(3, 2\) and \(3, 4\)"):
        sliced_wasserstein(a, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="two sets"):
        sliced_wasserstein(a, a[:0])
    with pytest.raises(ValueError, match="not finite"):
        sliced_wasserstein(a, a / 0)


def test_distances_are_those_of_samples_other_latents_and_noise():
    data = torch.randn(400, 4, 1, 2, 2, generator=torch.Generator().manual_seed(1)) + 3
    found = distances(data + 0.5, data, data.flip(0))
    assert found["samples"] == pytest.approx(0.5, rel=0.1)
    assert found["other latents"] == 0
    assert found["noise"] == pytest.approx(3, rel=0.1)
