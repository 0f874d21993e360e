"""The image autoencoder of Stable Diffusion and SDXL, run on every frame of a video.

Network: latent-diffusion `ldm/modules/diffusionmodules/model.py`. State-dict keys are those of diffusers'
AutoencoderKL. Images or frames are [N, C, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae3d.arguments import Count, Depth, Deviation, Mean, PixelChannels, Width, Widths, check_arguments
from vae3d.errors import UserError
from vae3d.models.interface import PixelLayers, VideoAutoencoder
from vae3d.models.layers.checkpointing import maybe_checkpoint, needs_grad
from vae3d.models.layers.frames import clips_of, pad_space, per_frame
from vae3d.models.layers.linear_code import LOGVAR_START, cosines, set_linear_code
from vae3d.models.layers.norm import norm_silu
from vae3d.models.layers.pixel_convs import PixelInput, PixelOutput
from vae3d.models.streaming import IndependentChunks
from vae3d.pixels import check_latents, check_video
from vae3d.transfer import to_device
from vae3d.types import LatentSpec, Posterior

EPS = 1e-6
UNKNOWN_FACTOR = (
    "it is 0.18215 for Stable Diffusion 1 and 2, 0.13025 for SDXL, 1.5305 with shift_factor=0.0609 for SD3, 0.3611 "
    "with shift_factor=0.1159 for FLUX.1. Give it as in vae3d.load(path, scaling_factor=0.18215), or as "
    "model.scaling_factor=0.18215 to vae3d infer and vae3d encode; or write it into an export: "
    "vae3d convert FILE FOLDER --to export --scaling_factor 0.18215"
)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.conv2(norm_silu(self.norm2, h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Single-head self-attention over the pixels of one image."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x.flatten(2)).transpose(1, 2)  # [N, H*W, C]
        q, k, v = (to(tokens).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))
        tokens = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        # Tokens first: the sum then has their channels-last layout, which is faster and rounds as diffusers does.
        return tokens.transpose(1, 2).reshape(x.shape) + x


class Downsample(nn.Module):
    """Stride-2 convolution with zero padding below and on the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, then an optional change of resolution."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, resample: str | None) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False))
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if resample == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if resample == "up" else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    def __init__(
        self, channels: Sequence[int], layers: int, out_channels: int, groups: int, attention: bool, pixels: int = 3
    ) -> None:
        super().__init__()
        self.conv_in = PixelInput(pixels, channels[0])
        inputs = [channels[0], *channels[:-1]]
        self.down_blocks = nn.ModuleList(
            Level(a, b, layers, groups, "down" if i < len(channels) - 1 else None)
            for i, (a, b) in enumerate(zip(inputs, channels, strict=True))
        )
        self.mid_block = MidBlock(channels[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(norm_silu(self.conv_norm_out, self.mid_block(x)))


class Decoder(nn.Module):
    def __init__(
        self, channels: Sequence[int], layers: int, in_channels: int, groups: int, attention: bool, pixels: int = 3
    ) -> None:
        super().__init__()
        outputs = list(reversed(channels))
        inputs = [outputs[0], *outputs[:-1]]
        self.conv_in = nn.Conv2d(in_channels, outputs[0], 3, padding=1)
        self.mid_block = MidBlock(outputs[0], groups, attention)
        self.up_blocks = nn.ModuleList(
            Level(a, b, layers + 1, groups, "up" if i < len(channels) - 1 else None)
            for i, (a, b) in enumerate(zip(inputs, outputs, strict=True))
        )
        self.conv_norm_out = nn.GroupNorm(groups, outputs[-1], eps=EPS)
        self.conv_out = PixelOutput(outputs[-1], pixels)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv_out(self.features(z))

    def features(self, z: Tensor) -> Tensor:
        """Input of the last layer."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return norm_silu(self.conv_norm_out, x)


class AutoencoderKL(nn.Module):
    """Images [N, 3, H, W] to latent moments [N, 2c, H/f, W/f] and back, f = 2 ** (len(channels) - 1).

    Raises ValueError if a channel count is not a multiple of `groups`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        layers: int,
        latent_channels: int,
        groups: int,
        attention: bool,
        quant_convs: bool,
        pixels: int = 3,
    ) -> None:
        super().__init__()
        if any(c % groups for c in channels):
            raise ValueError(f"channels are {list(channels)}; each must be a multiple of groups={groups}")
        self.encoder = Encoder(channels, layers, 2 * latent_channels, groups, attention, pixels)
        self.decoder = Decoder(channels, layers, latent_channels, groups, attention, pixels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if quant_convs else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if quant_convs else nn.Identity()

    def encode(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def features(self, z: Tensor) -> Tensor:
        """Input of the decoder's last layer."""
        return self.decoder.features(self.post_quant_conv(z))


class SpatialVAE(VideoAutoencoder):
    """AutoencoderKL frame by frame: a VideoAutoencoder without temporal compression.

    scaling_factor, shift_factor: (z - shift_factor) * scaling_factor has about zero mean and unit variance (SD 0.18215
    and 0, SDXL 0.13025 and 0); one number, or one per channel. scaling_factor None: unknown; `normalize` and
    `denormalize` raise UserError, and spec.latents_std is empty. shift_factor None: 0.
    frame_batch: frames that pass through the network at once; None: all.
    gradient_checkpointing: keep only each frame batch's input and recompute the rest in backward.
    shortcut: add a linear path beside each network, from the patch of pixels behind a latent to the latent and back, as
    in TemporalVAE: a DCT at first, lowest frequencies first, to which both networks add nothing. Published networks
    have none.
    pixel_channels: of videos, see docs/models.md.
    """

    whole_frames = "GroupNorm and attention"

    @check_arguments
    def __init__(
        self,
        channels: Widths = (128, 256, 512, 512),
        *,
        layers: Depth = 2,
        latent_channels: Width = 4,
        groups: Width = 32,
        attention: bool = True,
        quant_convs: bool = True,
        scaling_factor: Deviation | Sequence[Deviation] | None = 0.13025,
        shift_factor: Mean | Sequence[Mean] | None = 0.0,
        frame_batch: Count | None = 4,
        gradient_checkpointing: bool = True,
        shortcut: bool = False,
        pixel_channels: PixelChannels = 3,
    ) -> None:
        super().__init__()
        self.module = AutoencoderKL(channels, layers, latent_channels, groups, attention, quant_convs, pixel_channels)
        self.pixel_channels = pixel_channels
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor = 0.0 if shift_factor is None else shift_factor
        self.frame_batch = frame_batch
        self.gradient_checkpointing = gradient_checkpointing
        # Also keep the last layer's input: else the gradient of this layer alone, which an adaptive weight needs,
        # recomputes the whole decoder.
        self.keep_last_input = False
        self.spec = LatentSpec(
            channels=latent_channels,
            time_stride=1,
            space_stride=2 ** (len(channels) - 1),
            causal=True,
            latents_mean=per_channel(shift_factor, latent_channels),
            latents_std=tuple(1 / factor for factor in per_channel(scaling_factor, latent_channels)),
        )
        self.shortcut = shortcut
        if shortcut:
            patch = pixel_channels * self.spec.space_stride**2
            self.shortcut_in = nn.Conv3d(patch, latent_channels, 1)
            self.shortcut_out = nn.Conv3d(latent_channels, patch, 1)
            self._start_linear()

    def _start_linear(self) -> None:
        """The shortcuts as a DCT, and both networks adding nothing, with a small posterior variance."""
        for layer in (self.module.encoder.conv_out, self.module.decoder.conv_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        quant = self.module.quant_conv
        moments = quant if isinstance(quant, nn.Conv2d) else self.module.encoder.conv_out
        nn.init.zeros_(moments.bias)
        nn.init.constant_(moments.bias[self.spec.channels :], LOGVAR_START)
        size = self.spec.space_stride
        waves = torch.einsum("yp,xq->yxpq", cosines(size), cosines(size)).view(size**2, size**2)
        order = torch.tensor([y + x for y in range(size) for x in range(size)]).argsort(stable=True)
        waves = torch.einsum("fp,cd->fcdp", waves[order], torch.eye(self.pixel_channels)).flatten(2).flatten(0, 1)
        set_linear_code(self.shortcut_in, self.shortcut_out, waves / size**2, waves.T)

    def patches(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> [B, 3 f^2, T, ceil(H/f), ceil(W/f)]."""
        video = pad_space(video, self.spec.space_stride)
        return rearrange(
            video, "b c t (h p) (w q) -> b (c p q) t h w", p=self.spec.space_stride, q=self.spec.space_stride
        )

    def encode(self, video: Tensor) -> Posterior:
        """[B, 3, T, H, W] -> posterior over raw latents [B, C, T, ceil(H/f), ceil(W/f)]."""
        check_video(video, self.pixel_channels)
        video = pad_space(video, self.spec.space_stride).to(self.module.encoder.conv_in.weight.dtype)
        trains = needs_grad(self.module.encoder, video)

        def encode(frames: Tensor) -> Tensor:
            frames = _fast_layout(frames, trains)
            return maybe_checkpoint(self._encode_frames, frames, enabled=self.gradient_checkpointing and trains)

        posterior = Posterior.from_moments(per_frame(encode, video, self.frame_batch))
        if self.shortcut:
            posterior.mean = posterior.mean + self.shortcut_in(self.patches(video))
        return posterior

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Raw latents [B, C, T, h, w] -> video [B, 3, T, h*f, w*f], not clamped. num_frames must be T or None."""
        check_latents(z, self.spec.channels)
        self.check_frames(z.shape[2] if num_frames is None else num_frames, z.shape[2])
        z = z.to(self.module.decoder.conv_in.weight.dtype)
        trains = needs_grad(self.module.decoder, z)
        recompute = self.gradient_checkpointing and trains

        def decode(frames: Tensor) -> Tensor:
            frames = _fast_layout(frames, trains)
            if self.keep_last_input:
                return self.module.decoder.conv_out(maybe_checkpoint(self.module.features, frames, enabled=recompute))
            return maybe_checkpoint(self._decode_frames, frames, enabled=recompute)

        video = per_frame(decode, z, self.frame_batch)
        if self.shortcut:
            f = self.spec.space_stride
            video = video + rearrange(self.shortcut_out(z), "b (c p q) t h w -> b c t (h p) (w q)", p=f, q=f)
        return video

    def _encode_frames(self, frames: Tensor) -> Tensor:
        """Moments of [N, 3, H, W]."""
        if self.tiling is None:
            return self.module.encode(frames)
        encode = self.module.encode
        return self.tiling("encoder", lambda x, _: (encode(x), None), frames, None, self.spec.space_stride, 1)[0]

    def _decode_frames(self, z: Tensor) -> Tensor:
        if self.tiling is None:
            return self.module.decode(z)
        decode = self.module.decode
        return self.tiling("decoder", lambda x, _: (decode(x), None), z, None, 1, self.spec.space_stride)[0]

    def as_video(self, features: Tensor, clips: int) -> Tensor:
        """A layer's output for the frames of `clips` clips, [B * T, C, H, W], as [B, C, T, H, W]."""
        return clips_of(features, clips)

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        module = self.module
        parts = {"encoder": [module.encoder, module.quant_conv], "decoder": [module.post_quant_conv, module.decoder]}
        if self.shortcut:
            parts["encoder"].append(self.shortcut_in)
            parts["decoder"].append(self.shortcut_out)
        return parts

    def last_layers(self) -> list[nn.Parameter]:
        return [self.module.decoder.conv_out.weight]

    def pixel_layers(self) -> PixelLayers:
        inputs, outputs = ["module.encoder.conv_in.weight"], ["module.decoder.conv_out"]
        if self.shortcut:
            inputs, outputs = [*inputs, "shortcut_in.weight"], [*outputs, "shortcut_out"]
        return PixelLayers(inputs, [f"{name}.{kind}" for name in outputs for kind in ("weight", "bias")])

    def set_frame_batch(self, frames: int) -> bool:
        self.frame_batch = frames
        return True

    def chunk_steps(self) -> list[tuple[nn.Module, str]]:
        return [(self.module, "encode"), (self.module, "decode")]

    def stream(self, height: int, width: int, memory_gib: float | None = None) -> IndependentChunks:
        """Chunks of frame_batch frames; any length gives the same result."""
        return IndependentChunks(self, self.frame_batch or 16)

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latents to about zero mean and unit variance. Raises UserError if scaling_factor is None."""
        return (z - _broadcast(z, self.shift_factor)) * _broadcast(z, self._require_scaling())

    def denormalize(self, z: Tensor) -> Tensor:
        """Inverse of normalize."""
        return z / _broadcast(z, self._require_scaling()) + _broadcast(z, self.shift_factor)

    def _require_scaling(self) -> float | Sequence[float]:
        if self.scaling_factor is None:
            raise UserError(f"the scaling_factor of these latents is not known; {UNKNOWN_FACTOR}")
        return self.scaling_factor


def per_channel(factor: float | Sequence[float] | None, channels: int) -> tuple[float, ...]:
    """One factor per channel, from one for all or one for each; empty for None. Raises ValueError for other lengths."""
    if factor is None:
        return ()
    factors = tuple(factor) if isinstance(factor, Sequence) else (factor,) * channels
    if len(factors) != channels:
        raise ValueError(f"scaling_factor or shift_factor has {len(factors)} entries; give 1 or {channels}")
    return factors


def _fast_layout(frames: Tensor, trains: bool) -> Tensor:
    """Channels-last without gradients, which is faster on a CPU; training gains nothing there."""
    if trains and torch.is_grad_enabled():
        return frames
    return frames.contiguous(memory_format=torch.channels_last)


def _broadcast(z: Tensor, factor: float | Sequence[float]) -> float | Tensor:
    """A factor, or one per channel, to broadcast against [B, C, t, h, w]."""
    if not isinstance(factor, Sequence):
        return factor
    return to_device(torch.tensor(factor, dtype=z.dtype), z.device)[:, None, None, None]
