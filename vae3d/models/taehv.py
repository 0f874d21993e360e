"""TAEHV: tiny autoencoders for the latents of large video VAEs, one code path for clips and streams.

`taehv.py` of madebyollin/taehv, whose state-dict keys and results these are. There video is NTCHW in [0, 1]; here it is
[B, 3, T, H, W] in [-1, 1] and never clamped, while the published `decode_video` ends with a clamp to [0, 1], through
which no gradient passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae3d.arguments import Count, Deviation, Flags, Mean, Width, Widths, check_arguments
from vae3d.models.base import reconstruct
from vae3d.models.layers import taehv_blocks as blocks
from vae3d.models.layers.checkpointing import needs_grad, run
from vae3d.models.layers.frames import extend_time, pad_space
from vae3d.models.layers.normalized import LatentNormMixin
from vae3d.models.layers.taehv_blocks import Memory, run_layers
from vae3d.models.layers.taehv_frames import RULES, Plan, between
from vae3d.models.streaming import PlannedStream
from vae3d.pixels import check_latents, check_video
from vae3d.types import Delta, LatentSpec, Reconstruction

BASE, SUPER = (256, 128, 64, 64), (512, 256, 128, 64)  # widths of the two published decoders
DEFAULT_MEMORY = 8.0  # GiB
MOST_LATENTS = 4
Step = Callable[[Tensor, Memory | None, bool], tuple[Tensor, Memory]]


@dataclass(frozen=True)
class Variant:
    """What a published file is for.

    patch: side of the patches of pixels that the network works on. time_down, time_up: which stages halve and double
    the frame rate. rule: see layers.taehv_frames. latent: whether latents are a VAE's own (raw) or those that the
    diffusion model sees (normalized).
    """

    latent_channels: int
    patch: int = 1
    time_down: tuple[bool, ...] = (True, True, False)
    time_up: tuple[bool, ...] = (False, True, True)
    rule: str = "trimmed"
    latent: str = "normalized"
    decoder: str = "base"


EIGHT = {"time_down": (True, True, True), "time_up": (True, True, True)}  # frames to a latent
VARIANTS = {
    "taehv": Variant(16),  # HunyuanVideo
    "taecvx": Variant(16, rule="cogvideox", latent="raw"),  # CogVideoX
    "taew2_1": Variant(16),  # Wan2.1, Wan2.2 14B, Qwen-Image
    "taeos1_3": Variant(16),  # Open-Sora 1.3
    "taew2_2": Variant(48, patch=2),  # Wan2.2 5B
    "taehv1_5": Variant(32, patch=2),  # HunyuanVideo 1.5
    "taeltx_2": Variant(128, patch=4, **EIGHT),  # LTX-2, LTX-2.3
    "taeh3": Variant(24, patch=2, rule="h3"),  # MiniMax H3
    "taew2_2_super": Variant(48, patch=2, decoder="super"),
    "taehv1_5_super": Variant(32, patch=2, decoder="super"),
    "taeos1_2": Variant(4, rule="opensora", latent="raw"),  # Open-Sora 1.2; this project's own
}


class TAEHV(LatentNormMixin):
    """A tiny video autoencoder: a VideoAutoencoder whose encoder is deterministic.

    variant: one of VARIANTS. decoder_time_upscale, decoder_space_upscale: which of the three stages double the frame
    rate and the sides (two time flags are those of the last two stages); None: as the variant. A stage that does not,
    for a cheaper preview, makes fewer or smaller frames than went in: such a model decodes, but is not trained.
    channels, decoder_channels: widths, None as published. latent: raw or normalized, None as the variant; see Variant.
    latents_mean, latents_std: of raw latents, per channel, for `normalize`; normalized latents take none.
    chunk_latents: code clips in chunks of so many latents, which changes memory, not results;
    None: at once. gradient_checkpointing: recompute each block in backward.

    Frames: see layers.taehv_frames. Clips that the rule does not take are extended by repeating their last frame, sides
    that the space stride does not divide by repeating their edge, and reconstructions are cut to what was given.
    Weights start as torch's defaults, but the last bias of the decoder at 0.5, mid-grey of the inner range [0, 1].
    Raises ValueError if the arguments do not fit together.
    """

    @check_arguments
    def __init__(
        self,
        *,
        variant: str,
        decoder_time_upscale: Flags | None = None,
        decoder_space_upscale: Flags | None = None,
        channels: Width = 64,
        decoder_channels: Widths | None = None,
        latent: str | None = None,
        latents_mean: Sequence[Mean] | None = None,
        latents_std: Sequence[Deviation] | None = None,
        chunk_latents: Count | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}; use one of {', '.join(VARIANTS)}")
        kind = VARIANTS[variant]
        time = _time_flags(variant, decoder_time_upscale)
        space = _space_flags(variant, decoder_space_upscale)
        pixels = 3 * kind.patch**2
        widths = tuple(decoder_channels or (SUPER if kind.decoder == "super" else BASE))
        if len(widths) != 4:
            raise ValueError(f"decoder_channels has {len(widths)} entries; give 4, of three stages and what follows")
        self.encoder = blocks.encoder(pixels, channels, kind.latent_channels, kind.time_down)
        if kind.decoder == "super":
            self.decoder = blocks.super_decoder(kind.latent_channels, widths, pixels, time)
        else:
            self.decoder = blocks.decoder(kind.latent_channels, widths, pixels, time, space)
        nn.init.constant_(self.decoder[-1].bias, 0.5)
        self.variant, self.patch, self.rule = variant, kind.patch, RULES[kind.rule]
        self.latent = _convention(latent or kind.latent, latents_mean, latents_std)
        self.chunk_latents, self.gradient_checkpointing = chunk_latents, gradient_checkpointing
        self.time_upscale, self.space_shrink = 2 ** sum(time), 2 ** (3 - sum(space))
        self.spec = LatentSpec(
            kind.latent_channels,
            2 ** sum(kind.time_down),
            8 * kind.patch,
            causal=not self.rule.looks_ahead,
            **self.register_latent_stats(latents_mean, latents_std, kind.latent_channels),
        )

    @property
    def decimated(self) -> bool:
        """Whether the decoder makes fewer or smaller frames than the encoder takes."""
        return self.time_upscale < self.spec.time_stride or self.space_shrink > 1

    def encode(self, video: Tensor) -> Delta:
        """[B, 3, T, H, W] -> latents, [B, C, t, h, w]."""
        check_video(video)
        plan = self.plan(video.shape[2])
        video = pad_space(extend_time(video, sum(frames for _, frames in plan.encoder)), self.spec.space_stride)
        coded, memory = [], None
        for start, stop in self._pieces(plan.latents):
            count = sum(frames for _, _, frames in between(plan.encoder, self.spec.time_stride, start, stop))
            z, memory = self.encode_planned(video[:, :, :count], plan, start, stop, memory)
            video = video[:, :, count:]
            coded.append(z)
        return Delta(torch.cat(coded, 2))

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Latents [B, C, t, h, w] -> video, unclamped. num_frames: of the encoded clip, by default the most that the
        latents can stand for; a decoder that does not double every frame rate shows fewer, the latest of each group.

        Raises ValueError if num_frames does not fit the latents.
        """
        check_latents(z, self.spec.channels)
        stride = self.spec.time_stride
        frames = self.rule.frames_of(z.shape[2], stride) if num_frames is None else num_frames
        if frames is None or self.plan(frames).latents != z.shape[2]:
            told = (
                "no number of frames fits" if num_frames is None else f"num_frames is {num_frames}, which does not fit"
            )
            raise ValueError(f"{told} {z.shape[2]} latent frames of {self.variant}")
        plan = self.plan(frames)
        coded, memory = [], None
        for start, stop in self._pieces(plan.latents):
            video, memory = self.decode_planned(z[:, :, start:stop], plan, start, memory)
            coded.append(video)
        return torch.cat(coded, 2)[:, :, : self.frames_shown(frames)]

    def forward(self, video: Tensor, **how: Any) -> Reconstruction:
        """Reconstruct [B, 3, T, H, W]; see VideoAutoencoder.forward. There is nothing to sample.

        A decimated decoder gives its fewer or smaller frames, and raises ValueError in training mode.
        """
        if self.decimated and self.training:
            raise ValueError("a decoder without all of its upscaling cannot be trained; leave decoder_*_upscale out")
        out = reconstruct(self, video, **how)
        if self.space_shrink > 1 and out.video is not None:
            height, width = (-(-side // self.space_shrink) for side in video.shape[-2:])
            out.video = out.video[..., :height, :width]
        return out

    def encode_planned(
        self, video: Tensor, plan: Plan, start: int, stop: int, memory: Memory | None
    ) -> tuple[Tensor, Memory | None]:
        """Latents start..stop - 1 of a clip from the frames that its plan reads for them."""
        coded = []
        for fresh, lead, frames in between(plan.encoder, self.spec.time_stride, start, stop):
            piece, video = video[:, :, :frames], video[:, :, frames:]
            black = piece.new_full((), -1.0).expand(*piece.shape[:2], lead, *piece.shape[3:])
            z, memory = self.encode_chunk(torch.cat([black, piece], 2) if lead else piece, None if fresh else memory)
            coded.append(z)
        return torch.cat(coded, 2), memory

    def decode_planned(self, z: Tensor, plan: Plan, start: int, memory: Memory | None) -> tuple[Tensor, Memory]:
        """The frames that a clip's plan shows of its latents from `start` on."""
        stride, grow = self.spec.time_stride, self.time_upscale
        video, memory = self.decode_chunk(z, memory)
        kept = []
        for _, lead, frames in between(plan.decoder, stride, start, start + z.shape[2]):
            raw, video = video.tensor_split([(lead + frames) // stride * grow], 2)
            kept.append(raw[:, :, lead * grow // stride :])
        return kept[0] if len(kept) == 1 else torch.cat(kept, 2), memory

    def encode_chunk(self, video: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """The network's step: latents of the next n * time_stride raw frames, of sides that the space stride divides,
        and the memory for the chunk after; memory: None at the beginning, where it is zero."""
        return self._step(self.encoder, self._latents, video, memory, self.spec.time_stride)

    def decode_chunk(self, z: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """The network's step: time_upscale raw frames of each of the next latents, unclamped; see encode_chunk."""
        return self._step(self.decoder, self._pixels, z, memory, 1)

    def _step(self, part: nn.Module, step: Step, x: Tensor, memory: Memory | None, unit: int) -> tuple[Tensor, Memory]:
        """Code a chunk, of which `unit` frames belong to a latent.

        Without gradients a CPU codes one latent after another, and the last layers one frame after another: more at
        once take longer, since they do not fit into its caches, and oneDNN sums a convolution in another order for
        another number of frames, so that results would depend on the chunks.
        With gradient checkpointing, a clip at once keeps the input of every block; one in chunks keeps only their
        memory, and runs each chunk once more in backward.
        """
        if _one_by_one(x):
            coded = []
            for piece in x.split(unit, 2):
                y, memory = step(piece, memory, False)
                coded.append(y)
            return coded[0] if len(coded) == 1 else torch.cat(coded, 2), memory
        recompute = self.gradient_checkpointing and needs_grad(part, x)
        whole = self.chunk_latents is None
        return run(step, x, memory, recompute and whole, recompute=recompute and not whole)

    def _latents(self, video: Tensor, memory: Memory | None, recompute: bool) -> tuple[Tensor, Memory]:
        x = rearrange(video.to(self.encoder[0].weight.dtype) / 2 + 0.5, "b c t h w -> (t b) c h w")
        x = F.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last)
        x, memory = run_layers(self.encoder, x, len(video), memory, recompute)
        return rearrange(x, "(t b) c h w -> b c t h w", b=len(video)), memory

    def _pixels(self, z: Tensor, memory: Memory | None, recompute: bool) -> tuple[Tensor, Memory]:
        x = rearrange(z.to(self.decoder[-1].weight.dtype), "b c t h w -> (t b) c h w")
        x = x.contiguous(memory_format=torch.channels_last)
        grown = 1 + max(i for i, layer in enumerate(self.decoder) if isinstance(layer, blocks.TGrow))
        x, memory = run_layers(self.decoder[:grown], x, len(z), memory, recompute)
        pieces = x.split(1) if _one_by_one(x) else [x]
        x = torch.cat([run(self.decoder[grown:], piece, recompute=recompute) for piece in pieces])
        x = F.pixel_shuffle(x, self.patch)
        return rearrange(2 * x - 1, "(t b) c h w -> b c t h w", b=len(z)), memory

    def _pieces(self, latents: int) -> list[tuple[int, int]]:
        """Spans of latents that are coded at once."""
        size = self.chunk_latents or latents
        return [(start, min(start + size, latents)) for start in range(0, latents, size)]

    def stream(self, height: int, width: int, memory_gib: float | None = None) -> PlannedStream:
        """A stream of videos of this size: chunks of `chunk_latents`, or of as many latents as decode in `memory_gib`
        (in fp32; by default DEFAULT_MEMORY), but at most MOST_LATENTS.

        Raises ValueError for a decimated decoder, which does not give back what went in.
        """
        if self.decimated:
            raise ValueError("a decoder without all of its upscaling does not reconstruct; leave decoder_*_upscale out")
        chunk = self.chunk_latents
        if chunk is None:
            budget = (memory_gib or DEFAULT_MEMORY) * 2**30
            fitting = [k for k in range(1, MOST_LATENTS + 1) if self.chunk_memory(k, height, width) <= budget]
            chunk = max(fitting, default=1)
        return PlannedStream(self, chunk)

    def chunk_memory(self, latents: int, height: int, width: int) -> int:
        """About how many bytes decoding a chunk takes in fp32, with the memory but without weights: some frames of the
        last stage are in work."""
        pixels = height * width // self.patch**2
        return int(4 * pixels * self.decoder[-1].in_channels * (3 + 3.3 * latents * self.time_upscale))

    def plan(self, frames: int) -> Plan:
        """Which frames the network reads and shows of a clip of so many."""
        return self.rule.plan(frames, self.spec.time_stride)

    def frames_shown(self, frames: int) -> int:
        """Frames that a clip of `frames` is decoded to: all of them, unless the decoder is decimated in time."""
        count = 0
        for _, length in self.plan(frames).decoder:
            count -= -min(length, frames) * self.time_upscale // self.spec.time_stride
            frames -= min(length, frames)
        return count

    def as_video(self, features: Tensor, clips: int) -> Tensor:
        """What a layer gave for so many clips, [T * B, C, H, W], as [B, C, T, H, W]."""
        return rearrange(features, "(t b) c h w -> b c t h w", b=clips)

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        return {"encoder": [self.encoder], "decoder": [self.decoder]}

    def last_layers(self) -> list[nn.Parameter]:
        return [self.decoder[-1].weight]

    def frames_valid(self, frames: int) -> bool:
        return frames >= 1 and self.plan(frames).frames == frames

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        stride = self.spec.space_stride
        return self.spec.channels, self.plan(frames).latents, -(-height // stride), -(-width // stride)


def _one_by_one(x: Tensor) -> bool:
    """Whether frames that do not need each other are better coded one after another; see TAEHV._step."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def _time_flags(variant: str, flags: Sequence[bool] | None) -> tuple[bool, ...]:
    published = VARIANTS[variant].time_up
    flags = published if flags is None else tuple(flags)
    flags = (False, *flags) if len(flags) == 2 else flags
    if len(flags) != 3:
        raise ValueError(f"decoder_time_upscale has {len(flags)} entries; give 3, or 2 for the last stages")
    grown = [str(stage) for stage, (wanted, had) in enumerate(zip(flags, published, strict=True)) if wanted and not had]
    if grown:
        raise ValueError(
            f"decoder_time_upscale: stage {', '.join(grown)} of {variant} does not double the frame rate, and its "
            "weights cannot grow; it can only be left out where there is one"
        )
    return flags


def _space_flags(variant: str, flags: Sequence[bool] | None) -> tuple[bool, ...]:
    flags = (True, True, True) if flags is None else tuple(flags)
    if len(flags) != 3:
        raise ValueError(f"decoder_space_upscale has {len(flags)} entries; give 3")
    if VARIANTS[variant].decoder == "super" and not all(flags):
        raise ValueError(
            f"decoder_space_upscale: the super decoder of {variant} makes the pixels of doubled sides with weights of "
            "their own, so that its sides must be doubled; the base decoders can leave that out"
        )
    return flags


def _convention(latent: str, latents_mean: object, latents_std: object) -> str:
    if latent not in ("raw", "normalized"):
        raise ValueError(f"latent is {latent!r}; use raw or normalized")
    if latent == "normalized" and not (latents_mean is None and latents_std is None):
        raise ValueError(
            "latents_mean and latents_std are of raw latents; with latent=normalized they are 0 and 1, leave them out"
        )
    return latent
