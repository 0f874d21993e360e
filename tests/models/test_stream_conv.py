"""The causal convolution with norm and SiLU: its result, backward and padding."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from vae3d.models.layers import stream_conv as stream
from vae3d.models.layers.borders import POINTWISE, Borders
from vae3d.models.layers.stream_conv import (
    CACHED,
    _stream_conv,
    join_pairs,
    pair_conv,
    rms_norm,
    stream_conv,
    zero_cache,
)

BORDERS = [Borders(), Borders("circular"), Borders("circular", "pole")]
CASES = list(itertools.product([0, CACHED], [False, True], BORDERS))  # cached frames, norm, borders


def case(cached: int, norm: bool, borders: Borders = BORDERS[0], dtype: torch.dtype = torch.float64, count: int = 3):
    """x, cached frames with their padding, convolution and gain; two clips of `count` frames of 3 x 4."""
    rows, columns = borders.padding
    torch.manual_seed(0)
    x = torch.randn(2, 3, count, 3, 4, dtype=dtype, requires_grad=True)
    frames = (
        torch.randn(2, 3, cached, 3 + 2 * rows, 4 + 2 * columns, dtype=dtype, requires_grad=True) if cached else None
    )
    conv = torch.nn.Conv3d(3, 2, 3, dtype=dtype)
    gamma = torch.randn(3, 1, 1, 1, dtype=dtype, requires_grad=True) if norm else None
    return x, frames, conv, gamma


@pytest.mark.parametrize(("cached", "norm", "borders"), CASES)
def test_gradients_are_those_of_finite_differences(cached, norm, borders):
    x, frames, conv, gamma = case(cached, norm, borders)
    weights = [conv.weight, conv.bias]
    given = [t for t in (x, frames, gamma) if t is not None]

    def step(*inputs):
        inputs = list(inputs)
        x, frames = inputs.pop(0), inputs.pop(0) if cached else None
        gamma = inputs.pop(0) if norm else None
        conv_now = torch.nn.Conv3d(3, 2, 3)
        del conv_now.weight, conv_now.bias
        conv_now.weight, conv_now.bias = inputs
        return stream_conv(x, frames, conv_now, borders, gamma=gamma, return_cache=True)

    assert torch.autograd.gradcheck(step, [*given, *weights], fast_mode=True)


@pytest.mark.parametrize("taps_apart", [True, False])  # as on CPUs, as on GPUs
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("cached", "norm", "borders"), CASES)
def test_result_and_gradients_are_those_of_the_plain_formula(monkeypatch, cached, norm, borders, count, taps_apart):
    monkeypatch.setattr("vae3d.models.layers.stream_conv._taps_apart", lambda _: taps_apart)
    x, frames, conv, gamma = case(cached, norm, borders, count=count)
    given = [t for t in (x, frames, gamma, conv.weight, conv.bias) if t is not None]
    found = stream_conv(x, frames, conv, borders, gamma=gamma, return_cache=True)
    expected = _stream_conv(x, frames, gamma, conv.weight, conv.bias, borders, True)
    assert found[1].shape[2] == CACHED
    assert found[1].stride() == expected[1].stride()  # both are a layout that a compiled step knows
    probes = [torch.randn_like(t) for t in expected]
    mine, theirs = (torch.autograd.grad(results, given, probes) for results in (found, expected))
    for one, other in zip([*found, *mine], [*expected, *theirs], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_only_what_is_asked_for_gets_a_gradient():
    x, frames, conv, gamma = case(2, True)
    conv.requires_grad_(False)
    out, _ = stream_conv(x.detach(), frames.detach(), conv, Borders(), gamma=gamma)
    out.sum().backward()
    assert gamma.grad.abs().min() > 0
    assert conv.weight.grad is None


def test_zeros_pass_the_norm_as_zeros_with_finite_gradients():
    x, _, conv, gamma = case(0, True, dtype=torch.float32)
    x = x.detach()
    x[:, :, 1] = 0
    x.requires_grad_()
    assert (rms_norm(x, gamma)[:, :, 1] == 0).all()
    out, _ = stream_conv(x, None, conv, Borders(), gamma=gamma)
    out.sum().backward()
    assert out.isfinite().all()
    for t in (x, gamma, conv.weight):
        assert t.grad.isfinite().all()


def test_the_norm_is_that_of_the_published_network():
    x, _, _, gamma = case(0, True)
    expected = F.normalize(x, dim=1) * 3**0.5 * gamma
    torch.testing.assert_close(rms_norm(x, gamma), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_only_the_convolution_is_in_bf16(dtype):
    """With an identity convolution values are rounded once, after norm and SiLU."""
    torch.manual_seed(0)
    x = (torch.randn(1, 16, 2, 4, 4) * 1e4).to(dtype)
    gamma = torch.randn(16, 1, 1, 1)
    conv = torch.nn.Conv3d(16, 16, 3)
    with torch.no_grad():
        torch.nn.init.dirac_(conv.weight)
        conv.weight.copy_(conv.weight.roll(1, 2))  # the last tap is the frame itself
        conv.bias.zero_()
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = stream_conv(x, None, conv, Borders(), gamma=gamma)
    exact = F.silu(rms_norm(x.double(), gamma.double()))
    assert out.dtype == torch.bfloat16
    half_a_step = torch.finfo(torch.bfloat16).eps / 2
    assert ((out.double() - exact).abs() / exact.abs()).max() < 1.01 * half_a_step


def test_large_halves_do_not_overflow_in_the_norm():
    x = torch.full((1, 16, 1, 1, 1), 3e4, dtype=torch.float16)
    assert rms_norm(x, torch.ones(16, 1, 1, 1)).flatten().tolist() == [1.0] * 16


@pytest.mark.parametrize("borders", BORDERS[1:])
def test_the_halo_is_the_continued_panorama_and_fold_its_adjoint(borders):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 6)
    rows, columns = borders.padding
    padded = torch.full((2, 3, 4 + 2 * rows, 6 + 2 * columns), float("nan"))
    borders.crop(padded).copy_(x)
    borders.pad_(padded)
    assert torch.equal(padded, borders.pad(x))
    assert torch.equal(padded[:, :, rows : 4 + rows, 0], x[..., -1])
    if rows:  # beyond the poles lie the first and last row, half a turn away
        assert torch.equal(padded[:, :, 0, 1:-1], x[:, :, 0].roll(3, -1))
        assert torch.equal(padded[:, :, -1, 1:-1], x[:, :, -1].roll(3, -1))
    probe = torch.randn_like(padded)
    product = (padded * probe).sum()
    assert (x * borders.pad_adjoint_(probe)).sum().item() == pytest.approx(product.item(), rel=1e-5)


def test_nothing_is_written_around_frames_with_zero_borders():
    x = torch.randn(1, 2, 3, 4)
    assert Borders().padding == (0, 0)
    assert Borders().zero_padding == (1, 1)
    assert Borders().pad(x) is x


@pytest.mark.parametrize("count", [1, 2])
def test_few_frames_leave_out_taps_that_would_meet_zeros(monkeypatch, count):
    x, _, conv, _ = case(0, False)
    x = x[:, :, :count]
    expected = F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), conv.weight, conv.bias)
    gradient = torch.autograd.grad(expected.square().sum(), conv.weight)[0]
    for apart in (True, False):
        monkeypatch.setattr("vae3d.models.layers.stream_conv._taps_apart", lambda _, apart=apart: apart)
        out, _ = stream_conv(x, None, conv, Borders())
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
        found = torch.autograd.grad(out.square().sum(), conv.weight)[0]
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)


def test_the_cache_before_a_skipped_convolution_looks_as_after_one():
    """Upsample skips its time convolution at the first frame: the next chunk's step must not see another layout."""
    x = torch.randn(2, 3, 1, 3, 4).to(memory_format=torch.channels_last_3d)
    conv = torch.nn.Conv3d(3, 2, (3, 1, 1))
    for precision in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision):
            _, after = stream_conv(x, None, conv, POINTWISE, return_cache=True)
            zeros = zero_cache(x)
        assert (zeros.shape, zeros.dtype, zeros.stride()) == (after.shape, after.dtype, after.stride())


