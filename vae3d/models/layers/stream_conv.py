"""Causal 3D convolution, alone or behind RMS norm and SiLU, for a whole clip or for one chunk after another.

One code path: frames that came before a chunk are an argument (`past`) and a result, never state of a module. So
whole clips, chunks, gradient checkpointing and torch.compile share it. The norm writes straight into the
convolution's input, next to the past frames, and is computed again in backward, so that of norm, SiLU and convolution
only the norm's input is kept. On CPUs the kernel's three time taps are 2D convolutions, and taps that would only meet
the zeros before the first frame are left out: a single frame costs a third.

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


def stream_conv(
    x: Tensor,
    past: Tensor | None,
    conv: nn.Conv3d,
    borders: Borders,
    *,
    gamma: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """conv(past frames, then SiLU(RMS norm(x))): output and the frames that the next chunk needs.

    x: [B, C, T, H, W]. past: the last frames of the convolution's input, at most two, from the chunk before; None
    stands for zeros. gamma: the norm's gain, [C, 1, 1, 1]; None: the convolution is alone. keep: return the past of
    the next chunk. Norm in fp32, convolution in autocast's dtype.
    """
    dtype = _compute_dtype(x)
    weight, bias = conv.weight.to(dtype), conv.bias.to(dtype)
    if torch.compiler.is_compiling():  # the compiler fuses by itself
        return _stream_conv(x, past, gamma, weight, bias, borders, keep)
    return _StreamConv.apply(x, past, gamma, weight, bias, borders, keep)


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """x of unit mean square over its channels (dimension 1), times gamma; computed in fp32 or better.

    Zhang and Sennrich 2019; equal to F.normalize(x, dim=1) * sqrt(C) * gamma.
    """
    wide = x.to(_norm_dtype(x))
    return (wide * _inverse_rms(wide) * gamma).to(x.dtype)


def _norm_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _inverse_rms(x: Tensor) -> Tensor:
    """sqrt(C) / |x| over the channels, [B, 1, ...]; finite where x is zero."""
    return x.shape[1] ** 0.5 / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(EPS)


def _stream_conv(
    x: Tensor, past: Tensor | None, gamma: Tensor | None, weight: Tensor, bias: Tensor, borders: Borders, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The plain formula, for torch.compile."""
    new = x if gamma is None else F.silu(rms_norm(x.to(_norm_dtype(x)), gamma))
    frames = new.to(weight.dtype).transpose(1, 2).flatten(0, 1)
    new = borders.pad(frames).unflatten(0, (len(x), -1)).transpose(1, 2)
    missing = 2 - (0 if past is None else past.shape[2])
    full = new if past is None else torch.cat([past, new], 2)
    padded = F.pad(full, (0, 0, 0, 0, missing, 0))
    return F.conv3d(padded, weight, bias, padding=(0, *borders.zeros)), full[:, :, -2:].clone() if keep else None


class _StreamConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        past: Tensor | None,
        gamma: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        borders: Borders,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(x, past, gamma, weight)
        ctx.borders = borders
        with autocast_off(x.device):
            frames = _conv_input(x, past, gamma, weight.dtype, borders)
            out = _conv(frames, x.shape[2], weight, bias, borders.zeros)
        return out, frames[:, :, -2:].clone() if keep else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_past: Tensor | None) -> tuple[Tensor | None, ...]:
        x, past, gamma, weight = ctx.saved_tensors
        borders: Borders = ctx.borders
        wanted = ctx.needs_input_grad
        with autocast_off(x.device):
            frames = _conv_input(x, past, gamma, weight.dtype, borders)
            wants_input = any(wanted[:3])
            to_frames, to_weight, to_bias = _conv_backward(
                grad, frames, x.shape[2], weight, borders.zeros, (wants_input, wanted[3], wanted[4])
            )
            if not wants_input:
                return None, None, None, to_weight, to_bias, None, None
            if grad_past is not None:
                to_frames[:, :, -grad_past.shape[2] :] += grad_past
            before = frames.shape[2] - x.shape[2]
            to_past = to_frames[:, :, before - past.shape[2] : before] if past is not None else None
            to_new = borders.fold(to_frames[:, :, before:])
            to_x, to_gamma = (to_new.to(x.dtype), None) if gamma is None else _norm_silu_backward(to_new, x, gamma)
        return to_x, to_past, to_gamma, to_weight, to_bias, None, None


def _conv_input(x: Tensor, past: Tensor | None, gamma: Tensor | None, dtype: torch.dtype, borders: Borders) -> Tensor:
    """[past | SiLU(norm(x))] with its halo; zero frames in front only where `_conv` wants them."""
    known = 0 if past is None else past.shape[2]
    before = known if _taps_apart(x) or x.shape[2] + known == 1 else 2
    rows, columns = borders.halo
    batch, channels, count, height, width = x.shape
    if not before and not rows and not columns and gamma is None and x.dtype == dtype:
        return x
    size = (batch, channels, before + count, height + 2 * rows, width + 2 * columns)
    frames = torch.empty(size, dtype=dtype, device=x.device, memory_format=torch.channels_last_3d)
    if past is not None:
        frames[:, :, before - known : before] = past
    frames[:, :, : before - known] = 0
    new = frames[:, :, before:]
    inside = borders.inside(new)
    if gamma is None:
        inside.copy_(x)
    elif dtype == _norm_dtype(x):
        torch.mul(x, _inverse_rms(x), out=inside)
        F.silu(inside.mul_(gamma), inplace=True)
    else:
        wide = x.to(_norm_dtype(x))
        inside.copy_(F.silu((wide * _inverse_rms(wide)).mul_(gamma), inplace=True))
    borders.fill(new)
    return frames


