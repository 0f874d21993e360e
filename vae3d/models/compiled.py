"""torch.compile of what really runs, in place: no wrapper, and no `_orig_mod.` in the keys of weights.

A published trainer compiled the module around its VAE and then called that module's `encode` and `decode`, so that not
one graph was compiled.
"""

from __future__ import annotations

import torch
from torch import nn

from vae3d.models.layers import taehv_blocks, wan_blocks
from vae3d.models.spatial import Level, MidBlock
from vae3d.models.taehv import TAEHV
from vae3d.models.temporal import ResBlock
from vae3d.models.wan import WanVAE
from vae3d.precision import no_tf32

# What gradient checkpointing recomputes, or parts of it. The last layer is in none: an adaptive weight asks for its
# gradient alone, and a compiled graph gives all gradients or none.
BLOCKS = (
    *(Level, MidBlock),
    ResBlock,
    *(wan_blocks.ResidualBlock, wan_blocks.AttentionBlock, wan_blocks.Downsample, wan_blocks.Upsample),
    *(taehv_blocks.MemBlockBase, taehv_blocks.UpConv),
)
BACKEND = "inductor"
GRAPHS = 64  # of one class of blocks: of each shape, with and without gradients


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BLOCKS)]


def compile_blocks(model: nn.Module, dynamic: bool | None = False) -> None:
    """Let every block of a model compile when it is first called. dynamic: as torch.compile takes it.

    Block by block, not the whole: equal blocks share a graph, compilation takes seconds instead of minutes, and memory
    stays what gradient checkpointing makes it.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS)  # beyond it blocks would run uncompiled
    with no_tf32():  # leaves torch's flags of precision as validations will; everything would compile again otherwise
        pass
    for block in blocks_of(model):
        block.compile(backend=BACKEND, dynamic=dynamic)


def compile_steps(model: nn.Module) -> None:
    """Compile what inference calls, per shape: the length of chunks changes at the two ends of a video only."""
    if isinstance(model, WanVAE | TAEHV):
        model.encode_chunk = torch.compile(model.encode_chunk, dynamic=False)
        model.decode_chunk = torch.compile(model.decode_chunk, dynamic=False)
    else:
        model.compile(dynamic=False)
