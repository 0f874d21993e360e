"""The VAE of Open-Sora 1.3: a 3D network of its own, 4 x 8 x 8, causal but for its norms.

`opensora/models/vae_v1_3` of hpcaitech/Open-Sora (branch opensora/v1.3, OpenSoraVAE_V1_3), after
bornfly-detachment/asymmetric_magvitv2. State-dict keys are the published ones. x: [B, C, T, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae3d.arguments import (
    Count,
    Depth,
    Deviation,
    Factors,
    Flags,
    Mean,
    Width,
    check_arguments,
    check_level_boundaries,
)
from vae3d.models.interface import VideoAutoencoder, choose_latents
from vae3d.models.layers.checkpointing import maybe_checkpoint, needs_grad
from vae3d.models.layers.frames import clips_of, extend_time, frames_of, pad_space
from vae3d.models.layers.norm import norm_silu
from vae3d.models.spatial import Downsample, Upsample
from vae3d.models.tiling import code_in_tiles
from vae3d.pixels import check_latents, check_video
from vae3d.seeding import Generators
from vae3d.types import LatentSpec, Posterior, Reconstruction, cat_posteriors

EPS = 1e-6  # of norms, but for those of Growth


class OpenSoraV13VAE(VideoAutoencoder):
    """The VAE of Open-Sora 1.3; a VideoAutoencoder.

    channels, multipliers: width of each level. downsample: which level boundaries halve the frame rate; each halves
    height and width. layers: residual blocks of a level.
    micro_frames: code the clip in chunks of 1 + n * time_stride frames; None: as a whole. Each chunk starts with the
    last frame of the one before, and the two reconstructions of that frame are averaged: of 17 frames, as the diffusion
    model was trained, 33 frames are 10 latents. The results differ from the whole clip's, since norms pool over time.
    latents_mean, latents_std: per channel, for `normalize`; None: 0 and 1. encode and decode use raw latents.
    gradient_checkpointing: recompute each block in backward.

    The network takes 1 + n * time_stride frames; clips are extended by their last frame.
    Raises ValueError if the lists do not fit together, or micro_frames is no such number above 1.
    """

    whole_frames = "GroupNorm and attention"

    @check_arguments
    def __init__(
        self,
        *,
        channels: Width = 128,
        multipliers: Factors = (1, 2, 4, 4),
        downsample: Flags = (False, True, True),
        layers: Depth = 2,
        latent_channels: Width = 16,
        groups: Width = 32,
        micro_frames: Count | None = 17,
        latents_mean: Sequence[Mean] | None = None,
        latents_std: Sequence[Deviation] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_level_boundaries(multipliers, downsample)
        widths = [channels * m for m in multipliers]
        if any(width % groups for width in [channels, *widths]):
            raise ValueError(f"channels * multipliers are {widths}; each must be a multiple of groups={groups}")
        time = list(downsample)
        stride = 2 ** sum(time)
        if micro_frames is not None and (micro_frames < 2 or (micro_frames - 1) % stride):
            raise ValueError(f"micro_frames is {micro_frames}; give null or 1 + n * {stride}")
        self.encoder = Encoder(channels, widths, time, layers, 2 * latent_channels, groups)
        self.decoder = Decoder(widths, time, layers, latent_channels, groups)
        self.micro_frames = micro_frames
        self.gradient_checkpointing = gradient_checkpointing
        self.spec = LatentSpec(
            latent_channels,
            stride,
            2 ** len(time),
            causal=False,
            **self.register_latent_stats(latents_mean, latents_std, latent_channels),
        )

    def encode(self, video: Tensor) -> Posterior:
        """[B, 3, T, H, W] -> posterior over raw latents."""
        check_video(video)
        video = pad_space(video, self.spec.space_stride)
        chunks = self.chunks(video.shape[2])
        return cat_posteriors([self.encode_chunk(video[:, :, start:end]) for start, end in chunks])

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Raw latents [B, C, t, h, w] -> video, not clamped. num_frames: by default all that the latents hold."""
        check_latents(z, self.spec.channels)
        stride, count = self.spec.time_stride, z.shape[2]
        size = count if self.micro_frames is None else self.latent_frames(self.micro_frames)
        parts = z.split(size, 2)
        longest = 1 + stride * (count - len(parts))
        frames = longest if num_frames is None else num_frames
        self.check_frames(frames, count)
        video: list[Tensor] = []
        for part in parts:
            chunk = self.decode_chunk(part)
            if video:
                last = 0.5 * (video[-1][:, :, -1:] + chunk[:, :, :1])
                video[-1] = video[-1][:, :, :-1]
                chunk = torch.cat([last, chunk[:, :, 1:]], 2)
            video.append(chunk)
        return torch.cat(video, 2)[:, :, :frames]

    def encode_chunk(self, video: Tensor) -> Posterior:
        """As encode, of any number of frames without chunks. Sides must be multiples of the space stride."""
        frames = video.shape[2] + -(video.shape[2] - 1) % self.spec.time_stride
        x = extend_time(video, frames).to(self.decoder.conv_out.weight.dtype)
        if self.tiling is None:
            return self._encode(x)
        return code_in_tiles(self.tiling, lambda x, _: (self._encode(x), None), x, None, self.spec.space_stride)[0]

    def decode_chunk(self, z: Tensor) -> Tensor:
        """As decode, without chunks."""
        z = z.to(self.decoder.conv_out.weight.dtype)
        if self.tiling is None:
            return self._decode(z)
        return self.tiling("decoder", lambda z, _: (self._decode(z), None), z, None, 1, self.spec.space_stride)[0]

    def _encode(self, x: Tensor) -> Posterior:
        return Posterior.from_moments(self.encoder(x, self.gradient_checkpointing and needs_grad(self.encoder, x)))

    def _decode(self, z: Tensor) -> Tensor:
        video = self.decoder(z, self.gradient_checkpointing and needs_grad(self.decoder, z))
        return video[:, :, self.spec.time_stride - 1 :]

    def chunks(self, frames: int) -> list[tuple[int, int]]:
        """First frame, and one after the last, of each chunk of a clip."""
        step = frames if self.micro_frames is None else self.micro_frames - 1
        return [(start, min(start + step + 1, frames)) for start in range(0, max(frames - 1, 1), step)]

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        return {"encoder": [self.encoder], "decoder": [self.decoder]}

    def last_layers(self) -> list[nn.Parameter]:
        return [self.decoder.conv_out.weight]

    def frames_valid(self, frames: int) -> bool:
        return frames >= 1 and (frames - 1) % self.spec.time_stride == 0

    def latent_frames(self, frames: int) -> int:
        return sum(1 + -(-(end - start - 1) // self.spec.time_stride) for start, end in self.chunks(frames))

    def chunk_steps(self) -> list[tuple[nn.Module, str]]:
        return [(self, "encode_chunk"), (self, "decode_chunk")]

    def stream(self, height: int, width: int, memory_gib: float | None = None) -> OverlappingChunks:
        """Chunks of micro_frames; without micro_frames the whole video."""
        return OverlappingChunks(self)


class OverlappingChunks:
    """Codes a video in the chunks of OpenSoraV13VAE, which share a frame; equal to coding it whole."""

    lookahead = 1

    def __init__(self, model: OpenSoraV13VAE) -> None:
        self.model = model
        self._last: Tensor | None = None  # the shared frame, as the chunk before reconstructs it
        self._lengths: list[int] = []

    def chunks(self, frames: int) -> list[int]:
        """All chunks but the last leave their last frame to the next."""
        lengths = [end - start - 1 for start, end in self.model.chunks(frames)]
        lengths[-1] += 1
        self._last, self._lengths = None, list(lengths)
        return lengths

    def __call__(self, video: Tensor, *, sample: bool = False, generator: Generators = None) -> Reconstruction:
        model, (height, width) = self.model, video.shape[-2:]
        frames = self._lengths.pop(0)
        posterior = model.encode_chunk(pad_space(video, model.spec.space_stride))
        z = choose_latents(posterior, None, sample, generator)
        rec = model.decode_chunk(z)[:, :, : video.shape[2]]
        if self._last is not None:
            rec = torch.cat([0.5 * (self._last + rec[:, :, :1]), rec[:, :, 1:]], 2)
        self._last = rec[:, :, -1:]
        return Reconstruction(rec[:, :, :frames, :height, :width], posterior, z)


class CausalConv3d(nn.Module):
    """Conv3d with zeros around each frame and, as many as it looks back, before the first."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.padding = (kernel // 2,) * 4 + (kernel - 1, 0)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding) if any(self.padding) else x)


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=EPS)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=EPS)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        self.nin_shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.conv2(norm_silu(self.norm2, h))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """Single-head attention over the positions of the clip, each to those before it in raster order."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.q, self.k, self.v, self.proj_out = (CausalConv3d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(part(h), "b c t h w -> b 1 (t h w) c").contiguous() for part in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        time, height = x.shape[2:4]
        return x + self.proj_out(rearrange(h, "b 1 (t h w) c -> b c t h w", t=time, h=height))


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = Attention(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor, recompute: bool) -> Tensor:
        for block in (self.block_1, self.attn_1, self.block_2):
            x = maybe_checkpoint(block, x, enabled=recompute)
        return x


class SpatialDownsample(Downsample):
    """Halve height and width of every frame."""

    def forward(self, x: Tensor) -> Tensor:
        return clips_of(super().forward(frames_of(x)), len(x))


class SpatialUpsample(Upsample):
    """Double height and width of every frame."""

    def forward(self, x: Tensor) -> Tensor:
        return clips_of(super().forward(frames_of(x)), len(x))


class Growth(nn.Module):
    """Convolutions after the nearest-neighbour upsampling by two of time, height and width."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(channels, channels, 3)
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv2 = CausalConv3d(channels, channels, 3)
        self.norm2 = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu(self.norm1, self.conv1(x))
        return F.silu(self.norm2(self.conv2(h)) + x) + x


class SpaceTimeUpsample(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.conv3d = Growth(channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks, then a change of the resolution (key downsample or upsample) or none."""

    def __init__(self, blocks: Sequence[nn.Module], **resample: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x: Tensor, recompute: bool) -> Tensor:
        layers = [*self.block, *(module for name, module in self.named_children() if name != "block")]
        for layer in layers:
            x = maybe_checkpoint(layer, x, enabled=recompute)
        return x


class Encoder(nn.Module):
    """Video to moments. time: which level boundaries halve the frame rate."""

    def __init__(
        self, first: int, widths: Sequence[int], time: Sequence[bool], layers: int, out_channels: int, groups: int
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(3, first, 3)
        levels = []
        for level, (before, width) in enumerate(pairwise([first, *widths])):
            blocks = [ResBlock(channels, width, groups) for channels in [before, *[width] * (layers - 1)]]
            down = {}
            if level < len(time):
                down["downsample"] = SpaceTimeDownsample(width) if time[level] else SpatialDownsample(width)
            levels.append(Level(blocks, **down))
        self.down = nn.ModuleList(levels)
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = CausalConv3d(widths[-1], out_channels, 3)

    def forward(self, x: Tensor, recompute: bool) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x, recompute)
        return self.conv_out(norm_silu(self.norm_out, self.mid(x, recompute)))


class SpaceTimeDownsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Decoder(nn.Module):
    """Latents to video. Its levels are indexed as the encoder's, and run in reverse. widths, time: as the encoder's."""

    def __init__(self, widths: Sequence[int], time: Sequence[bool], layers: int, in_channels: int, groups: int) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, widths[-1], 3)
        self.mid = Middle(widths[-1], groups)
        levels = []
        for level, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            blocks = [ResBlock(channels, width, groups) for channels in [before, *[width] * layers]]
            up = {}
            if level > 0:
                up["upsample"] = SpaceTimeUpsample(width, groups) if time[level - 1] else SpatialUpsample(width)
            levels.append(Level(blocks, **up))
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=EPS)
        self.conv_out = nn.Conv3d(widths[0], 3, 3)

    def forward(self, z: Tensor, recompute: bool) -> Tensor:
        x = self.mid(self.conv_in(z), recompute)
        for level in reversed(self.up):
            x = level(x, recompute)
        return self.conv_out(F.pad(norm_silu(self.norm_out, x), (1, 1, 1, 1, 2, 0)))
