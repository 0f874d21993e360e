"""GroupNorm followed by SiLU, the pair in front of every convolution of these networks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.models.layers.checkpointing import needs_grad, run
from vae3d.precision import full_precision


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """SiLU(norm(x)), computed in fp32 and returned in x's dtype.

    Backward recomputes it from x, which the residual branch keeps anyway: of the three tensors that autograd
    would save per convolution (norm input, SiLU input, convolution input) only two remain, none in fp32.
    """
    return run(_norm_silu, norm, x, recompute=needs_grad(norm, x))


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    with full_precision(x.device):
        y = F.group_norm(x.float(), norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)
        return F.silu(y).to(x.dtype)
