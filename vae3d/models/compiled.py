"""torch.compile in place, block by block: no wrapper, and so no `_orig_mod.` in state-dict keys.

Compiling the module around a VAE does nothing where its `encode` and `decode` are called instead of its `forward`.
"""

from __future__ import annotations

import torch
from torch import nn

from vae3d.errors import UserError
from vae3d.models.diffusers_vae import DiffusersVAE
from vae3d.models.layers import taehv_blocks, wan_blocks
from vae3d.models.spatial import Level, MidBlock
from vae3d.models.taehv import TAEHV
from vae3d.models.temporal import ResBlock
from vae3d.models.wan import WanVAE
from vae3d.precision import no_tf32

# Blocks that gradient checkpointing recomputes, or parts of them. The last layer is in none: an adaptive weight needs
# its gradient alone, and a compiled graph computes all gradients or none.
BLOCKS = (
    Level,
    MidBlock,
    ResBlock,
    wan_blocks.ResidualBlock,
    wan_blocks.AttentionBlock,
    wan_blocks.Downsample,
    wan_blocks.Upsample,
    taehv_blocks.MemBlock,
    taehv_blocks.UpConv,
)
BACKEND = "inductor"
RECOMPILE_LIMIT = 64  # graphs per class of blocks: one per shape, with and without gradients


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BLOCKS)]


def compile_blocks(model: nn.Module, dynamic: bool | None = False) -> None:
    """Compile every block of a model at its first call. dynamic: see torch.compile.

    Equal blocks share a graph, compilation takes seconds instead of minutes, and gradient checkpointing still works.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)  # beyond it blocks would run uncompiled
    with no_tf32():  # sets torch's precision flags as validation will, which would recompile everything otherwise
        pass
    for block in blocks_of(model):
        block.compile(backend=BACKEND, dynamic=dynamic)


def compile_steps(model: nn.Module) -> None:
    """Compile encode_chunk and decode_chunk, or else forward, per shape. Only a video's first and last chunk differ.

    Raises UserError for a model that torch.compile would leave as it is.
    """
    if isinstance(model, DiffusersVAE) and model.circular:
        raise UserError("compile=true: a DiffusersVAE with pad_w=circular is not compiled; use compile=false")
    if isinstance(model, WanVAE | TAEHV):
        model.encode_chunk = torch.compile(model.encode_chunk, dynamic=False)
        model.decode_chunk = torch.compile(model.decode_chunk, dynamic=False)
    else:
        model.compile(dynamic=False)
