"""Probes on latents whose figures are known beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.latents import probes
from vae3d.latents.statistics import ChannelMoments, LatentStatistics

RNG = torch.Generator().manual_seed(0)
WHITE = torch.randn(16, 8, 5, 16, 16, generator=RNG)


def statistics(z: Tensor) -> dict:
    """Of [N, C, t, h, w]."""
    found = LatentStatistics(z.shape[1])
    for clip in z:
        found.update(clip)
    return found.summary()


# --- channels


def test_kurtosis_is_that_of_known_distributions():
    uniform = torch.linspace(-1, 1, 10001).view(1, 1, 1, 1, -1)
    coin = uniform.sign()[..., :-1] * 2
    assert statistics(uniform)["kurtosis"] == pytest.approx([1.8], abs=1e-3)
    assert statistics(coin)["kurtosis"] == pytest.approx([1.0], abs=1e-3)
    assert statistics(torch.zeros(1, 1, 1, 4, 4))["kurtosis"] == [None]


def test_participation_ratio_counts_the_channels_that_vary_alone():
    assert statistics(WHITE)["participation_ratio"] == pytest.approx(8, rel=0.01)
    copies = WHITE[:, :1].expand(-1, 8, -1, -1, -1)
    assert statistics(copies)["participation_ratio"] == pytest.approx(1)
    two = torch.cat([WHITE[:, :2], torch.zeros(16, 6, 5, 16, 16)], 1)
    assert statistics(two)["participation_ratio"] == pytest.approx(2, rel=0.01)
    collapsed = LatentStatistics(2)  # to noise
    collapsed.update(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4))
    assert collapsed.summary()["participation_ratio"] is None


def test_kl_is_that_of_gaussians_by_hand():
    mean = torch.tensor([0.0, 1.0, 3.0]).view(1, 3, 1, 1, 1).expand(2, 3, 1, 4, 4)
    std = torch.tensor([1.0, 1.0, 0.5]).view(1, 3, 1, 1, 1).expand(2, 3, 1, 4, 4)
    by_hand = [0.0, 0.5, 0.5 * (9 + 0.25 - 1 - math.log(0.25))]
    assert probes.channel_kl(mean, std).tolist() == pytest.approx(by_hand)
    assert probes.channel_kl(mean, torch.zeros_like(std)) is None


def test_channels_that_tell_nothing_have_collapsed():
    std, of_mean = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 0.5, 0.09, 0.0])
    assert probes.collapsed(of_mean, std, torch.tensor([3.0, 0.009, 1.0, 0.5])) == [1, 2, 3]
    assert probes.collapsed(of_mean, std, torch.tensor([3.0, 0.011, 1.0, 0.5])) == [2, 3]
    assert probes.collapsed(std, std, None) == [3]  # a deterministic encoder with a channel of zeros


def test_the_first_frame_is_told_from_the_rest():
    z = WHITE.clone()
    z[:, :, 0] = 2 * z[:, :, 0] + 3
    first, rest = (
        ChannelMoments.of(part.transpose(0, 1).flatten(1).T, torch.zeros(1, 8)).summary()
        for part in (z[:, :, :1], z[:, :, 1:])
    )
    told = probes.first_against_rest(first, rest)
    assert told["mean_gap"] == pytest.approx([3] * 8, abs=0.15)
    assert told["std_ratio"] == pytest.approx([2] * 8, abs=0.1)
    still = probes.first_against_rest(first, rest | {"std": [0.0] * 8})
    assert still["std_ratio"] == [None] * 8


# --- spectra


def test_dct_basis_is_orthonormal_and_scipys():
    basis = probes.dct_basis(7)
    torch.testing.assert_close(basis @ basis.T, torch.eye(7, dtype=torch.float64), atol=1e-12, rtol=0)
    told = probes.dct_basis(4) @ torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    assert told.tolist() == pytest.approx([5, -2.230442497, 0, -0.158512668])  # scipy.fft.dct(x, norm="ortho")


def test_power_is_kept_and_does_not_depend_on_the_batch():
    power = probes.dct_power(WHITE, (-2, -1))
    assert power.shape == (16, 16)
    assert float(power.mean()) == pytest.approx(float(WHITE.double().square().mean()))
    halves = (probes.dct_power(WHITE[:8], (-2, -1)) + probes.dct_power(WHITE[8:], (-2, -1))) / 2
    torch.testing.assert_close(power, halves, atol=1e-12, rtol=0)


def test_white_noise_has_a_flat_spectrum():
    plane, time = probes.spectrum(probes.dct_power(WHITE, (-2, -1))), probes.spectrum(probes.dct_power(WHITE, (-3,)))
    assert plane.slope == pytest.approx(0, abs=0.02)
    assert plane.power == pytest.approx([1.0] * 15, abs=0.06)
    outside = (sum(row**2 + column**2 > 8**2 for row in range(16) for column in range(16)) + 2 / 2) / 255
    assert plane.high == pytest.approx(outside, abs=0.01)  # about 1 - pi/16, of the square outside the quarter disc
    assert time.slope == pytest.approx(0, abs=0.02)
    assert time.high == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("frames", "high"), [(2, None), (3, 0.5), (4, 0.5), (5, 0.5), (8, 0.5)])
def test_half_of_white_noise_lies_above_half_nyquist_in_time(frames, high):
    assert probes.spectrum(torch.ones(frames, dtype=torch.float64)).high == high


@pytest.mark.parametrize("slope", [-1.0, -2.0, -3.0])
def test_the_slope_of_coloured_noise_is_found(slope):
    basis = probes.dct_basis(32)
    axis = torch.arange(32) / 32
    radius = (axis[:, None] ** 2 + axis**2).sqrt()
    amplitude = torch.where(radius > 0, radius, 1) ** (slope / 2)
    signs = torch.randn(4, 3, 1, 32, 32, generator=torch.Generator().manual_seed(2)).sign().double()
    z = basis.T @ (signs * amplitude) @ basis
    assert probes.spectrum(probes.dct_power(z, (-2, -1))).slope == pytest.approx(slope, abs=0.03)


def test_a_pure_wave_lies_in_its_ring():
    wave = probes.dct_basis(16)[12].expand(1, 1, 1, 16, 16)  # along rows, three quarters of Nyquist
    found = probes.spectrum(probes.dct_power(wave, (-2, -1)))
    assert found.frequency[max(range(15), key=found.power.__getitem__)] == pytest.approx(0.75, abs=0.02)
    assert found.high == pytest.approx(1)


def test_a_constant_has_no_spectrum():
    found = probes.spectrum(probes.dct_power(torch.full((2, 3, 1, 8, 8), 0.3), (-2, -1)))
    assert found == probes.Spectrum([], [], None, None)


# --- local correlation


def test_local_correlation_of_known_fields():
    many = torch.randn(2, 64, 5, 8, 8, generator=torch.Generator().manual_seed(3))
    white = probes.local_correlation(many)
    assert white["first"] == pytest.approx(0, abs=0.01)
    assert white["rest"] == pytest.approx(0, abs=0.01)
    blocks = many[:, :, 1::2, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    smooth = torch.cat([blocks[:, :, :1], blocks], 2)
    assert probes.local_correlation(smooth) == pytest.approx({"first": 1.0, "rest": 1.0, "mean": 1.0})


def test_local_correlation_of_a_checkerboard_is_minus_a_third():
    rows = torch.arange(8)
    board = 1.0 - 2 * ((rows[:, None] + rows) % 2)
    z = board * torch.tensor([1.0, 2.0, -1.0, -2.0]).view(1, 4, 1, 1, 1)  # of the six pairs, four are opposite
    found = probes.local_correlation(z)
    assert found["first"] == pytest.approx(-1 / 3)
    assert found["rest"] is None


def test_local_correlation_agrees_with_ssvae_on_a_window():
    z = torch.randn(1, 5, 3, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scaled = (z - z.mean((0, 2, 3, 4), keepdim=True)) / z.std((0, 2, 3, 4), keepdim=True, correction=0)
    vectors = scaled[0, :, 1:].flatten(1).T  # one window of eight places
    expected = torch.corrcoef(vectors)[torch.triu(torch.ones(8, 8), 1) == 1].mean()
    assert probes.local_correlation(z)["rest"] == pytest.approx(float(expected))


def test_a_single_channel_has_no_local_correlation():
    assert probes.local_correlation(WHITE[:, :1]) == {"first": None, "rest": None, "mean": None}


# --- codecs


@dataclass
class Average:
    """Latents are means of 4 x 4 pixels, and decode to them: equivariant to everything, but for what is lost."""

    space_stride: int = 4

    def encode(self, pixels: Tensor) -> Tensor:
        return F.avg_pool3d(pixels, (1, 4, 4))

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        return z.repeat_interleave(4, -1).repeat_interleave(4, -2)


class Ramp(Average):
    """Its latents are a ramp from left to right, whatever it is given."""

    def encode(self, pixels: Tensor) -> Tensor:
        z = super().encode(pixels)
        return torch.linspace(-1, 1, z.shape[-1]).expand_as(z).clone()


class Pixels(Average):
    """The identity."""

    space_stride = 1

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        return z


def blocky(seed: int = 5) -> Tensor:
    """[2, 3, 2, 32, 32], of blocks of 8 x 8 pixels, which 4 x 4 means of a halved clip keep."""
    z = torch.rand(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8
    return z.repeat_interleave(8, -1).repeat_interleave(8, -2)


def test_averages_are_equivariant_to_all_transforms():
    pixels = blocky()
    z = Average().encode(pixels)
    for errors in probes.encoder_equivariance(Average(), pixels).values():
        assert errors.tolist() == pytest.approx([0, 0], abs=1e-6)
    for psnr in probes.decoder_equivariance(Average(), z, pixels).values():
        assert psnr.tolist() == [100, 100]


def test_a_ramp_is_as_wrong_as_can_be_when_flipped():
    errors = probes.encoder_equivariance(Ramp(), blocky())
    assert errors["flip"].tolist() == pytest.approx([2, 2])  # |g - (-g)| / |g|
    assert errors["rot90"].tolist() == pytest.approx([math.sqrt(2)] * 2)  # ramps at right angles are orthogonal
    shifted = probes.encoder_equivariance(Ramp(), blocky(), mean=torch.full((3,), 10.0))["flip"]
    assert (shifted < 0.3).all()  # the mean is taken off what the error is divided by


def test_transforms_do_to_latents_what_they_do_to_pixels():
    x = blocky()
    for name, tau in probes.TRANSFORMS.items():
        torch.testing.assert_close(tau(Average().encode(x), 1), Average().encode(tau(x, 4)), msg=name)
        assert not torch.equal(tau(x, 4)[..., :8, :8], x[..., :8, :8]), name


def test_the_noise_curve_of_the_identity_is_the_noise():
    x = torch.zeros(4, 3, 2, 32, 32)
    z, std = x, torch.tensor([1.0, 1.0, 0.0])

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(4)]

    curve = probes.noise_curve(Pixels(), z, x, std, generators(), (0.0, 0.05, 0.1))
    assert curve[0].tolist() == [100] * 4
    for row, sigma in zip(curve[1:], (0.05, 0.1), strict=True):  # two of three channels; pixels of [0, 1] have half
        assert row.tolist() == pytest.approx([-10 * math.log10(2 / 3 * (sigma / 2) ** 2)] * 4, abs=0.3)
    alone = probes.noise_curve(Pixels(), z[2:3], x[2:3], std, generators()[2:3], (0.1,))
    assert alone[0, 0] == curve[2, 2]  # noise belongs to a clip, not to its batch


def test_midway_of_a_linear_decoder_is_a_double_exposure():
    a, b = (torch.rand(2, 3, 1, 64, 64, generator=torch.Generator().manual_seed(s)) - 0.5 for s in (6, 7))
    found = probes.interpolation(Pixels(), a, b, 1)
    assert found["mse"].tolist() == pytest.approx([0, 0], abs=1e-12)
    assert found["sharpness"].tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    same = probes.interpolation(Pixels(), a, a, 1)
    assert same["sharpness"].tolist() == pytest.approx([1, 1])


def test_midway_lpips_is_relative_to_the_ends_distance():
    a, b = torch.zeros(1, 3, 2, 4, 4), torch.full((1, 3, 2, 4, 4), 0.5)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().mean((1, 2, 3), keepdim=True)

    assert probes.interpolation(Pixels(), a, b, 2, distance)["lpips"].tolist() == pytest.approx([0.5])


class Seam(Pixels):
    """The identity but for a column."""

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        z = z.clone()
        z[..., 8] += 0.2
        return z


def test_a_seam_stands_out_of_tiles():
    x = torch.zeros(2, 3, 1, 16, 16)
    same = probes.tiling_error(Pixels(), Pixels(), x + 0.5)
    assert same["psnr"].tolist() == [100, 100]
    assert same["worst_line"].tolist() == [1, 1]
    assert same["latents"].tolist() == [0, 0]
    seam = probes.tiling_error(Pixels(), Seam(), x)
    assert seam["psnr"].tolist() == pytest.approx([-10 * math.log10(0.01 / 16)] * 2)
    assert seam["worst_line"].tolist() == pytest.approx([4, 4])  # all of the error is in one of 16 columns
