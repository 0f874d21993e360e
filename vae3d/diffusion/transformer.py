"""A small diffusion transformer on the latents of images and videos.

adaLN-zero: DiT, arXiv 2212.09748. Factorised attention: Latte, arXiv 2401.03048, variant 1. RoPE: arXiv 2104.09864,
over three axes, with the base for images of arXiv 2403.13298. Query-key normalisation: arXiv 2302.05442. Written from
the papers.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae3d.arguments import Classes, Factor, Range, Width, check_arguments
from vae3d.diffusion.layers import class_ids, head_dim, infer_patch, zero_module
from vae3d.models.layers.checkpointing import maybe_checkpoint
from vae3d.models.layers.frames import pad_space

ROPE_BASE = 100.0
FREQUENCIES = 128  # of the timestep embedding

# Tokens [b, t, s, heads, d] (frames x positions) -> sequences with attention within each.
SEQUENCES = {"full": "b heads (t s) d", "space": "(b t) heads s d", "time": "(b s) heads t d"}
ATTENTIONS = {"full": ("full",), "factorised": ("space", "time")}


class VideoTransformer(nn.Module):
    """Latents [B, C, t, h, w], timesteps [B] in [0, 1000] and labels -> [B, C, t, h, w], for any t, h and w.

    channels: of the latents. learned_sigma doubles the output channels; the second half are variances.
    num_classes: 0, or the number of classes; labels=None selects the null class.
    patch: side of the patches that become tokens. attention: full (among all tokens), or factorised (alternating blocks
    within frames and along time).
    The output is zero at initialisation, and every block is the identity.
    Sides that are not a multiple of `patch` are padded by repeating the edge; the output is cropped.
    Raises ValueError for settings that do not fit each other.
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
        attention: str = "full",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention is {attention!r}; use one of {', '.join(ATTENTIONS)}")
        axes = ATTENTIONS[attention]
        if depth % len(axes):
            raise ValueError(f"depth is {depth}; factorised attention needs an even number of blocks")
        self.channels, self.learned_sigma, self.num_classes = channels, learned_sigma, num_classes
        self.patch = patch
        self.head_dim = head_dim(width, heads)
        self.gradient_checkpointing = gradient_checkpointing
        self.embed = nn.Linear(channels * patch**2, width)
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_classes + 1, width) if num_classes else None
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=0.02)  # about as large as the timestep embedding
        hidden = int(width * mlp_ratio)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, axes[i % len(axes)]) for i in range(depth))
        self.modulation = zero_module(nn.Linear(width, 2 * width))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.output = zero_module(nn.Linear(width, channels * patch**2 * (2 if learned_sigma else 1)))

    def forward(self, z: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """Raises ValueError as class_ids does."""
        height, width = z.shape[-2:]
        p = self.patch
        patches = rearrange(pad_space(z, p), "b c t (h p) (w q) -> b t h w (c p q)", p=p, q=p)
        t, h, w = patches.shape[1:4]
        x = self.embed(patches.flatten(2, 3))  # [B, t, h w, width]
        condition = F.silu(self._condition(time, class_ids(labels, len(z), self.num_classes, z.device)))
        x = x + pos_embed(t, h, w, x.shape[-1], z.device)  # residual stream: fp32, also under autocast
        angles = rope_angles(t, h, w, self.head_dim, z.device)
        for block in self.blocks:
            x = maybe_checkpoint(block, x, condition, angles, enabled=self.gradient_checkpointing)
        shift, scale = self.modulation(condition)[:, None, None].chunk(2, -1)
        x = self.output(self.norm(x) * (1 + scale) + shift)
        x = rearrange(x, "b t (h w) (c p q) -> b c t (h p) (w q)", h=h, p=p, q=p)
        return x[..., :height, :width]

    def _condition(self, time: Tensor, ids: Tensor | None) -> Tensor:
        """[B, width]: sinusoidal timestep embedding (arXiv 1706.03762, section 3.5) plus class embedding."""
        frequencies = torch.exp(torch.arange(FREQUENCIES, device=time.device) * (-math.log(10000.0) / FREQUENCIES))
        phases = time.float()[:, None] * frequencies
        embedding = torch.cat([phases.cos(), phases.sin()], 1)
        condition = self.time(embedding.to(self.embed.weight.dtype))
        return condition if ids is None else condition + self.classes(ids)


class Block(nn.Module):
    """adaLN-zero block: attention and MLP with LayerNorms scaled and shifted by the condition, and gates that start at
    zero (arXiv 2212.09748, figure 3)."""

    def __init__(self, width: int, heads: int, hidden: int, axis: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = zero_module(nn.Linear(width, 6 * width))
        self.attention = Attention(width, heads, axis)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))

    def forward(self, x: Tensor, condition: Tensor, angles: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition)[:, None, None].chunk(6, -1)
        x = x + gate_a * self.attention(self.norm(x) * (1 + scale_a) + shift_a, angles)
        return x + gate_m * self.mlp(self.norm(x) * (1 + scale_m) + shift_m)


class Attention(nn.Module):
    """Self-attention of tokens [B, t, s, width]: among all (full), within a frame (space) or along time (time)."""

    def __init__(self, width: int, heads: int, axis: str) -> None:
        super().__init__()
        self.heads, self.sequences = heads, SEQUENCES[axis]
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        t, s = x.shape[1:3]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(3)
        q, k = (apply_rope(norm(y.float()), angles).to(v.dtype) for norm, y in ((self.norm_q, q), (self.norm_k, k)))
        q, k, v = (rearrange(y, f"b t s heads d -> {self.sequences}") for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(y, f"{self.sequences} -> b t s (heads d)", t=t, s=s))


def rope_angles(t: int, h: int, w: int, channels: int, device: torch.device | str = "cpu") -> Tensor:
    """Rotation angle of each channel pair of each token, [t, h w, channels / 2].

    A third of the pairs encodes the row, a third the column, and the rest the frame.
    """
    pairs = channels // 2
    pairs_per_axis = pairs - 2 * (pairs // 3), pairs // 3, pairs // 3
    positions = torch.meshgrid(*(torch.arange(n, device=device) for n in (t, h, w)), indexing="ij")
    angles = [
        position[..., None] * ROPE_BASE ** (-torch.arange(count, device=device) / count)
        for position, count in zip(positions, pairs_per_axis, strict=True)
    ]
    return torch.cat(angles, -1).flatten(1, 2)


def pos_embed(t: int, h: int, w: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Sinusoidal position embedding [t, h w, width] (arXiv 2212.09748 and 2401.03048).

    RoPE encodes only distances between tokens; small networks need long to infer from them where a frame ends.
    """
    angles = rope_angles(t, h, w, width, device)
    return torch.cat([angles.cos(), angles.sin()], -1)


def apply_rope(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channels i and i + d/2 of x [B, t, s, heads, d] by angles [t, s, d/2]."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
