"""Causal 3D convolution, optionally after RMS norm and SiLU, for whole clips and for chunks.

The frames before a chunk are an argument and a result (`cache`), never state of a module, so whole clips, chunks,
gradient checkpointing and torch.compile share one code path. The norm writes into the convolution's input, next to the
cached frames, and is recomputed in backward: of norm, SiLU and convolution, autograd keeps only the norm's input. On
CPUs each of the kernel's three time taps is a 2D convolution, and taps that would only see the zeros before the first
frame are skipped: a single frame costs a third.

Activations are [B, C, T, H, W] in channels-last memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vae3d.models.layers.borders import Borders
from vae3d.precision import autocast_off

EPS = 1e-12  # of F.normalize, which the published network uses
CACHED = 2  # frames: the kernel's three taps, without the present one


def stream_conv(
    x: Tensor,
    cache: Tensor | None,
    conv: nn.Conv3d,
    borders: Borders,
    *,
    gamma: Tensor | None = None,
    return_cache: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """conv(SiLU(RMS norm(x))), and the cache for the next chunk.

    x: [B, C, T, H, W]. cache: the last two frames of the convolution's input in the chunk before, [B, C, 2, H, W], with
    zeros for frames before the clip; None at the start, for zeros. Its shape is the same from the first chunk on, so
    that a compiled step is not compiled again while a cache fills, and a CUDA graph can keep it in one place.
    gamma: the norm's gain, [C, 1, 1, 1]; None: no norm and no SiLU. The norm runs in fp32, the convolution in
    autocast's dtype.
    """
    dtype = _conv_dtype(x)
    weight, bias = conv.weight.to(dtype), conv.bias.to(dtype)
    if torch.compiler.is_compiling():  # the compiler fuses by itself
        return _stream_conv(x, cache, gamma, weight, bias, borders, return_cache)
    if not torch.is_grad_enabled():
        cache = _known_frames(cache)
    return _StreamConv.apply(x, cache, gamma, weight, bias, borders, return_cache)


def _known_frames(cache: Tensor | None) -> Tensor | None:
    """On CPUs, the cache without zero frames in front, whose taps `_conv` then skips."""
    if type(cache) is not Tensor or cache.device.type != "cpu":  # a FakeTensor has no values
        return cache
    first = 0  # of the frames that are not zero, as nearly always the first pixel shows
    while first < CACHED and not cache[:, :, first, :1, :1].any() and not cache[:, :, first].any():
        first += 1
    return None if first == CACHED else cache[:, :, first:]


def zero_cache(x: Tensor) -> Tensor:
    """The cache that stream_conv returns for zero frames of x's size, with borders that it does not pad."""
    batch, channels, _, height, width = x.shape
    size = (batch, channels, CACHED, height, width)
    return torch.empty(size, dtype=_conv_dtype(x), device=x.device, memory_format=torch.channels_last_3d).zero_()


def _conv_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """RMS norm over channels (dimension 1), in fp32 or better: F.normalize(x, dim=1) * sqrt(C) * gamma.

    Zhang and Sennrich, arXiv 1910.07467, equation 4.
    """
    wide = x.to(_norm_dtype(x))
    return (wide * _inverse_rms(wide) * gamma).to(x.dtype)


def _norm_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _inverse_rms(x: Tensor) -> Tensor:
    """sqrt(C) / |x| over the channels, [B, 1, ...]; finite where x is zero."""
    return x.shape[1] ** 0.5 / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(EPS)


def _stream_conv(
    x: Tensor,
    cache: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    borders: Borders,
    return_cache: bool,
) -> tuple[Tensor, Tensor | None]:
    """Reference implementation, which torch.compile fuses."""
    new = x if gamma is None else F.silu(rms_norm(x.to(_norm_dtype(x)), gamma))
    frames = new.to(weight.dtype).transpose(1, 2).flatten(0, 1)
    new = borders.pad(frames).unflatten(0, (len(x), -1)).transpose(1, 2)
    full = F.pad(new, (0, 0, 0, 0, CACHED, 0)) if cache is None else torch.cat([cache, new], 2)
    out = F.conv3d(full, weight, bias, padding=(0, *borders.zero_padding))
    return out, full[:, :, -CACHED:].clone(memory_format=torch.channels_last_3d) if return_cache else None


