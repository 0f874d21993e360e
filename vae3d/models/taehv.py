"""TAEHV: tiny autoencoders for the latents of large video VAEs, one code path for clips and streams.

State-dict keys and results are those of `taehv.py` in madebyollin/taehv, but for its layout: there video is NTCHW in
[0, 1] and `decode_video` clamps, which stops gradients; here it is [B, 3, T, H, W] in [-1, 1] and not clamped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae3d.arguments import (
    Count,
    Depths,
    Deviation,
    Flags,
    Mean,
    PixelChannels,
    Width,
    Widths,
    check_arguments,
    per_stage,
)
from vae3d.models.interface import PixelLayers, VideoAutoencoder
from vae3d.models.layers import taehv_blocks as blocks
from vae3d.models.layers.checkpointing import maybe_checkpoint, needs_grad
from vae3d.models.layers.frames import extend_time, pad_space
from vae3d.models.layers.taehv_blocks import Cache, run_layers
from vae3d.models.layers.taehv_frames import LOOK_AHEAD, RULES, FramePlan, count_frames, longest_clip, split_runs
from vae3d.models.streaming import chunk_within
from vae3d.pixels import check_latents, check_video
from vae3d.seeding import Generators
from vae3d.text import plural
from vae3d.types import Delta, LatentSpec, Reconstruction

# Widths of the published decoders.
WIDTHS = {"base": (256, 128, 64, 64), "super": (512, 256, 128, 64), "wide": (1024, 512, 256, 64)}
BLOCKS = (3, 3, 3)  # of the decoder's stages
MAX_CHUNK = 4  # latents of a stream's chunk
Step = Callable[[Tensor, Cache | None, bool], tuple[Tensor, Cache]]


@dataclass(frozen=True)
class Variant:
    """A published network.

    patch: side of the pixel patches that the network works on. time_down, time_up: which stages halve and double the
    frame rate. rule: a name in taehv_frames.RULES. latent: raw (the VAE's own latents) or normalized (those that the
    diffusion model sees). decoder: a name in WIDTHS.
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
    "taeltx2_3_wide": Variant(128, patch=4, **EIGHT, decoder="wide"),  # LTX-2.3
    "taeh3": Variant(24, patch=2, rule="h3"),  # MiniMax H3
    "taew2_2_super": Variant(48, patch=2, decoder="super"),
    "taehv1_5_super": Variant(32, patch=2, decoder="super"),
    "taeos1_2": Variant(4, rule="opensora", latent="raw"),  # Open-Sora 1.2; this project's own
}


