"""The VAEs of Wan2.1 and Wan2.2: causal in time, 4 x 8 x 8 (4 x 16 x 16), one code path for clips and streams.

Wan report, arXiv 2503.20314, section 4.1. State-dict keys and results are those of `wan/modules/vae.py` in
Wan-Video/Wan2.1 and `vae2_2.py` in Wan-Video/Wan2.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from vae3d.arguments import (
    Count,
    Depth,
    Depths,
    Deviation,
    Factor,
    Factors,
    Flags,
    Mean,
    PixelChannels,
    Width,
    Widths,
    check_arguments,
    check_level_boundaries,
    per_stage,
)
from vae3d.errors import UserError
from vae3d.models.interface import PixelLayers, VideoAutoencoder
from vae3d.models.layers.borders import Borders
from vae3d.models.layers.checkpointing import maybe_checkpoint, needs_grad
from vae3d.models.layers.frames import extend_time, pad_space
from vae3d.models.layers.wan_blocks import (
    Conv,
    Decoder,
    DownBlock,
    Downsample,
    Encoder,
    Head,
    LayerCache,
    ResidualBlock,
    UpBlock,
    Upsample,
    pointwise,
    run_chain,
)
from vae3d.models.streaming import CausalStream, chunk_lengths, chunk_within
from vae3d.pixels import check_latents, check_video
from vae3d.text import plural
from vae3d.types import LatentSpec, Posterior

MAX_CHUNK = 8  # latents of a stream's chunk
Cache = Sequence[LayerCache]  # of every layer


class WanVAE(VideoAutoencoder):
    """The VAE of Wan2.1 (the defaults) or Wan2.2; a VideoAutoencoder.

    channels, multipliers: width of each level. downsample: which level boundaries halve the frame rate; each halves
    height and width. decoder_channels: of Wan2.2's wider decoder. decoder_widths, decoder_blocks: of a smaller decoder,
    the width and the residual blocks of each level, from the latents to the pixels; None: decoder_channels *
    multipliers, and layers + 1. Its layers stay those that the multipliers give, whatever its widths.
    patch: Wan2.2 codes patches of 2 x 2 pixels.
    shortcuts: Wan2.2's averaging and repeating shortcuts around every level.
    pad_w, pad_h: see Borders. The published weights were trained with zeros; circular closes the seam of 360 degree
    panoramas, with the same weights.
    latents_mean, latents_std: per channel, for `normalize`; encode and decode use raw latents.
    chunk_latents: code clips in chunks of this many latent frames, which changes memory, not results; None: at once.
    gradient_checkpointing: recompute each block in backward. pixel_channels: of videos, see docs/models.md.

    The network takes 1 + n * time_stride frames; a circular width must be a multiple of the space stride.
    Raises ValueError if the lists do not fit together.
    """

    cached_steps = True

    @check_arguments
    def __init__(
        self,
        *,
        channels: Width = 96,
        decoder_channels: Width | None = None,
        decoder_widths: Widths | None = None,
        decoder_blocks: Depths | None = None,
        multipliers: Factors = (1, 2, 4, 4),
        downsample: Flags = (False, True, True),
        layers: Depth = 2,
        latent_channels: Width = 16,
        patch: Factor = 1,
        shortcuts: bool = False,
        pad_w: Literal["zeros", "circular"] = "zeros",
        pad_h: Literal["zeros", "pole"] = "zeros",
        latents_mean: Sequence[Mean] | None = None,
        latents_std: Sequence[Deviation] | None = None,
        chunk_latents: Count | None = None,
        gradient_checkpointing: bool = False,
        pixel_channels: PixelChannels = 3,
    ) -> None:
        super().__init__()
        check_level_boundaries(multipliers, downsample)
        borders = Borders(pad_w, pad_h)
        time = list(downsample)
        pixels = pixel_channels * patch**2
        widths = [channels * m for m in multipliers]
        self.encoder = Encoder(pixels, 2 * latent_channels, channels, widths, time, layers, shortcuts, borders)
        self.conv1 = nn.Conv3d(2 * latent_channels, 2 * latent_channels, 1)
        self.conv2 = nn.Conv3d(latent_channels, latent_channels, 1)
        full = [(decoder_channels or channels) * m for m in reversed(multipliers)]
        decoder_widths = per_stage("decoder_widths", decoder_widths, full)
        blocks = per_stage("decoder_blocks", decoder_blocks, [layers + 1] * len(full))
        self.decoder = Decoder(latent_channels, pixels, full, decoder_widths, time[::-1], blocks, shortcuts, borders)
        self.patch = patch
        self.pixel_channels = pixel_channels
        self.borders = borders
        self.chunk_latents = chunk_latents
        self.gradient_checkpointing = gradient_checkpointing
        self.spec = LatentSpec(
            latent_channels,
            2 ** sum(time),
            patch * 2 ** len(time),
            causal=True,
            **self.register_latent_stats(latents_mean, latents_std, latent_channels),
        )

    def encode(self, video: Tensor) -> Posterior:
        """[B, 3, T, H, W] -> posterior over raw latents. Raises UserError as check_size does."""
        check_video(video, self.pixel_channels)
        stride = self.spec.time_stride
        self.check_size(*video.shape[-2:])
        frames = video.shape[2] + -(video.shape[2] - 1) % stride
        video = pad_space(extend_time(video, frames), self.spec.space_stride)
        size = self.clip_latents
        lengths = [frames] if size is None else chunk_lengths(frames, size, stride)
        return Posterior.from_moments(self._in_chunks(self._moments, video.split(lengths, 2), self.encoder))

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Raw latents [B, C, t, h, w] -> video, not clamped. num_frames: by default 1 + (t - 1) * time_stride."""
        check_latents(z, self.spec.channels)
        frames = 1 + (z.shape[2] - 1) * self.spec.time_stride if num_frames is None else num_frames
        self.check_frames(frames, z.shape[2])
        video = self._in_chunks(self._pixels, z.split(self.clip_latents or z.shape[2], 2), self.decoder)
        return video[:, :, :frames]

    def encode_chunk(self, video: Tensor, cache: Cache | None) -> tuple[Posterior, Cache]:
        """Posterior of a stream's next frames, and the cache for the chunk after.

        video: 1 + n * time_stride frames in the first chunk, n * time_stride in later ones; sides must be multiples of
        the space stride. cache: None for the first chunk, else what the chunk before returned. This list is emptied
        while it is read, so that memory holds one cache; pass tuple(cache) to use it more than once.
        Raises ValueError for another number of frames or another size.
        """
        frames, height, width = video.shape[2:]
        stride, space = self.spec.time_stride, self.spec.space_stride
        if frames < 1 or (frames - (cache is None)) % stride or height % space or width % space:
            valid = f"1 + n * {stride}" if cache is None else f"n * {stride}"
            raise ValueError(
                f"the chunk is {plural(frames, 'frame')} of {height}x{width}; give {plural(valid, 'frame')} of sides "
                f"that are multiples of {space}"
            )
        moments, cache = self._moments(video, cache, return_cache=True, recompute=False)
        return Posterior.from_moments(moments), list(cache)

    def decode_chunk(self, z: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Video of a stream's next latents, not clamped, and the cache for the chunk after; see encode_chunk."""
        video, cache = self._pixels(z, cache, return_cache=True, recompute=False)
        return video, list(cache)

    def stream(self, height: int, width: int, memory_gib: float | None = None) -> CausalStream:
        """Chunks of `chunk_latents`, or of as many latents as decode in `memory_gib` in fp32, at most MAX_CHUNK."""
        self.check_size(height, width)
        height, width = self.coded_size(height, width)
        fitting = chunk_within(memory_gib, lambda latents: self.chunk_memory(latents, height, width), MAX_CHUNK)
        return CausalStream(self, self.chunk_latents or fitting, self.fixed_chunks)

    @property
    def circular(self) -> bool:
        return self.borders.width == "circular"

    def set_tiles(self, tile: int | None, overlap: int | None = None) -> None:
        """See VideoAutoencoder.set_tiles. Raises UserError for pad_h=pole, whose first rows need columns from the other
        side of the panorama."""
        if tile is not None and self.borders.height == "pole":
            raise UserError(f"tile={tile}: pad_h=pole cannot be coded in tiles; use pad_h=zeros, or whole frames")
        super().set_tiles(tile, overlap)

    def tile_reach(self) -> tuple[dict[str, int], str]:
        stride = self.spec.space_stride // self.patch
        encoder, decoder = self._tiled_layers()
        return {"encoder": math.ceil(_reach(encoder) / stride), "decoder": _reach(decoder)}, ""

    def _tiled_layers(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Layers of encoder and decoder above the lowest resolution, where attention sees whole frames. The others are
        a few per cent of the work."""
        encoder, decoder = self.encoder.chain(), self.decoder.chain()
        last_down = max(i for i, layer in enumerate(encoder) if _resamples(layer))
        first_up = min(i for i, layer in enumerate(decoder) if _resamples(layer))
        return encoder[: last_down + 1], decoder[first_up:]

    def chunk_memory(self, latents: int, height: int, width: int) -> int:
        """Estimated bytes for decoding a chunk in fp32, with the cache but without weights: those of the last level."""
        fixed, per_latent = (42, 30) if self.patch > 1 else (29, 20)
        channels = self.decoder.head["2"].in_channels / self.patch**2
        return int(4 * height * width * channels * (fixed + per_latent * latents))

    def _in_chunks(
        self, step: Callable[..., tuple[Tensor, Cache]], chunks: Sequence[Tensor], part: nn.Module
    ) -> Tensor:
        """Code the chunks of a clip.

        With gradient checkpointing a single chunk keeps the input of every block. Of several chunks only the caches are
        kept, and each chunk is recomputed as a whole in backward.
        """
        recompute = self.gradient_checkpointing and self.tiling is None and needs_grad(part, chunks[0])
        single = len(chunks) == 1
        outputs = []
        cache = None
        for i, chunk in enumerate(chunks):
            return_cache = i + 1 < len(chunks)
            output, cache = maybe_checkpoint(
                step, chunk, cache, return_cache, recompute and single, enabled=recompute and not single
            )
            outputs.append(output)
        return outputs[0] if single else torch.cat(outputs, 2)

    def _moments(self, video: Tensor, cache: Cache | None, return_cache: bool, recompute: bool) -> tuple[Tensor, Cache]:
        x, chain = self.to_patches(video), self.encoder.chain()
        if self.tiling is None:
            x, cache = run_chain(chain, x, cache, return_cache, recompute)
            return pointwise(self.conv1, x), cache
        cut = len(self._tiled_layers()[0]) if self.tiling.exact else len(chain)
        caches, cache = cache or (None, None)
        step = partial(run_chain, chain[:cut], return_cache=return_cache)
        unit = self.spec.space_stride // self.patch
        x, caches = self.tiling("encoder", step, x, caches, unit, 1)
        x, cache = run_chain(chain[cut:], x, cache, return_cache)
        return pointwise(self.conv1, x), (caches, list(cache))

    def _pixels(self, z: Tensor, cache: Cache | None, return_cache: bool, recompute: bool) -> tuple[Tensor, Cache]:
        x = pointwise(self.conv2, z.to(self.conv2.weight.dtype))
        chain = self.decoder.chain()
        if self.tiling is None:
            x, cache = run_chain(chain, x, cache, return_cache, recompute)
            return self.from_patches(x), cache
        cut = len(chain) - len(self._tiled_layers()[1]) if self.tiling.exact else 0
        caches, cache = cache or (None, None)
        x, cache = run_chain(chain[:cut], x, cache, return_cache)
        step = partial(run_chain, chain[cut:], return_cache=return_cache)
        x, caches = self.tiling("decoder", step, x, caches, 1, self.spec.space_stride // self.patch)
        cache = caches, list(cache)
        return self.from_patches(x), cache

    def to_patches(self, video: Tensor) -> Tensor:
        """Input of the encoder's chain."""
        video = video.to(self.conv1.weight.dtype)
        return rearrange(video, "b c t (h q) (w r) -> b (c r q) t h w", q=self.patch, r=self.patch)

    def from_patches(self, x: Tensor) -> Tensor:
        return rearrange(x, "b (c r q) t h w -> b c t (h q) (w r)", q=self.patch, r=self.patch)

    def check_size(self, height: int, width: int) -> None:
        super().check_size(height, width)
        unit = 2 * self.spec.space_stride
        if self.borders.height == "pole" and width % unit:
            raise UserError(f"the width is {width}; with pad_h=pole it must be a multiple of {unit}")

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        return {"encoder": [self.encoder, self.conv1], "decoder": [self.conv2, self.decoder]}

    def last_layers(self) -> list[nn.Parameter]:
        return [self.decoder.head["2"].weight]

    def pixel_layers(self) -> PixelLayers:
        return PixelLayers(["encoder.conv1.weight"], ["decoder.head.2.weight", "decoder.head.2.bias"])

    def frames_valid(self, frames: int) -> bool:
        return frames >= 1 and (frames - 1) % self.spec.time_stride == 0

    def latent_frames(self, frames: int) -> int:
        return 1 + -(-(frames - 1) // self.spec.time_stride)


def _resamples(layer: nn.Module) -> bool:
    """Whether a layer of a chain changes the resolution."""
    if isinstance(layer, DownBlock):
        return layer.space > 1
    return isinstance(layer, Downsample | Upsample) or (isinstance(layer, UpBlock) and layer.up)


def _reach(layers: Sequence[nn.Module], behind: int = 0) -> int:
    """Pixels of the input on each side on which an output pixel depends. behind: the same for the layers after."""
    for layer in reversed(layers):
        if isinstance(layer, DownBlock | UpBlock):
            inner = layer.downsamples if isinstance(layer, DownBlock) else layer.upsamples
            behind = _reach(inner, behind)
        elif isinstance(layer, Downsample):
            behind = 2 * behind + 2
        elif isinstance(layer, Upsample):
            behind = (behind + 2) // 2
        else:
            behind += {Conv: 1, Head: 1, ResidualBlock: 2}[type(layer)]
    return behind
