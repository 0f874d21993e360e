"""GroupNorm followed by SiLU, which precede the convolutions of the 2D and temporal VAEs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """SiLU(norm(x)), computed in fp32 and returned in x's dtype.

    Backward recomputes it from x, which the residual branch keeps anyway. So autograd saves two tensors per convolution
    (norm input, convolution input) instead of three, and none in fp32.
    """
    if torch.compiler.is_compiling():  # the compiler decides what to recompute
        return _norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    if x.is_meta:  # only shapes and gradients count; group_norm's meta kernel is a slow decomposition
        shape = (-1,) + (1,) * (x.ndim - 2)
        return (x * norm.weight.view(shape) + norm.bias.view(shape)).to(x.dtype)
    return _NormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def _norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return F.silu(F.group_norm(x.float(), groups, weight.float(), bias.float(), eps)).to(x.dtype)


class _NormSiLU(torch.autograd.Function):
    """As torch.utils.checkpoint of _norm_silu, with a third of its overhead; there are hundreds of calls per step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.groups, ctx.eps = groups, eps
        return _norm_silu(x, weight, bias, groups, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_grad = ctx.needs_input_grad[:3]
        with torch.enable_grad():
            inputs = [
                t.detach().requires_grad_(needed) for t, needed in zip(ctx.saved_tensors, needs_grad, strict=True)
            ]
            out = _norm_silu(*inputs, ctx.groups, ctx.eps)
            grads = iter(torch.autograd.grad(out, [t for t in inputs if t.requires_grad], grad))
        return *(next(grads) if needed else None for needed in needs_grad), None, None