class _StreamConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cache: Tensor | None,
        gamma: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        borders: Borders,
        return_cache: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(x, cache, gamma, weight)
        ctx.borders = borders
        with autocast_off(x.device):
            frames = _conv_input(x, cache, gamma, weight.dtype, borders)
            out = _conv(frames, x.shape[2], weight, bias, borders.zero_padding)
        return out, _last_frames(frames) if return_cache else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_cache: Tensor | None) -> tuple[Tensor | None, ...]:
        x, cache, gamma, weight = ctx.saved_tensors
        borders: Borders = ctx.borders
        needs_grad = ctx.needs_input_grad
        needs_input_grad = any(needs_grad[:3])
        with autocast_off(x.device):
            frames = _conv_input(x, cache, gamma, weight.dtype, borders)
            grad_frames, grad_weight, grad_bias = _conv_backward(
                grad, frames, x.shape[2], weight, borders.zero_padding, (needs_input_grad, needs_grad[3], needs_grad[4])
            )
            if not needs_input_grad:
                return None, None, None, grad_weight, grad_bias, None, None
            if grad_cache is not None:
                known = min(CACHED, frames.shape[2])  # the cache begins with zeros if there are fewer
                grad_frames[:, :, -known:] += grad_cache[:, :, -known:]
            before = frames.shape[2] - x.shape[2]
            grad_cache_in = grad_frames[:, :, before - cache.shape[2] : before] if cache is not None else None
            grad_new = borders.pad_adjoint_(grad_frames[:, :, before:])
            if gamma is None:
                grad_x, grad_gamma = grad_new.to(x.dtype), None
            else:
                grad_x, grad_gamma = _norm_silu_backward(grad_new, x, gamma)
        return grad_x, grad_cache_in, grad_gamma, grad_weight, grad_bias, None, None


def _conv_input(x: Tensor, cache: Tensor | None, gamma: Tensor | None, dtype: torch.dtype, borders: Borders) -> Tensor:
    """[cache | SiLU(norm(x))], padded; with zero frames in front only where `_conv` needs them."""
    cached = 0 if cache is None else cache.shape[2]
    before = cached if _taps_apart(x) or x.shape[2] + cached == 1 else CACHED
    rows, columns = borders.padding
    batch, channels, count, height, width = x.shape
    if not before and not rows and not columns and gamma is None and x.dtype == dtype:
        return x
    size = (batch, channels, before + count, height + 2 * rows, width + 2 * columns)
    frames = torch.empty(size, dtype=dtype, device=x.device, memory_format=torch.channels_last_3d)
    if cache is not None:
        frames[:, :, before - cached : before] = cache
    frames[:, :, : before - cached] = 0
    new = frames[:, :, before:]
    inside = borders.crop(new)
    if gamma is None:
        inside.copy_(x)
    elif dtype == _norm_dtype(x):
        torch.mul(x, _inverse_rms(x), out=inside)
        F.silu(inside.mul_(gamma), inplace=True)
    else:
        wide = x.to(_norm_dtype(x))
        inside.copy_(F.silu((wide * _inverse_rms(wide)).mul_(gamma), inplace=True))
    borders.pad_(new)
    return frames


def _last_frames(frames: Tensor) -> Tensor:
    """The cache for the next chunk: a copy, since a view would keep the whole chunk alive."""
    if frames.shape[2] < CACHED:
        frames = F.pad(frames, (0, 0, 0, 0, CACHED - frames.shape[2], 0))
    return frames[:, :, -CACHED:].clone(memory_format=torch.channels_last_3d)


