"""PatchGAN's networks: sizes, norms and errors."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from vae3d.adversarial.discriminators import Conv2d, MultiScale, Norm, PatchGAN, PatchGAN3D
from vae3d.adversarial.gan import Gan

TINY = {"channels": 4, "layers": 2, "groups": 2}


@pytest.mark.parametrize("norm", get_args(Norm))
def test_patchgan_has_the_published_number_of_parameters(norm):
    with torch.device("meta"):
        network = PatchGAN(norm=norm)
    count = sum(p.numel() for p in network.parameters())
    assert count == (2_763_841 if norm in ("spectral", "none") else 2_765_633)
    biased = [conv.bias is not None for conv in network.modules() if isinstance(conv, Conv2d)]
    assert biased == [True, False, False, False, True]


def test_patchgan_gives_one_logit_per_patch():
    with torch.device("meta"):
        network = PatchGAN()
        sizes = {side: network(torch.empty(2, 3, side, side)).shape for side in (512, 256, 128, 64, 24)}
        assert network(torch.empty(1, 3, 64, 128)).shape == (1, 1, 6, 14)
    assert sizes == {side: (2, 1, out, out) for side, out in ((512, 62), (256, 30), (128, 14), (64, 6), (24, 1))}


def test_a_patch_is_70_pixels_wide():
    network = PatchGAN(channels=2, norm="none")
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    network(images)[0, 0, 7, 7].backward()
    for axis in (2, 3):
        seen = images.grad.abs().sum([i for i in range(4) if i != axis]).nonzero()
        assert int(seen.max() - seen.min()) + 1 == 70


@pytest.mark.parametrize(("frames", "logits"), [(1, 1), (2, 1), (5, 3), (17, 5)])
def test_the_3d_one_takes_any_number_of_frames(frames, logits):
    network = PatchGAN3D(channels=4, layers=3 if frames == 17 else 2, groups=2)
    assert network(torch.randn(2, 3, frames, 24, 32)).shape == (2, 1, logits, *((1, 2) if frames == 17 else (4, 6)))


def test_the_3d_one_sees_motion_and_the_2d_one_does_not():
    clip = torch.randn(1, 3, 5, 16, 16)
    turned = clip.flip(2)
    three, two = PatchGAN3D(**TINY).eval(), PatchGAN(**TINY).eval()
    assert not torch.allclose(three(clip).mean(), three(turned).mean(), atol=1e-5)
    frames = [video.transpose(1, 2).flatten(0, 1) for video in (clip, turned)]
    torch.testing.assert_close(two(frames[0]).mean(), two(frames[1]).mean())


@pytest.mark.parametrize(("network", "shape"), [(PatchGAN, (2, 3, 32, 32)), (PatchGAN3D, (2, 3, 4, 32, 32))])
def test_every_scale_sees_means_of_two_by_two_pixels_of_the_one_before(network, shape):
    scales = MultiScale([network(**TINY) for _ in range(2)]).eval()
    x = torch.randn(shape)
    half = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean((-1, -3))
    large, small = scales(x)
    torch.testing.assert_close(large, scales.discriminators[0](x))
    torch.testing.assert_close(small, scales.discriminators[1](half))
    assert (large.shape[2:-2], small.shape[2:-2]) == (large.shape[2:-2],) * 2  # no frames are averaged


@pytest.mark.parametrize("norm", get_args(Norm))
def test_spectral_norm_is_on_every_convolution_or_on_none(norm):
    network = PatchGAN(norm=norm, **TINY)
    for _ in range(30):
        network(torch.randn(2, 3, 16, 16))  # a power iteration each
    largest = [torch.linalg.matrix_norm(m.weight.flatten(1), 2) for m in network.modules() if isinstance(m, Conv2d)]
    ones = [torch.isclose(value, torch.tensor(1.0), atol=0.02).item() for value in largest]
    assert all(ones) if "spectral" in norm else not any(ones)
    kinds = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm, "spectral_group": nn.GroupNorm}
    assert sum(isinstance(m, nn.BatchNorm2d | nn.GroupNorm) for m in network.modules()) == 2 * (norm in kinds)
    assert norm not in kinds or isinstance(network.main[3], kinds[norm])


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_weights_start_as_published_where_no_spectral_norm_rescales_them(norm):
    torch.manual_seed(0)
    network = PatchGAN(channels=32, norm=norm)
    for module in network.modules():
        if isinstance(module, Conv2d) and module.weight.numel() > 10_000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.02)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            assert module.weight.mean().item() == pytest.approx(1.0, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.4)
            assert not module.bias.any()


@pytest.mark.parametrize("network", [PatchGAN, PatchGAN3D])
def test_spectral_norms_are_taken_in_fp32_where_autocast_halves_the_rest(network):
    network, halved = network(norm="spectral", **TINY), []
    for conv in filter(parametrize.is_parametrized, network.main):
        norm = conv.parametrizations.weight[0]
        norm.register_forward_hook(lambda *_: halved.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.randn(2, 3, *[4] * (network.conv is not Conv2d), 16, 16))
    assert halved == [False] * 4
    assert logits.dtype == torch.bfloat16


@pytest.mark.parametrize("frames", [2, 5])
def test_gradients_in_bf16_of_clips_shorter_than_the_kernel_are_those_in_fp32(frames):
    """oneDNN leaves a part of them uninitialised on CPUs with bf16 instructions."""
    torch.manual_seed(0)
    network, clip = PatchGAN3D(channels=16, layers=3, norm="none"), torch.randn(1, 3, frames, 24, 24)
    found = []
    for enabled in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = network(clip)
        logits.float().square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert (found[1] - found[0]).norm() < 0.1 * found[0].norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "layer"}, "adversary.norm is 'layer'; give one of spectral_group, spectral, batch, group, none"),
        ({"layers": 0}, "adversary.layers is 0; give an integer from 1"),
        ({"lr": -1.0}, "adversary.lr is -1.0; give a finite number from 1e-30"),
        ({"betas": [0.5]}, r"adversary.betas is \[0.5\]; give a list"),
        ({"betas": [0.5, 1.0]}, r"adversary.betas\[1\] is 1.0; give a finite number from 0 to 0.99"),
        ({"weight_decay": -1}, "adversary.weight_decay is -1; give a finite number from 0"),
        ({"warmup_steps": -5}, "adversary.warmup_steps is -5; give an integer from 0"),
        ({"cycles": 0}, "adversary.cycles is 0; give an integer from 1"),
        ({"power": -1}, "adversary.power is -1; give a finite number from 1e-30"),
        ({"channels": 10, "groups": 3}, "adversary.groups is 3, which does not divide 20 channels; use a divisor"),
    ],
)
def test_networks_that_cannot_be_built_say_why(settings, message):
    with pytest.raises(ValueError, match=message):
        Gan(**settings)


def test_groups_are_no_more_than_channels():
    assert PatchGAN(channels=8, layers=1, groups=32).main[3].num_groups == 16


def test_images_smaller_than_a_patch_are_refused_with_the_least_size():
    with pytest.raises(ValueError, match="the clip is 23x64; this discriminator needs 24 pixels or more"):
        PatchGAN(channels=4, groups=2)(torch.zeros(1, 3, 23, 64))
    scales = MultiScale([PatchGAN3D(channels=4, groups=2) for _ in range(2)])
    with pytest.raises(ValueError, match="the clip is 64x47; this discriminator needs 48 pixels or more"):
        scales(torch.zeros(1, 3, 1, 64, 47))
    assert [logits.shape[-2:] for logits in scales(torch.zeros(1, 3, 1, 48, 48))] == [(4, 4), (1, 1)]
