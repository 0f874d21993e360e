"""TAESD: tiny image autoencoders for the latents of Stable Diffusion, SDXL, SD3, FLUX.1, FLUX.2 and Sana.

State-dict keys and results are those of `taesd.py` in madebyollin/taesd, but for its pixels: there they are in [0, 1];
here a video is [B, 3, T, H, W] in [-1, 1], coded frame by frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vae3d.arguments import Count, Depths, Deviation, Mean, PixelChannels, Widths, check_arguments, per_stage
from vae3d.models.interface import PixelLayers, VideoAutoencoder
from vae3d.models.layers.checkpointing import maybe_checkpoint, needs_grad
from vae3d.models.layers.frames import clips_of, pad_space, per_frame
from vae3d.models.layers.pixel_convs import PixelInput, PixelOutput
from vae3d.models.layers.taehv_blocks import Clamp, UpConv, conv, tile_cut
from vae3d.models.streaming import IndependentChunks
from vae3d.pixels import check_latents, check_video
from vae3d.types import Delta, LatentSpec

WIDTH = 64
BLOCKS = 3  # of each stage of the decoder; one follows the last stage


@dataclass(frozen=True)
class Variant:
    """A published network.

    latent: raw (the VAE's own latents) or normalized (those that the diffusion model sees). pool: the blocks at the
    latents' resolution have a GroupNorm over the whole image, so the result depends on all of its pixels.
    widths: of the decoder's stages, each of which doubles the sides; the encoder has as many.
    """

    latent_channels: int
    latent: str = "normalized"
    pool: bool = False
    widths: tuple[int, ...] = (WIDTH, WIDTH, WIDTH)

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        return *self.widths, WIDTH

    @property
    def decoder_blocks(self) -> tuple[int, ...]:
        return *[BLOCKS] * len(self.widths), 1


VARIANTS = {
    "taesd": Variant(4),  # Stable Diffusion 1 and 2
    "taesdxl": Variant(4),  # SDXL
    "taesd3": Variant(16),  # Stable Diffusion 3
    "taef1": Variant(16),  # FLUX.1
    "taef2": Variant(32, latent="raw", pool=True),  # FLUX.2
    "taesana": Variant(32, widths=(256, 128, WIDTH, WIDTH, WIDTH)),  # Sana's DC-AE, 32 x 32
}


class Block(nn.Module):
    """Residual block of three convolutions. pool: an inverted bottleneck with GroupNorm in front. hidden: channels
    between the convolutions; None: `width`."""

    def __init__(self, width: int, pool: bool = False, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or width
        self.conv = nn.Sequential(
            conv(width, hidden), nn.ReLU(True), conv(hidden, hidden), nn.ReLU(True), conv(hidden, width)
        )
        self.pool = None
        if pool:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(4, 4 * width),
                nn.ReLU(True),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return (self.conv(x) + x).relu_()


def encoder(kind: Variant, pixels: int) -> nn.Sequential:
    if len(kind.widths) == 3:
        layers = [PixelInput(pixels, WIDTH), Block(WIDTH)]
    else:  # the first two stages have no blocks of their own
        layers = [
            PixelInput(pixels, 32, stride=2),
            nn.ReLU(True),
            conv(32, WIDTH, stride=2),
            nn.ReLU(True),
            Block(WIDTH),
        ]
    for stage in range(3):
        layers += [conv(WIDTH, WIDTH, stride=2, bias=False)]
        layers += [Block(WIDTH, kind.pool and stage == 2) for _ in range(3)]
    return nn.Sequential(*layers, conv(WIDTH, kind.latent_channels))


def decoder(
    kind: Variant, pixels: int, widths: Sequence[int], hidden: Sequence[int], counts: Sequence[int]
) -> nn.Sequential:
    """widths, hidden, counts: channels, channels inside the blocks and blocks of each stage; the last has the video's
    resolution. An Identity stands where the published network upsamples, which UpConv does here."""
    layers = [Clamp(), conv(kind.latent_channels, widths[0]), nn.ReLU(True)]
    for stage, (width, inner, count) in enumerate(zip(widths, hidden, counts, strict=True)):
        if stage:
            layers += [nn.Identity(), UpConv(widths[stage - 1], width)]
        layers += [Block(width, kind.pool and stage == 0, inner) for _ in range(count)]
    return nn.Sequential(*layers, PixelOutput(widths[-1], pixels))


class TAESD(VideoAutoencoder):
    """A tiny VideoAutoencoder without temporal compression and with a deterministic encoder.

    variant: taesd, taesdxl, taesd3, taef1, taef2 or taesana. decoder_channels, decoder_blocks, decoder_hidden: of a
    smaller or larger decoder, the channels, the residual blocks, and the channels inside these, of each of its stages
    from the latents' to the video's resolution (4; taesana: 6); None: as published. latent: raw or normalized; None: as
    the variant.
    latents_mean, latents_std: of raw latents, per channel, for `normalize`; None: 0 and 1. frame_batch: frames that
    pass through the network at once; None: all. gradient_checkpointing: keep only each frame batch's input and
    recompute the rest in backward. pixel_channels: of videos, see docs/models.md.

    Height and width are padded to multiples of the stride by repeating their edge, and reconstructions are cropped.
    Raises ValueError if the arguments do not fit together.
    """

    @check_arguments
    def __init__(
        self,
        *,
        variant: str,
        decoder_channels: Widths | None = None,
        decoder_blocks: Depths | None = None,
        decoder_hidden: Widths | None = None,
        latent: Literal["raw", "normalized"] | None = None,
        latents_mean: Sequence[Mean] | None = None,
        latents_std: Sequence[Deviation] | None = None,
        frame_batch: Count | None = 4,
        gradient_checkpointing: bool = False,
        pixel_channels: PixelChannels = 3,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}; use one of {', '.join(VARIANTS)}")
        kind = VARIANTS[variant]
        self.encoder = encoder(kind, pixel_channels)
        widths = per_stage("decoder_channels", decoder_channels, kind.decoder_channels)
        counts = per_stage("decoder_blocks", decoder_blocks, kind.decoder_blocks)
        hidden = per_stage("decoder_hidden", decoder_hidden, widths)
        self.decoder = decoder(kind, pixel_channels, widths, hidden, counts)
        nn.init.constant_(self.decoder[-1].bias, 0.5)  # mid-grey in the network's own range [0, 1]
        self.variant = variant
        self.pixel_channels = pixel_channels
        self.latent = latent or kind.latent
        self.frame_batch = frame_batch
        self.gradient_checkpointing = gradient_checkpointing
        self.spec = LatentSpec(
            kind.latent_channels,
            time_stride=1,
            space_stride=2 ** len(kind.widths),
            causal=True,
            **self.register_latent_stats(latents_mean, latents_std, kind.latent_channels),
        )

    def encode(self, video: Tensor) -> Delta:
        """[B, 3, T, H, W] -> latents [B, C, T, ceil(H/f), ceil(W/f)]."""
        check_video(video, self.pixel_channels)
        video = pad_space(video, self.spec.space_stride).to(self.encoder[0].weight.dtype)
        return Delta(self._per_frame(lambda frames: self._encode_frames(frames / 2 + 0.5), video, self.encoder))

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Latents [B, C, T, h, w] -> video [B, 3, T, h*f, w*f], not clamped. num_frames must be T or None."""
        check_latents(z, self.spec.channels)
        self.check_frames(z.shape[2] if num_frames is None else num_frames, z.shape[2])
        z = z.to(self.decoder[-1].weight.dtype)
        return self._per_frame(lambda latents: 2 * self._decode_frames(latents) - 1, z, self.decoder)

    def _encode_frames(self, frames: Tensor) -> Tensor:
        if self.tiling is None:
            return self.encoder(frames)
        cut = tile_cut(self.encoder, self.tiling.exact, down=True)
        tiled, whole = self.encoder[:cut], self.encoder[cut:]
        unit = self.spec.space_stride
        at_cut = unit // 4 if self.tiling.exact else 1
        return whole(self.tiling("encoder", lambda x, _: (tiled(x), None), frames, None, unit, at_cut)[0])

    def _decode_frames(self, z: Tensor) -> Tensor:
        if self.tiling is None:
            return self.decoder(z)
        cut = tile_cut(self.decoder, self.tiling.exact, down=False)
        whole, tiled = self.decoder[:cut], self.decoder[cut:]
        x = whole(z)
        at_cut = x.shape[-1] // z.shape[-1]
        return self.tiling("decoder", lambda x, _: (tiled(x), None), x, None, at_cut, self.spec.space_stride)[0]

    def _per_frame(self, step: Callable[[Tensor], Tensor], x: Tensor, part: nn.Module) -> Tensor:
        recompute = self.gradient_checkpointing and needs_grad(part, x)

        def run(frames: Tensor) -> Tensor:
            return maybe_checkpoint(step, frames.contiguous(memory_format=torch.channels_last), enabled=recompute)

        return per_frame(run, x, self.frame_batch)

    def as_video(self, features: Tensor, clips: int) -> Tensor:
        """A layer's output for the frames of `clips` clips, [B * T, C, H, W], as [B, C, T, H, W]."""
        return clips_of(features, clips)

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        return {"encoder": [self.encoder], "decoder": [self.decoder]}

    def last_layers(self) -> list[nn.Parameter]:
        return [self.decoder[-1].weight]

    def pixel_layers(self) -> PixelLayers:
        last = f"decoder.{len(self.decoder) - 1}"
        return PixelLayers(["encoder.0.weight"], [f"{last}.weight", f"{last}.bias"], grey=0.5)

    def set_frame_batch(self, frames: int) -> bool:
        self.frame_batch = frames
        return True

    def stream(self, height: int, width: int, memory_gib: float | None = None) -> IndependentChunks:
        """Chunks of frame_batch frames; any length gives the same result."""
        return IndependentChunks(self, self.frame_batch or 16)
