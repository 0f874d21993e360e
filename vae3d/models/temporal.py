"""The temporal VAE of Open-Sora 1.2: compresses the 2D latents of a video four times along time.

`opensora/models/vae/vae_temporal.py` of hpcaitech/Open-Sora v1.2 (VAE_Temporal_SD), which follows the tokenizer of
MAGVIT-v2 (arXiv 2310.05737, appendix A.1) without codebook and spatial resampling. State-dict keys are the published
ones. x: 2D latents [B, C, T, h, w]; z: temporal latents [B, C', ceil(T/4), h, w].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae3d.arguments import Depth, Factors, Flags, Width, check_arguments, check_level_boundaries
from vae3d.models.layers.checkpointing import maybe_checkpoint, needs_grad
from vae3d.models.layers.linear_code import LOGVAR_START, cosines, set_linear_code
from vae3d.models.layers.norm import norm_silu
from vae3d.text import plural
from vae3d.types import Posterior


class CausalConv3d(nn.Module):
    """Conv3d over [B, C, T, H, W] with zeros before the first frame and around each frame.

    kernel - stride zero frames stand in front, so a stride-2 convolution turns 2n frames into n.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, time_stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        side = kernel // 2
        self.padding = (side, side, side, side, max(0, kernel - time_stride), 0)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=(time_stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding) if any(self.padding) else x)


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, bias=False)
        self.conv3 = CausalConv3d(in_channels, out_channels, 1, bias=False) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.conv2(norm_silu(self.norm2, h))
        return h + (x if self.conv3 is None else self.conv3(x))


def res_blocks(in_channels: int, out_channels: int, count: int, groups: int) -> nn.ModuleList:
    widths = [in_channels] + [out_channels] * count
    return nn.ModuleList(ResBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False))


class Encoder(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], down: Sequence[bool], layers: int, groups: int
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, widths[0], 3, bias=False)
        inputs = [widths[0], *widths[:-1]]
        self.block_res_blocks = nn.ModuleList(
            res_blocks(a, b, layers, groups) for a, b in zip(inputs, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, 3, time_stride=2) if halve else nn.Identity()
            for width, halve in zip(widths, down, strict=False)
        )
        self.res_blocks = res_blocks(widths[-1], widths[-1], layers, groups)
        self.norm1 = nn.GroupNorm(groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], out_channels, 1)

    def forward(self, x: Tensor, recompute: bool) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            for block in blocks:
                x = maybe_checkpoint(block, x, enabled=recompute)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        for block in self.res_blocks:
            x = maybe_checkpoint(block, x, enabled=recompute)
        return self.conv2(norm_silu(self.norm1, x))