class TAEHV(VideoAutoencoder):
    """A tiny VideoAutoencoder with a deterministic encoder.

    variant: a key of VARIANTS, such as taew2_1. decoder_time_upscale, decoder_space_upscale: which of the three stages
    double the frame rate and the sides (two time flags are those of the last two stages); None: as the variant. Leaving
    a stage out gives a cheaper preview with fewer or smaller frames; such a model decodes, but cannot be trained.
    channels, decoder_channels: widths; None as published. decoder_blocks, decoder_hidden: blocks of each of the
    decoder's three stages, and the channels inside them (of a super decoder, of its bottlenecks; a wide one has none);
    None as published.
    latent: raw or normalized; None as the variant.
    latents_mean, latents_std: of raw latents, per channel, for `normalize`; normalized latents take none.
    chunk_latents: code clips in chunks of this many latents, which changes memory, not results; None: at once.
    gradient_checkpointing: recompute each block in backward. pixel_channels: of videos, see docs/models.md.

    Frames that it takes: see taehv_frames. Weights start from torch's defaults, the decoder's last bias from 0.5,
    mid-grey in the network's own range [0, 1].
    Raises ValueError if the arguments do not fit together.
    """

    cached_steps = True

    @check_arguments
    def __init__(
        self,
        *,
        variant: str,
        decoder_time_upscale: Flags | None = None,
        decoder_space_upscale: Flags | None = None,
        channels: Width = 64,
        decoder_channels: Widths | None = None,
        decoder_blocks: Depths | None = None,
        decoder_hidden: Widths | None = None,
        latent: Literal["raw", "normalized"] | None = None,
        latents_mean: Sequence[Mean] | None = None,
        latents_std: Sequence[Deviation] | None = None,
        chunk_latents: Count | None = None,
        gradient_checkpointing: bool = False,
        pixel_channels: PixelChannels = 3,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}; use one of {', '.join(VARIANTS)}")
        kind = VARIANTS[variant]
        time = _time_flags(variant, decoder_time_upscale)
        space = _space_flags(variant, decoder_space_upscale)
        widths = per_stage("decoder_channels", decoder_channels, WIDTHS[kind.decoder])
        counts = per_stage("decoder_blocks", decoder_blocks, BLOCKS)
        hidden = per_stage("decoder_hidden", decoder_hidden, (None,) * 3)
        self.encoder = blocks.encoder(pixel_channels, kind.patch, channels, kind.latent_channels, kind.time_down)
        settings = (kind.latent_channels, widths, pixel_channels, kind.patch, time)
        if kind.decoder == "super":
            self.decoder = blocks.super_decoder(*settings, counts, hidden)
        else:
            self.decoder = blocks.decoder(*settings, space, counts, hidden, wide=kind.decoder == "wide")
        nn.init.constant_(self.decoder[-1].bias, 0.5)
        self.variant = variant
        self.patch = kind.patch
        self.pixel_channels = pixel_channels
        self.rule = RULES[kind.rule]
        self.latent = latent or kind.latent
        self.chunk_latents = chunk_latents
        self.gradient_checkpointing = gradient_checkpointing
        self.time_upscale = 2 ** sum(time)
        self.space_shrink = 2 ** (3 - sum(space))
        self.spec = LatentSpec(
            kind.latent_channels,
            2 ** sum(kind.time_down),
            8 * kind.patch,
            causal=kind.rule not in LOOK_AHEAD,
            **self.register_latent_stats(latents_mean, latents_std, kind.latent_channels),
        )

    @property
    def decimated(self) -> bool:
        """Whether the decoder returns fewer or smaller frames than the encoder takes."""
        return self.time_upscale < self.spec.time_stride or self.space_shrink > 1

    def encode(self, video: Tensor) -> Delta:
        """[B, 3, T, H, W] -> latents, [B, C, t, h, w]."""
        check_video(video, self.pixel_channels)
        plan = self.plan(video.shape[2])
        video = pad_space(extend_time(video, sum(frames for _, frames in plan.encoder)), self.spec.space_stride)
        latents = []
        cache = None
        for start, stop in self._chunks(plan.latents):
            count = count_frames(plan.encoder, self.spec.time_stride, start, stop)
            z, cache = self.encode_planned(video[:, :, :count], plan, start, stop, cache)
            video = video[:, :, count:]
            latents.append(z)
        return Delta(torch.cat(latents, 2))

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Latents [B, C, t, h, w] -> video, not clamped.

        num_frames: of the encoded clip. A decimated decoder returns fewer frames, the last of each group.
        """
        check_latents(z, self.spec.channels)
        frames = longest_clip(self.rule, z.shape[2], self.spec.time_stride) if num_frames is None else num_frames
        if frames is None:
            raise ValueError(f"no number of frames fits {plural(z.shape[2], 'latent frame')} of {self.variant}")
        self.check_frames(frames, z.shape[2], f" of {self.variant}")
        plan = self.plan(frames)
        videos = []
        cache = None
        for start, stop in self._chunks(plan.latents):
            video, cache = self.decode_planned(z[:, :, start:stop], plan, start, cache)
            videos.append(video)
        return torch.cat(videos, 2)[:, :, : self.frames_shown(frames)]

    def forward(self, video: Tensor, **options: Any) -> Reconstruction:
        """See VideoAutoencoder.forward. Raises ValueError for a decimated decoder in training mode."""
        if self.decimated and self.training:
            raise ValueError("a decoder without all of its upscaling cannot be trained; leave decoder_*_upscale out")
        out = super().forward(video, **options)
        if self.space_shrink > 1 and out.video is not None:
            height, width = (-(-side // self.space_shrink) for side in video.shape[-2:])
            out.video = out.video[..., :height, :width]
        return out

    def encode_planned(
        self, video: Tensor, plan: FramePlan, start: int, stop: int, cache: Cache | None, size: int | None = None
    ) -> tuple[Tensor, Cache | None]:
        """Latents start..stop - 1 of a clip, and the cache. video: the frames that the plan reads for them.

        size: latents of each call of encode_chunk; the last call's frames are extended, and its cache is of no use.
        None: one call per run. Rules whose encoder starts again within a video go latent by latent.
        """
        stride = self.spec.time_stride
        if size is not None and self.spec.causal:  # as the rules of several runs are
            size = 1
        latents = []
        for new_run, lead, frames in split_runs(plan.encoder, stride, start, stop):
            chunk, video = video[:, :, :frames], video[:, :, frames:]
            black = chunk.new_full((), -1.0).expand(*chunk.shape[:2], lead, *chunk.shape[3:])
            chunk = torch.cat([black, chunk], 2) if lead else chunk
            z, cache = _in_pieces(self.encode_chunk, chunk, None if new_run else cache, size and size * stride)
            latents.append(z)
        return torch.cat(latents, 2), cache

    def decode_planned(
        self, z: Tensor, plan: FramePlan, start: int, cache: Cache | None, size: int | None = None
    ) -> tuple[Tensor, Cache]:
        """The frames that the plan shows for a clip's latents z, the first of which is `start`, and the cache.

        size: latents of each call of decode_chunk, as in encode_planned; None: one call.
        """
        stride, grow = self.spec.time_stride, self.time_upscale
        video, cache = _in_pieces(self.decode_chunk, z, cache, size)
        shown = []
        for _, lead, frames in split_runs(plan.decoder, stride, start, start + z.shape[2]):
            raw, video = video.tensor_split([(lead + frames) // stride * grow], 2)
            shown.append(raw[:, :, lead * grow // stride :])
        return shown[0] if len(shown) == 1 else torch.cat(shown, 2), cache

    def encode_chunk(self, video: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Latents of the next n * time_stride raw frames, and the cache for the chunk after.

        Sides must be multiples of the space stride. cache: None at the start, for zeros.
        """
        return self._step(self.encoder, self._latents, video, cache, self.spec.time_stride)

    def decode_chunk(self, z: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """time_upscale raw frames per latent, not clamped, and the cache for the chunk after; see encode_chunk."""
        return self._step(self.decoder, self._pixels, z, cache, 1)

    def _step(self, part: nn.Module, step: Step, x: Tensor, cache: Cache | None, unit: int) -> tuple[Tensor, Cache]:
        """Code a chunk. unit: frames of x per latent.

        Without gradients a CPU codes one latent at a time, and the last layers one frame at a time: more exceed its
        caches and take longer, and oneDNN sums in another order for another number of frames, so results would depend
        on the chunks.
        With gradient checkpointing a clip coded at once keeps the input of every block. A clip in chunks keeps only
        their caches, and each chunk is recomputed as a whole in backward.
        """
        if _one_by_one(x):
            outputs = []
            for chunk in x.split(unit, 2):
                y, cache = step(chunk, cache, False)
                outputs.append(y)
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2), cache
        recompute = self.gradient_checkpointing and self.tiling is None and needs_grad(part, x)
        single = self.clip_latents is None
        return maybe_checkpoint(step, x, cache, recompute and single, enabled=recompute and not single)

    def _latents(self, video: Tensor, cache: Cache | None, recompute: bool) -> tuple[Tensor, Cache]:
        x = rearrange(video.to(self.encoder[0].weight.dtype) / 2 + 0.5, "b c t h w -> (t b) c h w")
        x = F.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last)
        if self.tiling is None:
            x, cache = run_layers(self.encoder, x, len(video), cache, recompute)
            return self.as_video(x, len(video)), cache
        cut = blocks.tile_cut(self.encoder, self.tiling.exact, down=True)
        tiled, whole = self.encoder[:cut], self.encoder[cut:]

        def step(tile: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
            return run_layers(tiled, tile, len(video), cache)

        caches, cache = cache or (None, None)
        unit = self.spec.space_stride // self.patch
        x, caches = self.tiling("encoder", step, x, caches, unit, unit // 4 if self.tiling.exact else 1)
        x, cache = run_layers(whole, x, len(video), cache)
        return self.as_video(x, len(video)), (caches, cache)

    def _pixels(self, z: Tensor, cache: Cache | None, recompute: bool) -> tuple[Tensor, Cache]:
        x = rearrange(z.to(self.decoder[-1].weight.dtype), "b c t h w -> (t b) c h w")
        x = x.contiguous(memory_format=torch.channels_last)
        last = 1 + max(i for i, layer in enumerate(self.decoder) if isinstance(layer, blocks.TGrow))

        def step(x: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
            x, cache = run_layers(self.decoder[cut:last], x, len(z), cache, recompute)
            batches = x.split(1) if _one_by_one(x) else [x]
            y = torch.cat([maybe_checkpoint(self.decoder[last:], frames, enabled=recompute) for frames in batches])
            return y, cache

        cut = 0
        if self.tiling is None:
            x, cache = step(x, cache)
        else:
            cut = min(last, blocks.tile_cut(self.decoder, self.tiling.exact, down=False))
            caches, cache = cache or (None, None)
            x, cache = run_layers(self.decoder[:cut], x, len(z), cache)
            unit = self.spec.space_stride // self.space_shrink // self.patch
            x, caches = self.tiling("decoder", step, x, caches, x.shape[-1] // z.shape[-1], unit)
            cache = caches, cache
        return self.as_video(2 * F.pixel_shuffle(x, self.patch) - 1, len(z)), cache

    def _chunks(self, latents: int) -> list[tuple[int, int]]:
        """(start, stop) of the latents that are coded at once."""
        size = self.clip_latents
        if size is None:  # not a loop over a length that torch.compile would have to know
            return [(0, latents)]
        return [(start, min(start + size, latents)) for start in range(0, latents, size)]

    def stream(self, height: int, width: int, memory_gib: float | None = None) -> PlannedStream:
        """Chunks of `chunk_latents`, or of as many latents as decode in `memory_gib` in fp32, at most MAX_CHUNK.

        Raises ValueError for a decimated decoder.
        """
        if self.decimated:
            raise ValueError("a decoder without all of its upscaling does not reconstruct; leave decoder_*_upscale out")
        height, width = self.coded_size(height, width)
        fitting = chunk_within(memory_gib, lambda latents: self.chunk_memory(latents, height, width), MAX_CHUNK)
        return PlannedStream(self, self.chunk_latents or fitting)

    def chunk_memory(self, latents: int, height: int, width: int) -> int:
        """Estimated bytes for decoding a chunk in fp32, with the cache but without weights: those of the last stage."""
        pixels = height * width // self.patch**2
        return int(4 * pixels * self.decoder[-1].in_channels * (3 + 3.3 * latents * self.time_upscale))

    def plan(self, frames: int) -> FramePlan:
        """Which frames the network reads and shows for a clip of this length."""
        return self.rule(frames, self.spec.time_stride)

    def frames_shown(self, frames: int) -> int:
        """Frames that a clip is decoded to: all of them, unless the decoder is decimated in time."""
        count = 0
        for _, length in self.plan(frames).decoder:
            count -= -min(length, frames) * self.time_upscale // self.spec.time_stride
            frames -= min(length, frames)
        return count

    def pixel_layers(self) -> PixelLayers:
        last = f"decoder.{len(self.decoder) - 1}"
        return PixelLayers(["encoder.0.weight"], [f"{last}.weight", f"{last}.bias"], grey=0.5)

    def as_video(self, features: Tensor, clips: int) -> Tensor:
        """A layer's output for `clips` clips, [T * B, C, H, W], as [B, C, T, H, W]."""
        return rearrange(features, "(t b) c h w -> b c t h w", b=clips)

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        return {"encoder": [self.encoder], "decoder": [self.decoder]}

    def last_layers(self) -> list[nn.Parameter]:
        return [self.decoder[-1].weight]

    def frames_valid(self, frames: int) -> bool:
        return frames >= 1 and self.plan(frames).frames == frames

    def latent_frames(self, frames: int) -> int:
        return self.plan(frames).latents


class PlannedStream:
    """Like CausalStream, for TAEHV, whose frame rules depend on the video's length.

    Where latents depend on frames after those that they are decoded to, each chunk comes with these frames
    (`lookahead`). They are encoded at once, and the next call, which is given them again, skips them.
    With the model's fixed_chunks, encode_chunk and decode_chunk are called for chunk_latents latents whatever the
    video's length: with and without a cache, two shapes each.
    """

    def __init__(self, model: TAEHV, chunk_latents: int) -> None:
        self.model = model
        self.chunk_latents = chunk_latents
        self.lookahead = 0 if model.spec.causal else model.spec.time_stride - 1
        self._chunks: Iterator[tuple[int, int]] = iter(())  # (frames, latents up to the chunk's end)

    def chunks(self, frames: int) -> list[int]:
        stride = self.model.spec.time_stride
        self._plan = plan = self.model.plan(frames)
        ends = {}  # frame -> latent
        for latents in [*range(self.chunk_latents, plan.latents, self.chunk_latents), plan.latents]:
            ends[min(frames, count_frames(plan.decoder, stride, 0, latents))] = latents
        lengths = [end - start for start, end in pairwise([0, *ends])]
        self._chunks = iter(list(zip(lengths, ends.values(), strict=True)))
        self._shown = 0  # frames
        self._encoded = 0  # frames
        self._latents = 0
        self._encoder_cache = None
        self._decoder_cache = None
        return lengths

    def __call__(self, video: Tensor, *, sample: bool = False, generator: Generators = None) -> Reconstruction:
        """Raises ValueError for more chunks than `chunks` returned, and for a chunk of another length."""
        frames, latents = next(self._chunks, (0, 0))
        height, width = video.shape[-2:]
        if not frames or not frames <= video.shape[2] <= frames + self.lookahead:
            raise ValueError(
                f"the chunk has {plural(video.shape[2], 'frame')}; chunks() gave it {frames}, with at most "
                f"{self.lookahead} more as lookahead"
            )
        model, plan = self.model, self._plan
        count = count_frames(plan.encoder, model.spec.time_stride, self._latents, latents)
        video = pad_space(video, model.spec.space_stride)
        new = video[:, :, self._encoded - self._shown :]  # not encoded as lookahead before
        if not new.shape[2]:
            new = video[:, :, -1:]
        new = extend_time(new, count)[:, :, :count]
        size = self.chunk_latents if model.fixed_chunks else None
        z, self._encoder_cache = model.encode_planned(new, plan, self._latents, latents, self._encoder_cache, size)
        rec, self._decoder_cache = model.decode_planned(z, plan, self._latents, self._decoder_cache, size)
        self._encoded += count
        self._shown += frames
        self._latents = latents
        return Reconstruction(rec[:, :, :frames, :height, :width], Delta(z), z)


def _in_pieces(
    step: Callable[[Tensor, Cache | None], tuple[Tensor, Cache]], x: Tensor, cache: Cache | None, size: int | None
) -> tuple[Tensor, Cache]:
    """step on `size` frames of x at a time; the last piece is extended, and its result cropped. size None: at once."""
    if size is None:
        return step(x, cache)
    outputs = []
    for piece in x.split(size, 2):
        y, cache = step(extend_time(piece, size), cache)
        outputs.append(y[:, :, : y.shape[2] * piece.shape[2] // size])
    return torch.cat(outputs, 2), cache


def _one_by_one(x: Tensor) -> bool:
    """Whether independent frames are coded one at a time; see TAEHV._step. Compiled, a loop over frames would be a
    graph of its own for each number of frames."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _time_flags(variant: str, flags: Sequence[bool] | None) -> tuple[bool, ...]:
    published = VARIANTS[variant].time_up
    flags = published if flags is None else tuple(flags)
    flags = (False, *flags) if len(flags) == 2 else flags
    if len(flags) != 3:
        raise ValueError(f"decoder_time_upscale has {plural(len(flags), 'entry')}; give 3, or 2 for the last stages")
    added = [str(stage) for stage in range(3) if flags[stage] and not published[stage]]
    if added:
        raise ValueError(
            f"decoder_time_upscale: stage {', '.join(added)} of {variant} has no weights to double the frame rate; "
            "set it to false"
        )
    return flags


def _space_flags(variant: str, flags: Sequence[bool] | None) -> tuple[bool, ...]:
    flags = (True, True, True) if flags is None else tuple(flags)
    if len(flags) != 3:
        raise ValueError(f"decoder_space_upscale has {plural(len(flags), 'entry')}; give 3")
    if VARIANTS[variant].decoder == "super" and not all(flags):
        raise ValueError(
            f"decoder_space_upscale: the super decoder of {variant} upsamples with learned weights, which cannot be "
            "left out; use three times true, or a variant with the base decoder"
        )
    return flags