def _norm_silu_backward(grad: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of SiLU(x r gamma), r = sqrt(C) / |x|, for x and gamma."""
    wide = x.to(_norm_dtype(x))
    inverse = _inverse_rms(wide)
    unit = wide * inverse
    grad = torch.ops.aten.silu_backward(grad.to(wide.dtype), unit * gamma)
    product = grad * unit
    to_gamma = product.sum((0, 2, 3, 4), keepdim=True)[0]
    along = (product.mul_(gamma)).mean(1, keepdim=True)
    to_x = grad.mul_(gamma).sub_(unit.mul_(along)).mul_(inverse)
    return to_x.to(x.dtype), to_gamma.to(gamma.dtype)


def _taps_apart(x: Tensor) -> bool:
    """Whether `_conv` takes the kernel's time taps one by one: as fast as conv3d on CPUs, and it can skip some."""
    return x.device.type in ("cpu", "meta")


def _conv(frames: Tensor, count: int, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> Tensor:
    """The last `count` outputs of a causal convolution over `frames`; what is missing in front counts as zero."""
    if not _taps_apart(frames):
        return F.conv3d(frames, weight[:, :, -frames.shape[2] :], bias, padding=(0, *padding))
    clips = [_conv_taps(clip.transpose(0, 1), count, weight, bias, padding) for clip in frames]
    return _stack(clips)


def _conv_taps(frames: Tensor, count: int, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> Tensor:
    """`_conv` of one clip [T, C, H, W], tap by tap."""
    out = F.conv2d(frames[-count:], weight[:, :, -1], bias, padding=padding)
    for tap, first, source in _taps(len(frames), count, weight.shape[2]):
        out[first:] += F.conv2d(frames[source], weight[:, :, tap], padding=padding)
    return out


def _taps(known: int, count: int, kernel: int) -> Iterator[tuple[int, int, slice]]:
    """Taps that look back: their number, the first of `count` outputs that they reach, and the frames they read."""
    before = known - count
    for back in range(1, kernel):
        first = max(0, back - before)
        if first < count:
            yield kernel - 1 - back, first, slice(before + first - back, before + count - back)


def _conv_backward(
    grad: Tensor, frames: Tensor, count: int, weight: Tensor, padding: tuple[int, int], mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `_conv` for frames, weight and bias; None where `mask` does not ask."""
    if not _taps_apart(frames):
        used = weight[:, :, -frames.shape[2] :]
        to_frames, to_used, to_bias = _convolution_backward(grad, frames, used, (0, *padding), mask)
        if to_used is not None and used.shape != weight.shape:
            to_used = F.pad(to_used, (0, 0, 0, 0, weight.shape[2] - used.shape[2], 0))
        return to_frames, to_used, to_bias
    grads = [
        _conv_taps_backward(g.transpose(0, 1), f.transpose(0, 1), count, weight, padding, mask)
        for g, f in zip(grad, frames, strict=True)
    ]
    to_frames, to_weight, to_bias = zip(*grads, strict=True)
    return (
        _stack(to_frames) if mask[0] else None,
        torch.stack(to_weight).sum(0) if mask[1] else None,
        torch.stack(to_bias).sum(0) if mask[2] else None,
    )


def _conv_taps_backward(
    grad: Tensor, frames: Tensor, count: int, weight: Tensor, padding: tuple[int, int], mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    to_frames = torch.zeros_like(frames) if mask[0] else None
    to_weight = torch.zeros_like(weight) if mask[1] else None
    last = weight.shape[2] - 1
    to_bias = None
    for tap, first, source in [(last, 0, slice(len(frames) - count, None)), *_taps(len(frames), count, last + 1)]:
        asked = (mask[0], mask[1], mask[2] and tap == last)
        inner, kernel, bias = _convolution_backward(grad[first:], frames[source], weight[:, :, tap], padding, asked)
        if mask[0]:
            to_frames[source] += inner
        if mask[1]:
            to_weight[:, :, tap] = kernel
        to_bias = bias if tap == last else to_bias
    return to_frames, to_weight, to_bias


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, ...], mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    ones = [1] * len(padding)
    nothing = [0] * len(padding)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], ones, padding, ones, False, nothing, 1, mask
    )


def _stack(clips: Sequence[Tensor]) -> Tensor:
    """[T, C, H, W] of each clip -> [B, C, T, H, W], both channels last."""
    if len(clips) == 1:
        return clips[0].transpose(0, 1)[None]
    count, channels, height, width = clips[0].shape
    out = clips[0].new_empty((len(clips), count, height, width, channels)).permute(0, 4, 1, 2, 3)
    for whole, clip in zip(out, clips, strict=True):
        whole.copy_(clip.transpose(0, 1))
    return out
