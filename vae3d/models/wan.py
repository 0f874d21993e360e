"""The VAEs of Wan2.1 and Wan2.2: causal in time, 4 x 8 x 8 (4 x 16 x 16), one code path for clips and streams.

Wan report, arXiv 2503.20314, section 4.1; `wan/modules/vae.py` of Wan-Video/Wan2.1 and `vae2_2.py` of Wan-Video/Wan2.2,
whose state-dict keys and results these are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vae3d.arguments import Count, Depth, Deviation, Factor, Factors, Flags, Mean, Width, check_arguments
from vae3d.models.base import reconstruct
from vae3d.models.layers.borders import Borders
from vae3d.models.layers.checkpointing import needs_grad, run
from vae3d.models.layers.frames import extend_time, pad_space
from vae3d.models.layers.normalized import LatentNormMixin
from vae3d.models.layers.wan_blocks import (
    AttentionBlock,
    Conv,
    Downsample,
    Head,
    Past,
    ResidualBlock,
    Upsample,
    pointwise,
    run_chain,
)
from vae3d.models.layers.wan_shortcuts import DownBlock, UpBlock
from vae3d.models.streaming import CausalStream, chunk_lengths
from vae3d.pixels import check_latents, check_video
from vae3d.types import LatentSpec, Posterior, Reconstruction

DEFAULT_MEMORY = 8.0  # GiB
MOST_LATENTS = 8
Cache = Sequence[Past]  # frames between two chunks of a stream, of every layer


class Encoder(nn.Module):
    """Video (or patches) to moments. first: channels of the first convolution; widths: of each level; time: which level
    boundaries halve the frame rate."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        first: int,
        widths: Sequence[int],
        time: Sequence[bool],
        layers: int,
        shortcuts: bool,
        borders: Borders,
    ) -> None:
        super().__init__()
        self.conv1 = Conv(in_channels, first, borders)
        levels = []
        for level, (before, width) in enumerate(pairwise([first, *widths])):
            blocks = [ResidualBlock(a, width, borders) for a in [before, *[width] * (layers - 1)]]
            down = [Downsample(width, time[level], borders)] if level < len(time) else []
            levels += [DownBlock(before, width, blocks, down)] if shortcuts else blocks + down
        self.downsamples = nn.ModuleList(levels)
        self.middle = _middle(widths[-1], borders)
        self.head = Head(widths[-1], out_channels, borders)

    def chain(self) -> list[nn.Module]:
        return [self.conv1, *self.downsamples, *self.middle, self.head]


