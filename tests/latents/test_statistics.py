"""Statistics of any sharding equal one pass in fp64; percentiles, posterior variance and first frames by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vae3d.latents.statistics import PERCENTILES, LatentStatistics, StatisticsError

MEANS = (30.0, -0.5, 0.001)  # one channel far from 0, where naive sums of squares lose everything


def clips(count=12, seed=0):
    """(mean, std) of clips of several lengths and sizes; channels are correlated, and the first frame is another."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.0, 0.0, 0.01]])
    made = []
    for index in range(count):
        t, h, w = 1 + index % 4, 3 + index % 3, 5
        z = torch.einsum("ij,jthw->ithw", mix, torch.randn(3, t, h, w, generator=rng) ** 3)
        z = z + torch.tensor(MEANS)[:, None, None, None]
        z[:, 0] *= 1.5
        made.append((z, torch.rand(3, t, h, w, generator=rng)))
    return made


def gathered(shards):
    """Statistics of shards of clips, each gathered alone, then merged in order."""
    total = LatentStatistics(3)
    for shard in shards:
        part = LatentStatistics(3)
        for mean, std in shard:
            part.update(mean, std)
        total.merge(part)
    return total


def columns(made):
    """All positions of all clips, [C, n] in fp64, and which of them are of first frames."""
    flat = [(mean.double().flatten(1), std.double().flatten(1)) for mean, std in made]
    first = torch.cat([torch.arange(m[0].numel()).view(m[0].shape).flatten() < m[0, 0].numel() for m, _ in made])
    return torch.cat([m for m, _ in flat], 1).numpy(), torch.cat([s for _, s in flat], 1).numpy(), first.numpy()


@pytest.mark.parametrize("sharding", ["one", "each", "uneven", "empty", "reversed"])
def test_any_sharding_equals_a_single_pass_in_fp64(sharding):
    made = clips()
    shards = {
        "one": [made],
        "each": [[clip] for clip in made],
        "uneven": [made[:1], made[1:9], made[9:]],
        "empty": [[], made[:5], [], made[5:]],
        "reversed": [made[6:][::-1], made[:6][::-1]],
    }[sharding]
    told = gathered(shards).summary()
    values, std, first = columns(made)

    def close(name, expected):
        np.testing.assert_allclose(told[name], expected, rtol=1e-10, atol=1e-12, err_msg=name)

    assert (told["clips"], told["count"]) == (len(made), values.shape[1])
    close("mean", values.mean(1))
    close("std_of_mean", values.std(1))
    close("posterior_std", np.sqrt((std**2).mean(1)))
    close("std", np.sqrt(values.var(1) + (std**2).mean(1)))
    close("shift", values.mean())
    close("scale", np.sqrt(values.var() + (std**2).mean()))
    close("scaling_factor", 1 / np.sqrt(values.var() + (std**2).mean()))
    centred = values - values.mean(1, keepdims=True)
    close("kurtosis", (centred**4).mean(1) / values.var(1) ** 2)
    close("skewness", (centred**3).mean(1) / values.var(1) ** 1.5)
    eigenvalues = np.linalg.eigvalsh(np.cov(values, bias=True))[::-1]
    close("covariance_eigenvalues", eigenvalues)
    close("participation_ratio", eigenvalues.sum() ** 2 / (eigenvalues**2).sum())
    for name, chosen in (("first_frame", first), ("other_frames", ~first)):
        assert told[name]["count"] == chosen.sum()
        np.testing.assert_allclose(told[name]["mean"], values[:, chosen].mean(1), rtol=1e-10)
        np.testing.assert_allclose(told[name]["std_of_mean"], values[:, chosen].std(1), rtol=1e-10)
    json.dumps(told, allow_nan=False)


def test_percentiles_are_exact_but_for_rounding_to_fp16():
    made = clips()
    told = gathered([made[:7], made[7:]]).summary()["percentiles"]
    values, _, _ = columns(made)
    for percent in PERCENTILES:
        rounded = np.percentile(values.astype(np.float16).astype(float), percent, axis=1, method="inverted_cdf")
        np.testing.assert_array_equal(told[f"{percent:g}"], rounded)
        exact = np.percentile(values, percent, axis=1, method="inverted_cdf")
        np.testing.assert_allclose(told[f"{percent:g}"], exact, rtol=2**-11)


def test_extremes_and_zeros_have_their_place_in_the_order():
    values = torch.tensor([-65504.0, -1.0, -6e-8, -0.0, 0.0, 6e-8, 1.0, 65504.0])
    statistics = LatentStatistics(1)
    statistics.update(values.view(1, 1, 2, 4))
    got = [statistics.percentile(100 * (i + 1) / 8)[0] for i in range(8)]
    torch.testing.assert_close(torch.tensor(got), values.half().float(), rtol=0, atol=0)


def test_samples_spread_as_the_law_of_total_variance_says():
    rng = torch.Generator().manual_seed(0)
    mean, std = torch.randn(2, 4, 50, 50, generator=rng), torch.rand(2, 4, 50, 50, generator=rng) * 2
    kept, drawn = LatentStatistics(2), LatentStatistics(2)
    kept.update(mean, std)
    drawn.update(mean + std * torch.randn(std.shape, generator=rng))
    told = kept.summary()
    np.testing.assert_allclose(told["std"], drawn.summary()["std"], rtol=0.03)
    assert min(told["std"]) > 1.4
    assert max(told["std_of_mean"]) < 1.05
    assert drawn.summary()["posterior_std"] == [0.0, 0.0]


def test_statistics_survive_a_file_to_the_bit(tmp_path):
    made = gathered([clips()])
    for name in ("a", "b"):
        save_file(made.to_tensors(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert LatentStatistics.from_tensors(load_file(tmp_path / "a")).summary() == made.summary()
    images = LatentStatistics(3)
    images.update(torch.randn(3, 1, 4, 4))
    back = LatentStatistics.from_tensors(images.to_tensors())
    assert back.summary() == images.summary()
    assert back.summary()["other_frames"] is None


def test_a_constant_channel_has_no_shape():
    statistics = LatentStatistics(2)
    statistics.update(torch.stack([torch.full((1, 4, 4), 3.0), torch.randn(1, 4, 4)]))
    told = statistics.summary()
    assert told["kurtosis"][0] is None
    assert told["std"][0] == 0
    zero = LatentStatistics(1)
    zero.update(torch.zeros(1, 1, 2, 2))
    assert zero.summary()["scaling_factor"] is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7e4])
def test_latents_that_are_not_finite_are_refused(value):
    with pytest.raises(StatisticsError, match="NaN or values beyond the range of fp16"):
        LatentStatistics(1).update(torch.full((1, 1, 2, 2), value))
    with pytest.raises(StatisticsError, match="no clip"):
        LatentStatistics(1).summary()
