"""The diffusion transformer of Wan2.1 (arXiv 2503.20314), by diffusers, conditioned on a class instead of text."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from vae3d.arguments import Classes, Factor, Range, Width, check_arguments
from vae3d.diffusion.layers import class_ids, from_diffusers, head_dim, infer_patch, zero_module
from vae3d.models.layers.frames import pad_space

GATES = (2, 5)  # of a block's six modulations: gates of attention and MLP


class WanTransformer(nn.Module):
    """Latents [B, C, t, h, w], timesteps [B] in [0, 1000] and labels -> [B, C, t, h, w], for any t, h and w.

    Settings as in transformer.VideoTransformer. The class embedding takes the place of the text, as its only token.
    The output is zero at initialisation, and every block is the identity.
    Raises ValueError for settings that do not fit each other, UserError without diffusers.
    """

    infer_defaults = staticmethod(infer_patch)

    @check_arguments
    def __init__(
        self,
        channels: Width,
        *,
        learned_sigma: bool = False,
        num_classes: Classes = 0,
        width: Width = 384,
        depth: Annotated[int, Range(1, 128)] = 12,
        heads: Annotated[int, Range(1, 1024)] = 6,
        patch: Factor = 2,
        mlp_ratio: Annotated[float, Range(0.01, 64)] = 4.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        head_channels = head_dim(width, heads)
        self.channels, self.learned_sigma, self.num_classes = channels, learned_sigma, num_classes
        self.patch = patch
        self.tokens = nn.Embedding(num_classes + 1, width)  # the last is the null class
        self.wan = from_diffusers("WanTransformer3DModel")(
            patch_size=(1, patch, patch),
            num_attention_heads=heads,
            attention_head_dim=head_channels,
            in_channels=channels,
            out_channels=channels * (2 if learned_sigma else 1),
            text_dim=width,
            ffn_dim=int(width * mlp_ratio),
            num_layers=depth,
        )
        if gradient_checkpointing:
            self.wan.enable_gradient_checkpointing()
        self._zero_outputs()

    def forward(self, z: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """Raises ValueError as class_ids does."""
        ids = class_ids(labels, len(z), self.num_classes, z.device)
        text = self.tokens(torch.zeros(len(z), dtype=torch.long, device=z.device) if ids is None else ids)
        output = self.wan(pad_space(z, self.patch), time, text[:, None], return_dict=False)[0]
        return output[..., : z.shape[-2], : z.shape[-1]]

    @torch.no_grad()
    def _zero_outputs(self) -> None:
        time = self.wan.condition_embedder.time_proj  # all blocks add its gates to their own
        for part in (time.weight, time.bias):
            part.unflatten(0, (6, -1))[list(GATES)] = 0
        for block in self.wan.blocks:
            block.scale_shift_table[:, list(GATES)] = 0
            zero_module(block.attn2.to_out[0])
        zero_module(self.wan.proj_out)
