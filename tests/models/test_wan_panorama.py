"""Wan VAEs with circular width: rotating a panorama rotates its latents and its reconstruction."""

from __future__ import annotations

import pytest
import torch

from tests.models import wan

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def turned(ours, video: torch.Tensor, z: torch.Tensor, steps: int) -> tuple[float, float]:
    """Largest differences, in moments and pixels, between rotating before and after coding."""
    columns = steps * ours.spec.space_stride
    with torch.no_grad():
        coded = wan.moments(ours.encode(video.roll(columns, -1))) - wan.moments(ours.encode(video)).roll(steps, -1)
        pixels = ours.decode(z.roll(steps, -1)) - ours.decode(z).roll(columns, -1)
    return coded.abs().max().item(), pixels.abs().max().item()


@pytest.mark.parametrize(
    ("style", "pad_h", "dtype"),
    [
        ("wan", "zeros", torch.float32),
        ("wan", "pole", torch.float64),
        ("wan22", "zeros", torch.float64),
        ("wan22", "pole", torch.float64),
    ],
)
def test_rolls_by_the_stride_commute_with_a_circular_width(style, pad_h, dtype):
    ours = wan.model(style, dtype, pad_w="circular", pad_h=pad_h)
    video, z = wan.clip(ours, 5, 1, 4), wan.latents(ours, 2, 1, 4)
    for steps in (1, 2):
        assert max(turned(ours, video, z, steps)) < TOLERANCE[dtype]


@pytest.mark.parametrize("style", wan.STYLES)
def test_rolls_do_not_commute_with_zeros(style):
    ours = wan.model(style)
    assert min(turned(ours, wan.clip(ours, 5, 1, 4), wan.latents(ours, 2, 1, 4), 1)) > 0.01


@pytest.mark.parametrize("pad_h", ["zeros", "pole"])
def test_chunks_and_checkpointing_know_the_circle_too(pad_h):
    ours = wan.model(dtype=torch.float64, pad_w="circular", pad_h=pad_h)
    video = wan.clip(ours, 9, 1, 4)
    probe = torch.randn(video.shape, dtype=torch.float64)
    whole = ours(video, sample=False).video
    expected = wan.gradients(ours, (whole * probe).sum())
    ours.chunk_latents, ours.gradient_checkpointing = 1, True
    chunked = ours(video, sample=False).video
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)
    for name, gradient in wan.gradients(ours, (chunked * probe).sum()).items():
        assert wan.relative_error(gradient, expected[name]) < 1e-10, name


def test_borders_change_no_parameter():
    zeros, pole = wan.model(), wan.model(pad_w="circular", pad_h="pole")
    pole.load_state_dict(zeros.state_dict())
    assert zeros.state_dict().keys() == pole.state_dict().keys()
    with torch.no_grad():
        inside = zeros.decode(wan.latents(zeros, 1, 12, 12)) - pole.decode(wan.latents(zeros, 1, 12, 12))
    assert inside.abs().max() > 1e-3  # the borders reach everything through attention, but
    assert inside[..., 40:56, 40:56].abs().max() < inside[..., :8].abs().max()


@pytest.mark.parametrize("pad_h", ["zeros", "pole"])
def test_a_panorama_of_constant_longitude_stays_one(pad_h):
    """Equal columns are reconstructed as equal columns: the network sees no border."""
    ours = wan.model(dtype=torch.float64, pad_w="circular", pad_h=pad_h)
    video = wan.clip(ours, 5, 2, 2)[..., :1].expand(-1, -1, -1, -1, 16)
    with torch.no_grad():
        out = ours(video, sample=False)
        zeros = wan.model(dtype=torch.float64)(video, sample=False).video
    assert out.z.std(-1).max() < 1e-12
    assert zeros.std(-1).max() > 0.01
