"""Charbonnier and wavelets against hand-computed values, and gradients of LPIPS."""

from __future__ import annotations

import pytest
import torch

from tests.losses.test_erp import clip_and_error, loaded, loss_of
from tests.losses.test_objective import as_clip, reconstruction
from vae3d.losses.cube import CubeLPIPS
from vae3d.losses.objective import Objective, WeightedTerm
from vae3d.losses.perceptual import LPIPS
from vae3d.losses.pixel import L1, Charbonnier, Wavelet, haar, pyramid
from vae3d.losses.pixel_weights import ErpCosine

SPACE, ALL = (3, 4), (2, 3, 4)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---- Charbonnier


@pytest.mark.parametrize(("error", "value"), [(0.0, 1e-3), (3e-3, 10**0.5 * 1e-3), (-0.5, (0.25 + 1e-6) ** 0.5)])
def test_charbonnier_by_hand(error, value):
    clip, out = clip_and_error(torch.full((1, 3, 2, 4, 4), error))
    loss = loss_of(Charbonnier(), clip, out)
    assert loss.item() == pytest.approx(value, rel=1e-5)
    loss.backward()
    slope = error / value / out.video.numel()
    torch.testing.assert_close(out.video.grad, torch.full_like(out.video, slope))


# ---- wavelets


@pytest.mark.parametrize("axes", [SPACE, ALL])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_haar_keeps_the_energy_of_even_sizes(axes, levels):
    x = noise(2, 3, 8, 16, 24)
    torch.testing.assert_close(pyramid(x, levels, axes, haar).square().sum(), x.square().sum())


def test_haar_of_a_block_by_hand():
    x = torch.arange(1.0, 17.0).view(1, 1, 1, 4, 4)
    one = pyramid(x, 1, SPACE, haar)[0, 0, 0]
    assert one[:2, :2].flatten().tolist() == pytest.approx([7.0, -1.0, -4.0, 0.0])  # 1 2 / 5 6
    assert one[2, 2].item() == pytest.approx((11 + 12 + 15 + 16) / 2)
    two = pyramid(x, 2, SPACE, haar)[0, 0, 0]
    assert two[0, 0].item() == pytest.approx(x.sum().item() / 4)
    assert two[0, 2].item() == pytest.approx((1 + 2 + 5 + 6 + 9 + 10 + 13 + 14 - 3 - 4 - 7 - 8 - 11 - 12 - 15 - 16) / 4)
    assert torch.equal(two[1::2], one[1::2])


@pytest.mark.parametrize(("temporal", "base"), [(False, 2.0), (True, 8**0.5)])
@pytest.mark.parametrize("levels", [1, 2])
def test_a_constant_error_lies_in_the_coarsest_band(temporal, base, levels):
    clip, out = clip_and_error(torch.full((1, 3, 4, 8, 8), 0.3))
    assert loss_of(Wavelet(levels=levels, temporal=temporal), clip, out).item() == pytest.approx(0.3 * base**-levels)


