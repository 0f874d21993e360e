"""Running statistics of any partition equal one pass, and the formulas that they replaced, up to fp64 rounding."""

from __future__ import annotations

import pytest
import torch

from vae3d.running_stats import RunningStats


def rows(count=50, dim=3):
    """Correlated vectors whose last component is far from 0."""
    x = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.0, 0.0, 0.1]], dtype=torch.float64) + torch.tensor(
        [0.0, -0.5, 100.0], dtype=torch.float64
    )


def gathered(chunks):
    stats = RunningStats(3)
    for chunk in chunks:
        stats.update(chunk)
    return stats


@pytest.mark.parametrize("sizes", [(50,), (1,) * 50, (7, 0, 20, 23), (0, 50)])
@pytest.mark.parametrize("order", [1, -1])
def test_any_partition_equals_one_pass(sizes, order):
    x = rows()
    stats = gathered(x.split(sizes)[::order])
    assert stats.count == 50
    torch.testing.assert_close(stats.mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(stats.variance, x.var(0, correction=0), rtol=1e-10, atol=0)
    torch.testing.assert_close(stats.scatter / 49, x.T.cov(), rtol=1e-10, atol=1e-10)


def test_mean_and_deviation_equal_those_of_sums_and_sums_of_squares():
    """The check of the latents' scale once used E[x^2] - E[x]^2."""
    z = rows().view(5, 10, 3).transpose(1, 2)  # [B, C, n]
    stats = RunningStats(3)
    for part in z.split(2):
        stats.update_channels(part)
    x = z.transpose(0, 1).flatten(1)
    mean, square = x.sum(1) / 50, x.square().sum(1) / 50
    torch.testing.assert_close(stats.mean, mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(stats.variance.sqrt(), (square - mean.square()).sqrt(), rtol=1e-8, atol=0)


def test_merging_parts_equals_the_whole_to_the_bit_of_the_pairwise_formula():
    a, b = rows().split(20)[:2]
    stats = gathered([a, b])
    gap = b.mean(0) - a.mean(0)
    assert torch.equal(stats.mean, a.mean(0) + gap * (20 / 40))
    scatters = [(x - x.mean(0)).T @ (x - x.mean(0)) for x in (a, b)]
    assert torch.equal(stats.scatter, scatters[0] + scatters[1] + torch.outer(gap, gap) * (20 * 20 / 40))


def test_ranks_are_merged_as_chunks_are(monkeypatch):
    """Two ranks, whose all-reduces are played one after the other; the second has seen nothing."""
    from vae3d import running_stats

    for sizes in ((30, 20), (50, 0)):
        parts = rows().split(sizes)
        ranks = [gathered([part]) for part in parts]
        monkeypatch.setattr(running_stats.distributed, "is_distributed", lambda: True)
        counts = [torch.cat([s.mean.new_tensor([s.count]), s.count * s.mean]) for s in ranks]
        mean = sum(counts)[1:] / 50
        scatters = [s.scatter + torch.outer(s.mean - mean, s.mean - mean) * s.count for s in ranks]
        totals = iter([sum(counts), sum(scatters)])
        monkeypatch.setattr(running_stats.distributed, "all_reduce_sum", lambda x, totals=totals: x.copy_(next(totals)))
        ranks[1].all_reduce()
        whole = gathered([rows()])
        assert ranks[1].count == 50
        torch.testing.assert_close(ranks[1].mean, whole.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(ranks[1].scatter, whole.scatter, rtol=1e-10, atol=1e-10)