def _norm_silu_backward(grad: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of SiLU(x * r * gamma), r = sqrt(C) / |x|, with respect to x and gamma."""
    wide = x.to(_norm_dtype(x))
    inverse = _inverse_rms(wide)
    unit = wide * inverse
    grad = torch.ops.aten.silu_backward(grad.to(wide.dtype), unit * gamma)
    product = grad * unit
    grad_gamma = product.sum((0, 2, 3, 4), keepdim=True)[0]
    along = torch.einsum("bcthw,c->bthw", product, gamma.flatten() / len(gamma))[:, None]
    grad_x = grad.mul_(gamma).addcmul_(unit, along, value=-1).mul_(inverse)
    return grad_x.to(x.dtype), grad_gamma.to(gamma.dtype)


def _taps_apart(x: Tensor) -> bool:
    """Whether `_conv` runs the time taps one by one: on CPUs as fast as conv3d, and it can skip some."""
    return x.device.type in ("cpu", "meta")


def _conv(frames: Tensor, count: int, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> Tensor:
    """The last `count` outputs of a causal convolution over `frames`, with zeros for missing frames in front."""
    if not _taps_apart(frames):
        return F.conv3d(frames, weight[:, :, -frames.shape[2] :], bias, padding=(0, *padding))
    clips = [_conv_taps(clip.transpose(0, 1), count, weight, bias, padding) for clip in frames]
    return _stack(clips)


def _conv_taps(
    frames: Tensor, count: int, weight: Tensor, bias: Tensor, padding: tuple[int, int], clips: int = 1
) -> Tensor:
    """`_conv` for clips [T * B, C, H, W], time first, tap by tap. count: of T * B."""
    out = F.conv2d(frames[-count:], weight[:, :, -1], bias, padding=padding)
    for tap, first, source in _taps(len(frames), count, weight.shape[2], clips):
        out[first:] += F.conv2d(frames[source], weight[:, :, tap], padding=padding)
    return out


def _taps(frames: int, count: int, kernel: int, clips: int) -> Iterator[tuple[int, int, slice]]:
    """Taps on earlier frames: (index, the first of `count` outputs that it reaches, the frames that it reads)."""
    before = frames - count
    for tap in reversed(range(kernel - 1)):
        back = (kernel - 1 - tap) * clips
        first = max(0, back - before)
        if first < count:
            yield tap, first, slice(before + first - back, before + count - back)


def _conv_backward(
    grad: Tensor, frames: Tensor, count: int, weight: Tensor, padding: tuple[int, int], mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `_conv` with respect to frames, weight and bias; None where `mask` is False."""
    if not _taps_apart(frames):
        used = weight[:, :, -frames.shape[2] :]
        grad_frames, grad_used, grad_bias = _convolution_backward(grad, frames, used, (0, *padding), mask)
        if grad_used is not None and used.shape != weight.shape:
            grad_used = F.pad(grad_used, (0, 0, 0, 0, weight.shape[2] - used.shape[2], 0))
        return grad_frames, grad_used, grad_bias
    grads = [
        _conv_taps_backward(g.transpose(0, 1), f.transpose(0, 1), count, weight, padding, mask)
        for g, f in zip(grad, frames, strict=True)
    ]
    grad_frames, grad_weight, grad_bias = zip(*grads, strict=True)
    return (
        _stack(grad_frames) if mask[0] else None,
        torch.stack(grad_weight).sum(0) if mask[1] else None,
        torch.stack(grad_bias).sum(0) if mask[2] else None,
    )


def _conv_taps_backward(
    grad: Tensor,
    frames: Tensor,
    count: int,
    weight: Tensor,
    padding: tuple[int, int],
    mask: tuple[bool, bool, bool],
    clips: int = 1,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    grad_weight = torch.zeros_like(weight) if mask[1] else None
    kernel = weight.shape[2]
    grad_frames, grad_tap, grad_bias = _convolution_backward(grad, frames[-count:], weight[:, :, -1], padding, mask)
    if mask[0] and len(frames) > count:
        grad_frames = F.pad(grad_frames, (0, 0, 0, 0, 0, 0, len(frames) - count, 0))
    if mask[1]:
        grad_weight[:, :, -1] = grad_tap
    for tap, first, source in _taps(len(frames), count, kernel, clips):
        tap_mask = (mask[0], mask[1], False)
        inner, grad_tap, _ = _convolution_backward(grad[first:], frames[source], weight[:, :, tap], padding, tap_mask)
        if mask[0]:
            grad_frames[source] += inner
        if mask[1]:
            grad_weight[:, :, tap] = grad_tap
    return grad_frames, grad_weight, grad_bias


def join_pairs(x: Tensor, before: Tensor | None, clips: int) -> Tensor:
    """Each frame of [T * B, C, H, W], time first, joined in channels with the frame before it.

    before: the frames before the first, [B, C, H, W]; None for zeros.
    """
    before = torch.zeros_like(x[:clips]) if before is None else before
    return torch.cat([x, torch.cat([before, x[:-clips]])], 1)


def pair_conv(x: Tensor, before: Tensor | None, clips: int, conv: nn.Conv2d) -> Tensor:
    """conv(join_pairs(x, before, clips)).

    For backward, CPUs run it as a causal convolution of two time taps, which copies no frames. Without gradients a CPU
    has one latent's frames at a time, and copying the weights apart costs more.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _taps_apart(x):
        return conv(join_pairs(x, before, clips))
    dtype = _conv_dtype(x)
    frames = (x if before is None else torch.cat([before, x])).to(dtype)
    present, past = conv.weight.to(dtype).chunk(2, 1)
    return _PairConv.apply(frames, len(x), torch.stack([past, present], 2), conv.bias.to(dtype), conv.padding, clips)


class _PairConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, frames: Tensor, count: int, weight: Tensor, bias: Tensor, padding: tuple[int, int], clips: int
    ) -> Tensor:
        ctx.save_for_backward(frames, weight)
        ctx.settings = count, padding, clips
        with autocast_off(frames.device):
            return _conv_taps(frames, count, weight, bias, padding, clips)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        frames, weight = ctx.saved_tensors
        count, padding, clips = ctx.settings
        needs_grad = ctx.needs_input_grad
        mask = needs_grad[0], needs_grad[2], needs_grad[3]
        with autocast_off(grad.device):
            grad_frames, grad_weight, grad_bias = _conv_taps_backward(grad, frames, count, weight, padding, mask, clips)
        return grad_frames, None, grad_weight, grad_bias, None, None


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, ...], mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    ones = [1] * len(padding)
    zeros = [0] * len(padding)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], ones, padding, ones, False, zeros, 1, mask
    )


def _stack(clips: Sequence[Tensor]) -> Tensor:
    """[T, C, H, W] of each clip -> [B, C, T, H, W], both channels last."""
    if len(clips) == 1:
        return clips[0].transpose(0, 1)[None]
    return torch.stack([clip.permute(0, 2, 3, 1) for clip in clips]).permute(0, 4, 1, 2, 3)