def test_a_checkerboard_lies_in_the_finest_band_alone():
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    clip, out = clip_and_error(board.expand(1, 3, 2, 8, 8))
    for levels in (1, 3):  # one of four coefficients, of 2
        assert loss_of(Wavelet(levels=levels), clip, out).item() == pytest.approx(0.5)
    flicker = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1, 1).expand(1, 3, 2, 8, 8)
    clip, out = clip_and_error(flicker)
    for levels in (1, 3):  # one of eight coefficients, of 2 x sqrt(2)
        loss = loss_of(Wavelet(levels=levels, temporal=True), clip, out)
        assert loss.item() == pytest.approx(2**0.5 / 4)


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 8, 9), (2, 1, 4), (4, 1, 1)])
def test_any_size_goes_and_constants_have_no_details(shape, temporal):
    error = torch.full((1, 3, *shape), 0.5)
    bands = pyramid(error, 2, ALL if temporal else SPACE, haar)
    assert bands.shape == error.shape
    blocks = [-(-size // 4) for size in (shape if temporal else shape[1:])]
    blocks = blocks if temporal else [shape[0], *blocks]
    assert int((bands[0, 0].abs() > 1e-6).sum()) == blocks[0] * blocks[1] * blocks[2]
    clip, out = clip_and_error(error)
    loss_of(Wavelet(temporal=temporal), clip, out).backward()
    assert out.video.grad.isfinite().all()


def test_an_odd_last_column_is_its_own_partner():
    one = pyramid(torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 1, 1, 3), 1, SPACE, haar)
    assert one.flatten().tolist() == pytest.approx([4 * 0.5**0.5, -2 * 0.5**0.5, 5 * 2**0.5])


def test_images_weigh_the_same_with_and_without_time():
    clip, out = clip_and_error(noise(1, 3, 1, 8, 8).float())
    assert torch.equal(loss_of(Wavelet(temporal=True), clip, out), loss_of(Wavelet(), clip, out))


def test_white_noise_weighs_what_it_does_in_l1():
    clip, out = clip_and_error(noise(1, 3, 4, 64, 64).float())
    ratio = loss_of(Wavelet(temporal=True), clip, out) / loss_of(L1(), clip, out)
    assert ratio.item() == pytest.approx(1, abs=0.02)


def test_blocks_that_hold_an_invalid_pixel_do_not_count():
    valid = torch.ones(1, 1, 2, 8, 8, dtype=torch.bool)
    valid[..., 1, 1] = False
    error = torch.zeros(1, 3, 2, 8, 8)
    error[..., :4, :4] = 0.25  # three of 15 blocks of 2 x 2, and none of 4 x 4; what counts has mean 1
    for levels, value in ((1, 0.125 * 3 / 15), (2, 0.0)):
        clip, out = clip_and_error(error, valid)
        assert loss_of(Wavelet(levels=levels), clip, out).item() == pytest.approx(value, rel=1e-5)


def test_rows_are_weighted_where_their_coefficients_lie():
    error = torch.zeros(1, 3, 1, 8, 16)
    error[..., 4:6, :] = 1.0
    clip, out = clip_and_error(error)
    weight = ErpCosine()(8, "cpu")[4]
    plain = loss_of(Wavelet(levels=1), clip, out)
    torch.testing.assert_close(loss_of(Wavelet(levels=1), clip, out, ErpCosine()), plain * weight)


@pytest.mark.parametrize(
    ("term", "arguments", "message"),
    [(Wavelet, {"levels": 0}, "levels is 0; give an integer from 1"),
     (Charbonnier, {"eps": 0.0}, "eps is 0.0; give a finite number from 1e-30"),
     (LPIPS, {"net": "resnet"}, "net is 'resnet'; give one of vgg, alex"),
     (LPIPS, {"frame_batch": 1.5}, "frame_batch is 1.5; give an integer from 1"),
     (LPIPS, {"wrap": -1}, "wrap is -1; give an integer from 0"),
     (CubeLPIPS, {"size": 20.5}, "size is 20.5; give an integer from 1"),
     (CubeLPIPS, {"frame_batch": "all"}, "frame_batch is 'all'; give an integer from 1")],
)  # fmt: skip
def test_arguments_of_terms_are_checked(term, arguments, message):
    with pytest.raises(ValueError, match=message):
        term(**arguments)


# ---- LPIPS


def test_the_gradient_changes_with_the_perceptual_weight(trunks):
    """diffusers' train_autoencoderkl.py computes LPIPS without gradient, and so trains without it."""
    video = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    out = reconstruction(video)
    lpips = loaded(LPIPS())

    def gradient(weight: float) -> torch.Tensor:
        objective = Objective({"l1": WeightedTerm(L1(), 1.0), "lpips": WeightedTerm(lpips, weight)}, "mean")
        return torch.autograd.grad(objective(as_clip(video), out, 0)[0], out.video)[0]

    without, half, whole = gradient(0.0), gradient(0.5), gradient(1.0)
    assert (half - without).norm() > 0.01 * without.norm()
    torch.testing.assert_close(whole - without, 2 * (half - without), rtol=1e-3, atol=1e-9)