class Decoder(nn.Module):
    """Latents to video (or patches), the encoder's mirror; widths and time are in the encoder's order."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        time: Sequence[bool],
        layers: int,
        shortcuts: bool,
        borders: Borders,
    ) -> None:
        super().__init__()
        widths, time = widths[::-1], time[::-1]
        self.conv1 = Conv(in_channels, widths[0], borders)
        self.middle = _middle(widths[0], borders)
        levels = []
        before = widths[0]
        for level, width in enumerate(widths):
            blocks = [ResidualBlock(a, width, borders) for a in [before, *[width] * layers]]
            last = level == len(time)
            after = width if shortcuts else width // 2  # Wan2.1 halves the channels with the resolution
            up = [] if last else [Upsample(width, after, time[level], borders)]
            levels += [UpBlock(before, width, blocks, up)] if shortcuts else blocks + up
            before = after
        self.upsamples = nn.ModuleList(levels)
        self.head = Head(widths[-1], out_channels, borders)

    def chain(self) -> list[nn.Module]:
        return [self.conv1, *self.middle, *self.upsamples, self.head]


def _middle(width: int, borders: Borders) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(width, width, borders), AttentionBlock(width), ResidualBlock(width, width, borders)]
    )


class WanVAE(LatentNormMixin):
    """Wan2.1's (the defaults) or Wan2.2's VAE: a VideoAutoencoder.

    channels, multipliers: width of each level. downsample: which level boundaries halve the frame rate; each halves
    height and width. decoder_channels: Wan2.2's wider decoder. patch: Wan2.2 codes patches of 2 x 2 pixels.
    shortcuts: Wan2.2's averaging and repeating shortcuts around every level.
    pad_w, pad_h: see Borders; zeros is what the published weights were trained with, circular closes the seam of
    360 degree panoramas, with the same weights.
    latents_mean, latents_std: per channel, for `normalize`; encode and decode use raw latents.
    chunk_latents: code clips in chunks of so many latent frames, which changes memory, not results; None: at once.
    gradient_checkpointing: recompute each block in backward.

    Frames: the network takes 1 + n * time_stride; other clips are extended by repeating their last frame, and their
    reconstruction is cut to their length. Height and width are extended likewise to multiples of the space stride,
    but a circular width must be one.
    Raises ValueError if the lists do not fit together.
    """

    @check_arguments
    def __init__(
        self,
        *,
        channels: Width = 96,
        decoder_channels: Width | None = None,
        multipliers: Factors = (1, 2, 4, 4),
        downsample: Flags = (False, True, True),
        layers: Depth = 2,
        latent_channels: Width = 16,
        patch: Factor = 1,
        shortcuts: bool = False,
        pad_w: str = "zeros",
        pad_h: str = "zeros",
        latents_mean: Sequence[Mean] | None = None,
        latents_std: Sequence[Deviation] | None = None,
        chunk_latents: Count | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if len(downsample) != len(multipliers) - 1:
            raise ValueError(
                f"downsample has {len(downsample)} entries for {len(multipliers)} multipliers; "
                f"give one per level boundary, {len(multipliers) - 1}"
            )
        borders = Borders(pad_w, pad_h)
        time = list(downsample)
        pixels = 3 * patch**2
        widths = [channels * m for m in multipliers]
        self.encoder = Encoder(pixels, 2 * latent_channels, channels, widths, time, layers, shortcuts, borders)
        self.conv1 = nn.Conv3d(2 * latent_channels, 2 * latent_channels, 1)
        self.conv2 = nn.Conv3d(latent_channels, latent_channels, 1)
        wide = [(decoder_channels or channels) * m for m in multipliers]
        self.decoder = Decoder(latent_channels, pixels, wide, time, layers, shortcuts, borders)
        self.patch, self.borders = patch, borders
        self.chunk_latents, self.gradient_checkpointing = chunk_latents, gradient_checkpointing
        self.spec = LatentSpec(
            latent_channels,
            2 ** sum(time),
            patch * 2 ** len(time),
            causal=True,
            **self.register_latent_stats(latents_mean, latents_std, latent_channels),
        )

    def encode(self, video: Tensor) -> Posterior:
        """[B, 3, T, H, W] -> posterior over raw latents.

        Raises ValueError for a circular width that the space stride does not divide.
        """
        check_video(video)
        video = self._fit(video)
        moments = self._in_chunks(self._moments, video.split(self.chunks(video.shape[2]), 2), self.encoder)
        return Posterior.from_moments(moments)

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Raw latents [B, C, t, h, w] -> video, unclamped; num_frames: by default 1 + (t - 1) * time_stride.

        Raises ValueError if num_frames does not fit the latents.
        """
        check_latents(z, self.spec.channels)
        frames = 1 + (z.shape[2] - 1) * self.spec.time_stride if num_frames is None else num_frames
        if self.latent_frames(frames) != z.shape[2]:
            raise ValueError(f"num_frames is {frames}, which does not fit {z.shape[2]} latent frames")
        video = self._in_chunks(self._pixels, z.split(self.chunk_latents or z.shape[2], 2), self.decoder)
        return video[:, :, :frames]

    def encode_chunk(self, video: Tensor, cache: Cache | None) -> tuple[Posterior, Cache]:
        """Posterior of the next frames of a stream, and the cache for the chunk after them.

        video: 1 + n * time_stride frames in the first chunk of a stream, n * time_stride later, of sides that the space
        stride divides. cache: None for the first chunk; else what the chunk before returned, a list that is emptied
        while it is read, so that there are never two: pass tuple(cache) to go on from it more than once.
        Raises ValueError for another number of frames or another size.
        """
        self._check_chunk_length(video, first=cache is None)
        moments, cache = self._moments(video, cache, keep=True)
        return Posterior.from_moments(moments), list(cache)

    def decode_chunk(self, z: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Video of the next latents of a stream, unclamped, and the cache for the chunk after; see encode_chunk."""
        video, cache = self._pixels(z, cache, keep=True)
        return video, list(cache)

    def stream(self, height: int, width: int, memory_gib: float | None = None) -> CausalStream:
        """A stream of videos of this size: chunks of `chunk_latents`, or of as many latents as decode in `memory_gib`
        (in fp32; by default DEFAULT_MEMORY), but at most MOST_LATENTS.

        Raises ValueError for a circular width that the space stride does not divide.
        """
        self.require_closed_seam(width)
        chunk = self.chunk_latents
        if chunk is None:
            budget = (memory_gib or DEFAULT_MEMORY) * 2**30
            fitting = [k for k in range(1, MOST_LATENTS + 1) if self.chunk_memory(k, height, width) <= budget]
            chunk = max(fitting, default=1)
        return CausalStream(self, chunk)

    def chunk_memory(self, latents: int, height: int, width: int) -> int:
        """About how many bytes decoding a chunk takes in fp32, with the cache but without weights.

        The last level counts: some frames of it are in work, some in the cache.
        """
        fixed, each = (42, 30) if self.patch > 1 else (29, 20)
        channels = self.decoder.head["2"].in_channels / self.patch**2
        return int(4 * height * width * channels * (fixed + each * latents))

    def forward(self, video: Tensor, **how: Any) -> Reconstruction:
        """Reconstruct [B, 3, T, H, W]; see VideoAutoencoder.forward."""
        return reconstruct(self, video, **how)

    def _in_chunks(
        self, step: Callable[..., tuple[Tensor, Cache]], pieces: Sequence[Tensor], part: nn.Module
    ) -> Tensor:
        """Code the pieces of a clip one after another.

        With gradient checkpointing, one piece keeps the input of every block; several keep only the frames that they
        hand on, and run each piece once more in backward.
        """
        recompute = self.gradient_checkpointing and needs_grad(part, pieces[0])
        whole = len(pieces) == 1
        coded, cache = [], None
        for number, piece in enumerate(pieces):
            keep = number + 1 < len(pieces)
            chunk, cache = run(step, piece, cache, keep, recompute and whole, recompute=recompute and not whole)
            coded.append(chunk)
        return coded[0] if whole else torch.cat(coded, 2)

    def _moments(self, video: Tensor, cache: Cache | None, keep: bool, recompute: bool = False) -> tuple[Tensor, Cache]:
        x, cache = run_chain(self.encoder.chain(), self.to_patches(video), cache, keep, recompute)
        return self.to_moments(x), cache

    def _pixels(self, z: Tensor, cache: Cache | None, keep: bool, recompute: bool = False) -> tuple[Tensor, Cache]:
        x, cache = run_chain(self.decoder.chain(), self.from_latents(z), cache, keep, recompute)
        return self.from_patches(x), cache

    def to_patches(self, video: Tensor) -> Tensor:
        """What the encoder's chain takes."""
        video = video.to(self.conv1.weight.dtype)
        return rearrange(video, "b c t (h q) (w r) -> b (c r q) t h w", q=self.patch, r=self.patch)

    def to_moments(self, x: Tensor) -> Tensor:
        return pointwise(self.conv1, x)

    def from_latents(self, z: Tensor) -> Tensor:
        """What the decoder's chain takes."""
        return pointwise(self.conv2, z.to(self.conv2.weight.dtype))

    def from_patches(self, x: Tensor) -> Tensor:
        return rearrange(x, "b (c r q) t h w -> b c t (h q) (w r)", q=self.patch, r=self.patch)

    def _fit(self, video: Tensor) -> Tensor:
        """Extend a clip to what the network takes."""
        stride, space = self.spec.time_stride, self.spec.space_stride
        self.require_closed_seam(video.shape[-1])
        frames = video.shape[2]
        return pad_space(extend_time(video, frames + -(frames - 1) % stride), space)

    def require_closed_seam(self, width: int) -> None:
        """Raises ValueError for the width of a panorama to which columns would have to be added."""
        space = self.spec.space_stride
        if self.borders.width == "circular" and width % space:
            raise ValueError(
                f"the width is {width}; a circular width must be a multiple of {space}, since columns that "
                "are added would lie across the seam"
            )
        if self.borders.height == "pole" and width % (2 * space):
            raise ValueError(f"the width is {width}; pad_h=pole turns rows by half, so that 2 x {space} divides it")

    def _check_chunk_length(self, video: Tensor, first: bool) -> None:
        frames, height, width = video.shape[2:]
        stride, space = self.spec.time_stride, self.spec.space_stride
        if frames < 1 or (frames - first) % stride or height % space or width % space:
            wanted = f"1 + n * {stride}" if first else f"n * {stride}"
            raise ValueError(
                f"a chunk is {frames} frames of {height}x{width}; this one takes {wanted} frames of sides that "
                f"{space} divides"
            )

    def chunks(self, frames: int) -> list[int]:
        """Lengths of the pieces in which 1 + n * time_stride frames are coded."""
        if self.chunk_latents is None:
            return [frames]
        return chunk_lengths(frames, self.chunk_latents, self.spec.time_stride)

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        return {"encoder": [self.encoder, self.conv1], "decoder": [self.conv2, self.decoder]}

    def last_layers(self) -> list[nn.Parameter]:
        return [self.decoder.head["2"].weight]

    def frames_valid(self, frames: int) -> bool:
        return frames >= 1 and (frames - 1) % self.spec.time_stride == 0

    def latent_frames(self, frames: int) -> int:
        return 1 + -(-(frames - 1) // self.spec.time_stride)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        stride = self.spec.space_stride
        return self.spec.channels, self.latent_frames(frames), -(-height // stride), -(-width // stride)
