"""GroupNorm followed by SiLU, the pair in front of every convolution of these networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """SiLU(norm(x)), computed in fp32 and returned in x's dtype.

    Backward recomputes it from x, which the residual branch keeps anyway: of the three tensors that autograd
    would save per convolution (norm input, SiLU input, convolution input) only two remain, none in fp32.
    """
    if torch.compiler.is_compiling():  # the compiler decides for itself what to recompute
        return _norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    if x.is_meta:  # a dry run needs shapes and gradients only; group_norm's meta kernel is a slow decomposition
        shape = (-1,) + (1,) * (x.ndim - 2)
        return (x * norm.weight.view(shape) + norm.bias.view(shape)).to(x.dtype)
    return _NormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def _norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return F.silu(F.group_norm(x.float(), groups, weight.float(), bias.float(), eps)).to(x.dtype)


class _NormSiLU(torch.autograd.Function):
    """torch.utils.checkpoint of _norm_silu at a third of its overhead, which counts at some hundred calls a step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.groups, ctx.eps = groups, eps
        return _norm_silu(x, weight, bias, groups, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:3]
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_(want) for t, want in zip(ctx.saved_tensors, wanted, strict=True)]
            out = _norm_silu(*inputs, ctx.groups, ctx.eps)
            grads = iter(torch.autograd.grad(out, [t for t in inputs if t.requires_grad], grad))
        return *(next(grads) if want else None for want in wanted), None, None
