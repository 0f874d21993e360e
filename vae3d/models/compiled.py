"""torch.compile in place, block by block: no wrapper, and so no `_orig_mod.` in state-dict keys.

Compiling the module around a VAE does nothing where its `encode` and `decode` are called instead of its `forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vae3d.errors import UserError
from vae3d.models import opensora_v1_3, taesd
from vae3d.models.diffusers_vae import DiffusersVAE
from vae3d.models.interface import VideoAutoencoder
from vae3d.models.layers import taehv_blocks, wan_blocks
from vae3d.models.spatial import Level, MidBlock
from vae3d.models.temporal import ResBlock
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
    taesd.Block,
    opensora_v1_3.ResBlock,
    opensora_v1_3.Growth,
)
BACKEND = "inductor"
RECOMPILE_LIMIT = 64  # graphs per class of blocks, or step: one per shape, with and without gradients


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BLOCKS)]


def compile_blocks(model: nn.Module, dynamic: bool | None = False) -> None:
    """Compile every block of a model at its first call (regional compilation). dynamic: see torch.compile.

    Equal blocks share a graph, compilation takes seconds instead of minutes, and gradient checkpointing still works.
    """
    _allow_graphs()
    for block in blocks_of(model):
        block.compile(backend=BACKEND, dynamic=dynamic)


def compile_steps(model: VideoAutoencoder) -> None:
    """Compile what streams call, for inference.

    The steps of WanVAE and TAEHV are compiled twice for a size of frames, without a cache and with one: streams that
    start afterwards have fixed_chunks. Other models code chunks of a fixed length and a rest: the second length of a
    part is compiled for any number of frames.
    Raises UserError for a model that torch.compile would leave as it is.
    """
    if isinstance(model, DiffusersVAE) and model.circular:
        raise UserError("compile=true: a DiffusersVAE with pad_w=circular is not compiled; use compile=false")
    _allow_graphs()
    for owner, name in model.chunk_steps():
        step = torch.compile(getattr(owner, name), backend=BACKEND, dynamic=False if model.cached_steps else None)
        setattr(owner, name, _in_one_layout(step))
    model.fixed_chunks = model.cached_steps


def _in_one_layout(step: Callable[..., Any]) -> Callable[..., Any]:
    """Give a step its first argument in one memory layout.

    A graph holds for certain strides only, and a chunk has those of the video that it is a view of.
    """

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        return step(x.clone(memory_format=layout), *args, **kwargs)

    return run


def _allow_graphs() -> None:
    config = torch._dynamo.config
    # Beyond it code would run uncompiled. Since torch 2.7 it is an alias of recompile_limit.
    config.cache_size_limit = max(config.cache_size_limit, RECOMPILE_LIMIT)
    with no_tf32():  # sets torch's precision flags as validation will, which would recompile everything otherwise
        pass