def test_taps_on_zeros_before_the_clip_are_skipped_in_inference(monkeypatch):
    """Bit for bit as without a cache, or with one frame of it; the cache that is returned stays whole."""
    x, frames, conv, _ = case(CACHED, False, dtype=torch.float32)
    seen = []

    def count(x, cache, *arguments, run=stream._conv_input):
        seen.append(None if cache is None else cache.shape[2])
        return run(x, cache, *arguments)

    monkeypatch.setattr(stream, "_conv_input", count)
    with torch.no_grad():
        plain, _ = stream_conv(x[:, :, :1], None, conv, Borders())
        zeros, cache = stream_conv(x[:, :, :1], torch.zeros_like(frames), conv, Borders(), return_cache=True)
        assert torch.equal(zeros, plain)
        assert not cache[:, :, 0].any()
        frames[:, :, 0] = 0
        frames[:, :, 1, 0, 0] = 0  # a black corner is no black frame
        stream_conv(x, frames, conv, Borders())
        stream_conv(x, torch.ones_like(frames), conv, Borders())
    stream_conv(x, torch.zeros_like(frames), conv, Borders())  # gradients of a cache need all of it
    assert seen == [None, None, 1, 2, 2]


@pytest.mark.parametrize("taps_apart", [True, False])  # as on CPUs, as on GPUs
@pytest.mark.parametrize("clips", [1, 2])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("known", [False, True])
def test_a_convolution_of_pairs_of_frames_is_that_of_the_joined_frames(monkeypatch, known, count, clips, taps_apart):
    monkeypatch.setattr("vae3d.models.layers.stream_conv._taps_apart", lambda _: taps_apart)
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 5, 3, padding=1, dtype=torch.float64)
    x = torch.randn(count * clips, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    before = torch.randn(clips, 3, 4, 5, dtype=torch.float64, requires_grad=True) if known else None
    given = [t for t in (x, before, conv.weight, conv.bias) if t is not None]
    found, expected = pair_conv(x, before, clips, conv), conv(join_pairs(x, before, clips))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    probe = torch.randn_like(expected)
    mine, theirs = (torch.autograd.grad(result, given, probe) for result in (found, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