class Decoder(nn.Module):
    """Mirror of the encoder. Its lists are indexed by level, so forward iterates over them in reverse."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], up: Sequence[bool], layers: int, groups: int
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(in_channels, widths[-1], 3)
        self.res_blocks = res_blocks(widths[-1], widths[-1], layers, groups)
        inputs = [*widths[1:], widths[-1]]
        self.block_res_blocks = nn.ModuleList(
            res_blocks(a, b, layers, groups) for a, b in zip(inputs, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width, 3) if double else nn.Identity()
            for width, double in zip(widths[1:], up, strict=True)
        )
        self.up = list(up)
        self.norm1 = nn.GroupNorm(groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], out_channels, 3)

    def forward(self, z: Tensor, recompute: bool) -> Tensor:
        x = self.conv1(z)
        for block in self.res_blocks:
            x = maybe_checkpoint(block, x, enabled=recompute)
        for level in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[level]:
                x = maybe_checkpoint(block, x, enabled=recompute)
            if level > 0 and self.up[level - 1]:
                x = self.conv_blocks[level - 1](x)
                x = rearrange(x, "b (c s) t h w -> b c (t s) h w", s=2)
        return self.conv_out(norm_silu(self.norm1, x))


class TemporalVAE(nn.Module):
    """2D latents [B, C, T, h, w] <-> posterior over [B, latent_channels, ceil(T / stride), h, w].

    Any T: encode adds zero frames in front until T is a multiple of `stride`, and decode drops as many. The
    convolutions are causal, but GroupNorm pools over time, so every latent depends on all frames of the clip.

    channels, multipliers: width of each level. downsample: which level boundaries halve the frame rate.
    shortcut: add a linear path beside each network, from the `stride` frames of a latent to the latent and back. It
    starts as a DCT over these frames, lowest frequencies first: the first in_channels latents are their mean, which of
    an image is the image's own latent. `stage.fit_shortcut` fits it to clips. Both networks start by adding nothing.
    Without a shortcut they must learn the identity first (compare those of DC-AE, arXiv 2410.10733, section 3.1).
    gradient_checkpointing: recompute each residual block in backward.
    Raises ValueError if the lists do not fit together or a width is not a multiple of `groups`.
    """

    @check_arguments
    def __init__(
        self,
        *,
        in_channels: Width = 4,
        latent_channels: Width = 4,
        channels: Width = 128,
        multipliers: Factors = (1, 2, 2, 4),
        downsample: Flags = (False, True, True),
        layers: Depth = 4,
        groups: Width = 32,
        gradient_checkpointing: bool = False,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        check_level_boundaries(multipliers, downsample)
        widths = [channels * m for m in multipliers]
        if any(width % groups for width in widths):
            raise ValueError(f"channels * multipliers are {widths}; each must be a multiple of groups={groups}")
        self.stride = 2 ** sum(downsample)
        self.encoder = Encoder(in_channels, 2 * latent_channels, widths, downsample, layers, groups)
        self.quant_conv = CausalConv3d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = CausalConv3d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(latent_channels, in_channels, widths, downsample, layers, groups)
        self.in_channels = in_channels
        self.latent_channels = latent_channels
        self.gradient_checkpointing = gradient_checkpointing
        self.shortcut = shortcut
        if shortcut:
            self.shortcut_in = nn.Conv3d(in_channels * self.stride, latent_channels, 1)
            self.shortcut_out = nn.Conv3d(latent_channels, in_channels * self.stride, 1)
            self._start_linear()

    def _start_linear(self) -> None:
        """The shortcuts as a DCT, and both networks adding nothing, with a small posterior variance."""
        for layer in (self.encoder.conv2, self.decoder.conv_out):
            nn.init.zeros_(layer.conv.weight)
            nn.init.zeros_(layer.conv.bias)
        nn.init.zeros_(self.quant_conv.conv.bias)
        nn.init.constant_(self.quant_conv.conv.bias[self.latent_channels :], LOGVAR_START)
        waves = torch.einsum("fs,cd->fcds", cosines(self.stride), torch.eye(self.in_channels)).flatten(2).flatten(0, 1)
        set_linear_code(self.shortcut_in, self.shortcut_out, waves / self.stride, waves.T)

    def latent_frames(self, frames: int) -> int:
        return -(-frames // self.stride)

    def encode(self, x: Tensor) -> Posterior:
        missing = -x.shape[2] % self.stride
        padded = F.pad(x, (0, 0, 0, 0, missing, 0)).to(self.quant_conv.conv.weight.dtype)
        recompute = self.gradient_checkpointing and needs_grad(self.encoder, padded)
        posterior = Posterior.from_moments(self.quant_conv(self.encoder(padded, recompute)))
        if self.shortcut:
            posterior.mean = posterior.mean + self.shortcut_in(self.frame_groups(x).to(padded.dtype))
        return posterior

    def frame_groups(self, x: Tensor) -> Tensor:
        """[B, C, T, h, w] -> [B, C * stride, ceil(T / stride), h, w], the first frame repeated in front as needed."""
        x = torch.cat([x[:, :, :1].expand(-1, -1, -x.shape[2] % self.stride, -1, -1), x], 2)
        return rearrange(x, "b c (t s) h w -> b (c s) t h w", s=self.stride)

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """num_frames: frames to return, by default `stride * t`. Raises ValueError if it does not fit the latents."""
        frames = self.stride * z.shape[2] if num_frames is None else num_frames
        if self.latent_frames(frames) != z.shape[2]:
            raise ValueError(
                f"num_frames is {frames}; {z.shape[2]} latent frames decode to "
                f"{self.stride * (z.shape[2] - 1) + 1} to {plural(self.stride * z.shape[2], 'frame')}"
            )
        z = z.to(self.post_quant_conv.conv.weight.dtype)
        h = self.post_quant_conv(z)
        x = self.decoder(h, self.gradient_checkpointing and needs_grad(self.decoder, h))
        if self.shortcut:
            x = x + rearrange(self.shortcut_out(z), "b (c s) t h w -> b c (t s) h w", s=self.stride)
        return x[:, :, -frames % self.stride :]
