"""A small diffusion transformer on the latents of images and videos.

adaLN-zero: Peebles and Xie, arXiv 2212.09748. Factorised attention: Latte, arXiv 2401.03048, variant 1. Rotary
positions: RoFormer, arXiv 2104.09864, here over three axes, at the base that arXiv 2403.13298 uses for pictures.
Normalised queries and keys: arXiv 2302.05442. Written from the papers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae3d.arguments import Classes, Factor, Range, Width, check_arguments
from vae3d.diffusion.conditioning import class_ids
from vae3d.diffusion.layers import head_width, zeroed
from vae3d.models.layers.checkpointing import maybe_checkpoint
from vae3d.models.layers.frames import pad_space

ROPE_BASE = 100.0
FREQUENCIES = 128  # of the embedding of the time
COARSE = 16  # latents whose shorter side is at least this are cut into 2 x 2 patches

# Tokens [b, t, s, heads, d] (frames x places) as the sequences that attend among themselves.
SEQUENCES = {"full": "b heads (t s) d", "space": "(b t) heads s d", "time": "(b s) heads t d"}
ATTENTIONS = {"full": ("full",), "factorised": ("space", "time")}


class VideoTransformer(nn.Module):
    """Latents [B, C, t, h, w], times [B] in [0, 1000] and labels -> [B, C, t, h, w], for any t, h and w.

    channels: of the latents; learned_sigma doubles those of the output, the second half being variances.
    num_classes: 0, or the number of classes, beside which there is the null class: labels=None.
    patch: side of the patches that become tokens. attention: full, of all tokens among each other; or factorised, one
    block within the frames and the next along the time, by turns.
    The output is zero at the start, and every block passes its input on.
    Sides that are no multiple of `patch` are extended by repeating their edge, and the output is cut back.
    Raises ValueError for settings that do not fit each other.
    """

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
        among = ATTENTIONS[attention]
        if depth % len(among):
            raise ValueError(f"depth is {depth}; factorised attention takes an even number of blocks")
        self.head_channels = head_width(width, heads)
        self.channels, self.learned_sigma, self.num_classes = channels, learned_sigma, num_classes
        self.patch, self.head_channels, self.gradient_checkpointing = (
            patch,
            head_width(width, heads),
            gradient_checkpointing,
        )
        self.embed = nn.Linear(channels * patch**2, width)
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_classes + 1, width) if num_classes else None
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=0.02)  # of the size of the time's embedding, not above it
        hidden = int(width * mlp_ratio)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, among[i % len(among)]) for i in range(depth))
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.output = zeroed(nn.Linear(width, channels * patch**2 * (2 if learned_sigma else 1)))

    def forward(self, z: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """Raises ValueError as class_ids does."""
        height, width = z.shape[-2:]
        p = self.patch
        patches = rearrange(pad_space(z, p), "b c t (h p) (w q) -> b t h w (c p q)", p=p, q=p)
        t, h, w = patches.shape[1:4]
        x = self.embed(patches.flatten(2, 3))  # [B, t, h w, width]
        condition = F.silu(self._condition(time, class_ids(labels, len(z), self.num_classes, z.device)))
        x = x + places(t, h, w, x.shape[-1], z.device)  # in fp32, as are all sums from here on, also under autocast
        angles = rope_angles(t, h, w, self.head_channels, z.device)
        for block in self.blocks:
            x = maybe_checkpoint(block, x, condition, angles, enabled=self.gradient_checkpointing)
        shift, scale = self.modulation(condition)[:, None, None].chunk(2, -1)
        x = self.output(self.norm(x) * (1 + scale) + shift)
        x = rearrange(x, "b t (h w) (c p q) -> b c t (h p) (w q)", h=h, p=p, q=p)
        return x[..., :height, :width]

    def _condition(self, time: Tensor, ids: Tensor | None) -> Tensor:
        """[B, width], of the time in sines and cosines (Vaswani et al., section 3.5) and of the class."""
        rates = torch.exp(torch.arange(FREQUENCIES, device=time.device) * (-math.log(10000.0) / FREQUENCIES))
        phases = time.float()[:, None] * rates
        waves = torch.cat([phases.cos(), phases.sin()], 1)
        condition = self.time(waves.to(self.embed.weight.dtype))
        return condition if ids is None else condition + self.classes(ids)


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm that the condition scales and shifts, and a gate that is zero at
    the start (arXiv 2212.09748, figure 3)."""

    def __init__(self, width: int, heads: int, hidden: int, among: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(width, 6 * width))
        self.attention = Attention(width, heads, among)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))

    def forward(self, x: Tensor, condition: Tensor, angles: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition)[:, None, None].chunk(6, -1)
        x = x + gate_a * self.attention(self.norm(x) * (1 + scale_a) + shift_a, angles)
        return x + gate_m * self.mlp(self.norm(x) * (1 + scale_m) + shift_m)


class Attention(nn.Module):
    """Of tokens [B, t, s, width] among all (full), those of their frame (space) or of their place (time)."""

    def __init__(self, width: int, heads: int, among: str) -> None:
        super().__init__()
        self.heads, self.sequences = heads, SEQUENCES[among]
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        t, s = x.shape[1:3]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(3)
        q, k = (rotated(norm(y.float()), angles).to(v.dtype) for norm, y in ((self.norm_q, q), (self.norm_k, k)))
        q, k, v = (rearrange(y, f"b t s heads d -> {self.sequences}") for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(y, f"{self.sequences} -> b t s (heads d)", t=t, s=s))


def rope_angles(t: int, h: int, w: int, channels: int, device: torch.device | str = "cpu") -> Tensor:
    """[t, h w, channels / 2]: by how much each pair of channels of a token turns. A third of the pairs follows the row,
    a third the column, and the rest the frame."""
    pairs = channels // 2
    shares = pairs - 2 * (pairs // 3), pairs // 3, pairs // 3
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in (t, h, w)), indexing="ij")
    turns = [
        axis[..., None] * ROPE_BASE ** (-torch.arange(share, device=device) / share)
        for axis, share in zip(axes, shares, strict=True)
    ]
    return torch.cat(turns, -1).flatten(1, 2)


def places(t: int, h: int, w: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """[t, h w, width]: where each token is, in cosines and sines, as in arXiv 2212.09748 and 2401.03048. Rotary
    positions alone tell how far apart tokens are; where the picture ends, small networks take long to learn from that.
    """
    angles = rope_angles(t, h, w, width, device)
    return torch.cat([angles.cos(), angles.sin()], -1)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """[B, t, s, heads, d], channels i and i + d/2 turned together by angles [t, s, d/2]."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def fitted(config: Mapping[str, Any], latent_shape: Sequence[int]) -> dict[str, Any]:
    """The configuration with the patch chosen for latents [C, t, h, w], where it leaves it open."""
    return {**config, "patch": config.get("patch") or (2 if min(latent_shape[2:]) >= COARSE else 1)}
