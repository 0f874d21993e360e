"""What differs between the autoencoders of diffusers: a table, and functions where data does not suffice.

`models/autoencoders/` of huggingface/diffusers 0.42; each class was read there. CLASSES has those that DiffusersVAE
runs, NOT_SERVED the others, with reasons. A class of a newer diffusers that is in neither fails
tests/models/test_diffusers_classes.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.models.layers.frames import clips_of, frames_of
from vae3d.types import Delta, Posterior, cat_posteriors

Coded = Posterior | Delta
Model = Any  # a DiffusersVAE, which imports this module
Cache = Any  # of a step: what it needs of earlier chunks; None before the first


@dataclass(frozen=True)
class FrameRule:
    """Which clips a network takes.

    is_valid: of a number of frames. latents: latent frames of a valid clip. frames: of a number of latent frames, as
    the network decodes them; 0 for a number that no clip has. text: in words, for errors; "": as its FrameRules.
    """

    is_valid: Callable[[int], bool]
    latents: Callable[[int], int]
    frames: Callable[[int], int]
    text: str = ""


@dataclass(frozen=True)
class FrameRules:
    """The frame rule of a class: build(vae, stride) -> FrameRule. text: in words, for docs."""

    text: str
    build: Callable[[nn.Module, int], FrameRule]

    def __call__(self, vae: nn.Module, stride: int) -> FrameRule:
        rule = self.build(vae, stride)
        return rule if rule.text else replace(rule, text=self.text.replace("n x stride", f"{stride} n"))


def frame_rules(text: str) -> Callable[[Callable[[nn.Module, int], FrameRule]], FrameRules]:
    """Decorate a function (vae, stride) -> FrameRule."""
    return lambda build: FrameRules(text, build)


@frame_rules("any")
def any_number(vae: nn.Module, stride: int) -> FrameRule:
    return FrameRule(lambda n: n >= 1, lambda n: n, lambda t: t)


@frame_rules("1 + n x stride")
def one_plus(vae: nn.Module, stride: int) -> FrameRule:
    return FrameRule(
        lambda n: n >= 1 and (n - 1) % stride == 0,
        lambda n: 1 + (n - 1) // stride,
        lambda t: 1 + (t - 1) * stride,
    )


@frame_rules("n x stride")
def multiples(vae: nn.Module, stride: int) -> FrameRule:
    return FrameRule(lambda n: n >= 1 and n % stride == 0, lambda n: n // stride, lambda t: t * stride)


@frame_rules("8 n, 1 + 8 n")
def _cogvideox(vae: nn.Module, stride: int) -> FrameRule:
    """diffusers encodes 8 frames and decodes 2 latents at once, and returns other clips misaligned and of another
    length: 12 frames as 9, 13 as 16."""
    if stride != 4:
        raise ValueError(f"temporal_compression_ratio is {stride}; diffusers' chunks of 8 frames need 4")
    return FrameRule(
        lambda n: n >= 1 and n % 8 in (0, 1),
        lambda n: -(-n // 4),
        lambda t: 1 + 4 * (t - 1) if t % 2 else 4 * t,
    )


@frame_rules("1 + n x stride, without 21 + 16 n")
def _kvae_video(vae: nn.Module, stride: int) -> FrameRule:
    """A last chunk of one latent is decoded to one frame, as if it were the first: 21 frames come back as 18."""
    rule = one_plus(vae, stride)

    def is_valid(frames: int) -> bool:
        return rule.is_valid(frames) and not (frames > 17 and (frames - 1) % 16 == stride)

    return FrameRule(is_valid, rule.latents, rule.frames)


@frame_rules("1 + n x stride")
def _vidtok(vae: nn.Module, stride: int) -> FrameRule:
    """Networks that are not causal take whole batches of frames."""
    if vae.is_causal:
        return one_plus(vae, stride)
    size = vae.num_sample_frames_batch_size
    return FrameRule(lambda n: n >= 1 and n % size == 0, lambda n: n // stride, lambda t: t * stride, f"{size} n")


@frame_rules("5 + 17 n, from 22")
def _minimax(vae: nn.Module, stride: int) -> FrameRule:
    """Clips of clip_length frames, encoded each by itself; the last token_drop latents are dropped."""
    clip, tokens = vae.config.clip_length, vae.tokens_chunk_size
    frames, latents = vae.frame_overlap, vae.token_overlap
    if vae.config.token_drop == 0:
        raise ValueError("token_drop is 0; only clips that overlap are supported")
    return FrameRule(
        lambda n: n > frames and (n - frames) % clip == 0,
        lambda n: latents + (n - frames) // clip * tokens,
        lambda t: 0 if t <= latents or (t - latents) % tokens else frames + (t - latents) // tokens * clip,
        f"{frames} + {clip} n, from {frames + clip}",
    )


# ---- chunks: how many latents each chunk of a clip of t latents has


def whole(model: Model, latents: int) -> list[int]:
    return [latents]


def frame_batches(model: Model, latents: int) -> list[int]:
    """Of single frames, coded model.frame_batch at a time."""
    return _split(latents, model.frame_batch or latents, model.frame_batch or latents)


def _one_by_one(model: Model, latents: int) -> list[int]:
    return [1] * latents


def _pairs(model: Model, latents: int) -> list[int]:
    return _split(latents, 2 + latents % 2, 2)


def _segments(model: Model, latents: int) -> list[int]:
    """17 frames, then 16 at a time."""
    size = 16 // model.spec.time_stride
    return _split(latents, size + 1, size)


def _split(total: int, first: int, size: int) -> list[int]:
    starts = [0, *range(first, total, size), total]
    return [stop - start for start, stop in zip(starts, starts[1:], strict=False)]


# ---- steps: (model, chunk, cache) -> (coded chunk, cache)


def _encode(model: Model, x: Tensor, cache: Cache) -> tuple[Coded, Cache]:
    return _coded(model.vae.encode(x)), None


def _decode(model: Model, z: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    return _sample(model.vae.decode(z)), None


def _coded(output: Any) -> Coded:
    """The latents of what an `encode` returns: AutoencoderKLOutput, EncoderOutput, AutoencoderTinyOutput, a tuple."""
    if hasattr(output, "latent_dist"):
        distribution = output.latent_dist
        if hasattr(distribution, "logvar"):
            return Posterior.from_moments(distribution.parameters)
        return _point(distribution.mode())  # Cosmos' IdentityDistribution
    if isinstance(output, tuple):
        return _point(output[0])
    return _point(output.latent if hasattr(output, "latent") else output.latents)


def _point(z: Tensor) -> Delta:
    """In fp32 or better, as a Posterior."""
    return Delta(z.to(torch.promote_types(z.dtype, torch.float32)))


def _sample(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.sample


def _encode_frames(model: Model, x: Tensor, cache: Cache) -> tuple[Coded, Cache]:
    return _in_clips(_coded(model.vae.encode(_channels_last(frames_of(x)))), len(x)), None


def _in_clips(coded: Coded, clips: int) -> Coded:
    """Coded frames [B * T, C, h, w] as [B, C, T, h, w]."""
    return type(coded)(**{name: clips_of(tensor, clips) for name, tensor in vars(coded).items()})


def _decode_frames(model: Model, z: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    return clips_of(_sample(model.vae.decode(_channels_last(frames_of(z)))), len(z)), None


def _decode_temporal(model: Model, z: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    return clips_of(model.vae.decode(frames_of(z), num_frames=z.shape[2]).sample, len(z)), None


def _channels_last(frames: Tensor) -> Tensor:
    return frames.contiguous(memory_format=torch.channels_last)


def _decode_ltx(model: Model, z: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """With the timestep that some LTX decoders are conditioned on."""
    vae = model.vae
    if not vae.config.timestep_conditioning:
        return vae.decode(z).sample, None
    return vae.decode(z, z.new_full((len(z),), model.decode_timestep)).sample, None


def _encode_wan(model: Model, x: Tensor, cache: Cache) -> tuple[Coded, Cache]:
    """One latent. The class's own loop, without a state that recomputation in backward would change."""
    vae = model.vae
    patchify, _ = _patching(vae)
    cache = [None] * vae._cached_conv_counts["encoder"] if cache is None else list(cache)
    moments = vae.encoder(patchify(x), feat_cache=cache, feat_idx=[0])
    return Posterior.from_moments(vae.quant_conv(moments)), cache


def _decode_wan(model: Model, z: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """One latent, not clamped, as the class's own loop is in the end."""
    vae = model.vae
    _, unpatchify = _patching(vae)
    first = {"first_chunk": cache is None} if model.kind != "AutoencoderKLQwenImage" else {}
    cache = [None] * vae._cached_conv_counts["decoder"] if cache is None else list(cache)
    video = vae.decoder(vae.post_quant_conv(z), feat_cache=cache, feat_idx=[0], **first)
    return unpatchify(video), cache


def _patching(vae: nn.Module) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Pixels to patches and back, by the functions of the class's module."""
    size, module = vae.config.get("patch_size"), sys.modules[type(vae).__module__]
    if size is None:
        return (lambda x: x), (lambda x: x)
    name = "patchify" if hasattr(module, "patchify") else "_patchify"
    inverse = name.replace("patchify", "unpatchify")
    return (lambda x: getattr(module, name)(x, patch_size=size)), (
        lambda x: getattr(module, inverse)(x, patch_size=size)
    )


def _encode_wan_frames(model: Model, x: Tensor, cache: Cache) -> tuple[Coded, Cache]:
    coded, _ = _encode_wan(model, frames_of(x)[:, :, None], None)
    return _in_clips(type(coded)(**{name: tensor[:, :, 0] for name, tensor in vars(coded).items()}), len(x)), None


def _decode_wan_frames(model: Model, z: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    video, _ = _decode_wan(model, frames_of(z)[:, :, None], None)
    return clips_of(video[:, :, 0], len(z)), None


def _encode_cogvideox(model: Model, x: Tensor, cache: Cache) -> tuple[Coded, Cache]:
    moments, cache = model.vae.encoder(x, conv_cache=cache)
    quant_conv = model.vae.quant_conv
    return Posterior.from_moments(moments if quant_conv is None else quant_conv(moments)), cache


def _decode_cogvideox(model: Model, z: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    post_quant_conv = model.vae.post_quant_conv
    return model.vae.decoder(z if post_quant_conv is None else post_quant_conv(z), conv_cache=cache)


def _encode_magvit(model: Model, x: Tensor, cache: Cache) -> tuple[Coded, Cache]:
    moments, cache = _with_features(model.vae.encoder, x, cache)
    return Posterior.from_moments(model.vae.quant_conv(moments)), cache


def _decode_magvit(model: Model, z: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    return _with_features(model.vae.decoder, model.vae.post_quant_conv(z), cache)


def _with_features(network: nn.Module, x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """network(x), whose layers keep past frames in `prev_features`: set from the cache, collected, and removed."""
    layers = [module for module in network.modules() if hasattr(module, "prev_features")]
    try:
        for layer, features in zip(layers, cache or [None] * len(layers), strict=True):
            layer.prev_features = features
        return network(x), [layer.prev_features for layer in layers]
    finally:
        for layer in layers:
            layer.prev_features = None


def _encode_allegro(model: Model, x: Tensor, cache: Cache) -> tuple[Coded, Cache]:
    """The whole clip; the class itself only codes tiles of 24 x 320 x 320 and blends them."""
    moments = model.vae.encoder(x)
    return Posterior.from_moments(clips_of(model.vae.quant_conv(frames_of(moments)), len(x))), None


def _decode_allegro(model: Model, z: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    return model.vae.decoder(clips_of(model.vae.post_quant_conv(frames_of(z)), len(z))), None


def _encode_kvae_video(model: Model, x: Tensor, cache: Cache) -> tuple[Coded, Cache]:
    cache = model.vae._make_encoder_cache() if cache is None else _copy(cache)
    mean, _ = model.vae.encoder(x, cache).chunk(2, 1)  # the class drops the variance, too
    return _point(mean), cache


def _decode_kvae_video(model: Model, z: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    cache = model.vae._make_decoder_cache() if cache is None else _copy(cache)
    return model.vae.decoder(z, cache), cache


def _encode_kandinsky(model: Model, x: Tensor, cache: Cache) -> tuple[Coded, Cache]:
    cache = model.vae.encoder.make_cache() if cache is None else _copy(cache)
    return Posterior.from_moments(model.vae.encoder(x, cache)), cache


def _decode_kandinsky(model: Model, z: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    cache = model.vae.decoder.make_cache() if cache is None else _copy(cache)
    return model.vae.decoder(z, cache), cache


def _copy(cache: Cache) -> Cache:
    """A cache with the same tensors, whose dicts and lists can be changed."""
    if isinstance(cache, dict):
        return {key: _copy(item) for key, item in cache.items()}
    return [_copy(item) for item in cache] if isinstance(cache, list) else cache


def _encode_each(model: Model, x: Tensor, cache: Cache) -> tuple[Coded, Cache]:
    """Clip by clip: the mask of the class's attention does not fit a batch (huggingface/diffusers#13133)."""
    return cat_posteriors([_coded(model.vae.encode(clip)) for clip in x.split(1)], 0), None


def _decode_each(model: Model, z: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    return torch.cat([_sample(model.vae.decode(clip)) for clip in z.split(1)]), None


def _encode_vidtok(model: Model, x: Tensor, cache: Cache) -> tuple[Coded, Cache]:
    """With the frames that the class's forward adds in front: copies of the first one."""
    vae = model.vae
    if vae.is_causal:
        x = torch.cat([x[:, :, :1].expand(-1, -1, vae.temporal_compression_ratio - 1, -1, -1), x], 2)
    return _coded(vae.encode(x)), None


# ---- latent statistics: (vae) -> mean and standard deviation per channel, of which normalize makes 0 and 1


def _config_stats(vae: nn.Module) -> tuple[Tensor, Tensor]:
    """diffusers' pipelines use (z - mean) * scaling_factor / std, and (z - shift) * scaling_factor without statistics.
    Statistics of several positions or latent frames of a channel are pooled."""
    config = vae.config
    mean, std, shift = config.get("latents_mean"), config.get("latents_std"), config.get("shift_factor")
    if mean is not None and shift:
        raise ValueError("the config has both shift_factor and latents_mean; remove one")
    channels = latent_channels(config)
    mean = [shift or 0.0] * channels if mean is None else mean
    std = [1.0] * channels if std is None else std
    if len(mean) != len(std) or len(mean) % channels:
        raise ValueError(f"latents_mean and latents_std have {len(mean)} and {len(std)} entries; give {channels} each")
    return _pooled(torch.tensor(mean), torch.tensor(std) / (config.get("scaling_factor") or 1.0), channels)


def _saved_stats(vae: nn.Module) -> tuple[Tensor, Tensor]:
    """Those that are saved with the weights."""
    return vae.latents_mean.float(), vae.latents_std.float() / vae.config.scaling_factor


def _batch_norm_stats(vae: nn.Module) -> tuple[Tensor, Tensor]:
    """Of FLUX.2: of every position in a patch of 2 x 2 latents."""
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return _pooled(vae.bn.running_mean, std, latent_channels(vae.config))


def _unit_stats(vae: nn.Module) -> tuple[Tensor, Tensor]:
    channels = latent_channels(vae.config)
    return torch.zeros(channels), torch.ones(channels)


def _pooled(mean: Tensor, std: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    mean, std = mean.float().view(channels, -1), std.float().view(channels, -1)
    pooled = mean.mean(1)
    return pooled, (std.square() + (mean - pooled[:, None]).square()).mean(1).sqrt()


def latent_channels(config: Mapping[str, Any]) -> int:
    names = ("latent_channels", "z_dim", "z_channels", "encoder_hidden_size")
    return next(config[name] for name in names if name in config)


# ---- strides: (vae) -> (time, space)


def _ratios(vae: nn.Module) -> tuple[int, int]:
    names = ("temporal_compression_ratio", "spatial_compression_ratio")
    time, space = (vae.config[name] if name in vae.config else getattr(vae, name) for name in names)
    return time, space


def _levels(key: str) -> Callable[[nn.Module], tuple[int, int]]:
    """Of a network of single frames, all of whose levels but one halve the sides."""
    return lambda vae: (1, 2 ** (len(vae.config[key]) - 1))


def _ltx_strides(vae: nn.Module) -> tuple[int, int]:
    """From the downsampling layers: without ratios in its config, the class counts all of them for both."""
    config, time, space = vae.config, vae.config.patch_size_t, vae.config.patch_size
    scaling = config.spatio_temporal_scaling
    scaling = [scaling] * len(config.downsample_type) if isinstance(scaling, bool) else scaling
    for down, kind in zip(scaling, config.downsample_type, strict=False):
        time *= 1 + (down and kind != "spatial")
        space *= 1 + (down and kind != "temporal")
    return time, space


def _wan_strides(vae: nn.Module) -> tuple[int, int]:
    time = vae.config.temperal_downsample
    return 2 ** sum(time), 2 ** len(time) * (vae.config.get("patch_size") or 1)


# ---- the table

PER_POSITION = ("none", "RMS norm", "LayerNorm")  # of `norm`: what sees one position only


@dataclass(frozen=True)
class DiffusersClass:
    """What DiffusersVAE must know about a class of diffusers.

    of: the models whose VAE it is. published: their latents, as channels and strides. strides: (vae) -> (time, space).
    frames: which clips it takes. chunks: latents of each chunk that a clip is coded in. exact_stream: these chunks,
    coded one after the other, are a stream with the result of the whole clip. encode, decode: steps.
    stats: mean and deviation of latents. stats_saved: they are tensors of the weight file. latent: raw, or normalized
    where the class returns the diffusion model's latents. pixels: range of the class's pixels; signed is [-1, 1], unit
    [0, 1], imagenet ImageNet's statistics. norm: what normalises, and attention; see whole_frames. causal: no latent
    depends on later frames. blocks: classes of the blocks that our gradient checkpointing recomputes; () where
    diffusers' own is used. last: the layer that outputs pixels. min_latents: of a side. fixed_size: the frames' only
    size is image_size. input_channels: that a config may have: 4 with opaque alpha, 12 of patches, 15 made by the class
    from RGB.
    open_seam: why no circular width closes a panorama's seam; "" where it does.
    needs: a package.
    """

    of: str
    published: str
    strides: Callable[[nn.Module], tuple[int, int]] = _ratios
    frames: FrameRules = one_plus
    chunks: Callable[[Model, int], list[int]] = whole
    exact_stream: bool = False
    encode: Callable[[Model, Tensor, Cache], tuple[Coded, Cache]] = _encode
    decode: Callable[[Model, Tensor, Cache], tuple[Tensor, Cache]] = _decode
    stats: Callable[[nn.Module], tuple[Tensor, Tensor]] = _config_stats
    stats_saved: bool = False
    latent: Literal["raw", "normalized"] = "raw"
    pixels: Literal["signed", "unit", "imagenet"] = "signed"
    norm: str = "GroupNorm"
    causal: bool = False
    blocks: Sequence[str] = ()
    last: str = "decoder.conv_out"
    min_latents: int = 1
    fixed_size: bool = False
    input_channels: Sequence[int] = (3,)
    open_seam: str = ""
    needs: str | None = None
    note: str = ""

    @property
    def whole_frames(self) -> str:
        """What makes a result depend on whole frames, so that tiles are not exact; "" if nothing does."""
        return " and ".join(part for part in self.norm.split(", ") if part not in PER_POSITION)


def _image(of: str, published: str, **more: Any) -> DiffusersClass:
    """A network of single frames."""
    steps = {"encode": _encode_frames, "decode": _decode_frames, "chunks": frame_batches, "exact_stream": True}
    return DiffusersClass(of, published, frames=any_number, **{"causal": True, **steps, **more})


WAN = {
    "strides": _wan_strides,
    "chunks": _one_by_one,
    "exact_stream": True,
    "encode": _encode_wan,
    "decode": _decode_wan,
    "norm": "RMS norm, attention",
    "causal": True,
}
LTX = {
    "strides": _ltx_strides,
    "decode": _decode_ltx,
    "stats": _saved_stats,
    "stats_saved": True,
    "norm": "RMS norm",
    "last": "decoder.conv_out.conv",
}
POSITIONS = "its decoder's attention depends on the positions of columns"
SEGMENTS = {"chunks": _segments, "exact_stream": True}

CLASSES: dict[str, DiffusersClass] = {
    # images
    "AutoencoderKL": _image("SD, SDXL, SD3, FLUX.1", "4 or 16, 8 x 8", strides=_levels("block_out_channels")),
    "AutoencoderKLFlux2": _image(
        "FLUX.2",
        "32, 8 x 8",
        strides=_levels("block_out_channels"),
        stats=_batch_norm_stats,
        stats_saved=True,
        note="pipelines normalise each position of a 2 x 2 patch by itself; here the four are pooled",
    ),
    "AsymmetricAutoencoderKL": _image(
        "SD, for inpainting",
        "4, 8 x 8",
        strides=_levels("down_block_out_channels"),
        blocks=("ResnetBlock2D", "Attention", "Downsample2D", "Upsample2D"),
        note="decodes without the masked image",
    ),
    "AutoencoderTiny": _image(
        "TAESD of SD, SDXL, SD3, FLUX.1",
        "4 or 16, 8 x 8",
        strides=_levels("encoder_block_out_channels"),
        stats=_unit_stats,
        latent="normalized",
        norm="none",
        blocks=("AutoencoderTinyBlock",),  # diffusers' own checkpointing forgets to scale pixels to [0, 1]
        last="decoder.layers.-1",
    ),
    "AutoencoderDC": _image(
        "Sana (DC-AE)",
        "32, 32 x 32",
        norm="RMS norm, attention",
        blocks=("ResBlock", "EfficientViTBlock", "DCDownBlock2d", "DCUpBlock2d"),
        strides=lambda vae: (1, vae.spatial_compression_ratio),
    ),
    "AutoencoderKLHunyuanImage": _image(
        "HunyuanImage 2.1",
        "64, 32 x 32",
        strides=lambda vae: (1, vae.config.spatial_compression_ratio),
        blocks=(
            "HunyuanImageResnetBlock",
            "HunyuanImageAttentionBlock",
            "HunyuanImageDownsample",
            "HunyuanImageUpsample",
        ),
    ),
    "AutoencoderKLKVAE": _image("Kandinsky (KVAE 2D)", "16, 8 x 8", strides=_levels("ch_mult")),
    "AutoencoderKLQwenImage21": _image(
        "Qwen-Image 2",
        "64, 16 x 16",
        strides=lambda vae: (1, _wan_strides(vae)[1]),
        encode=_encode_wan_frames,
        decode=_decode_wan_frames,
        norm="RMS norm, attention",
        blocks=("QwenImage21ResidualBlock", "QwenImage21AttentionBlock", "QwenImage21Resample"),
        input_channels=(3, 4),
    ),
    "AutoencoderRAE": _image(
        "RAE (DINOv2, SigLIP2, MAE)",
        "768, 16 x 16",
        strides=lambda vae: (1, vae.config.patch_size),
        stats=_unit_stats,
        latent="normalized",
        pixels="unit",
        norm="LayerNorm, attention",
        blocks=("ViTMAELayer", "Dinov2WithRegistersLayer", "SiglipEncoderLayer"),
        last="decoder.decoder_pred",
        fixed_size=True,
        open_seam=f"{POSITIONS}, and its frames are square",
        needs="transformers",
    ),
    # videos
    "AutoencoderKLLTXVideo": DiffusersClass(
        "LTX-Video",
        "128, 8 x 32 x 32",
        **LTX,
        note="the decoder is not causal; with injected noise, as in 0.9.1, its tiles are blended",
    ),
    "AutoencoderKLLTX2Video": DiffusersClass(
        "LTX-2",
        "128, 8 x 32 x 32",
        **LTX,
        min_latents=2,
    ),
    "AutoencoderKLHunyuanVideo": DiffusersClass(
        "HunyuanVideo",
        "16, 4 x 8 x 8",
        last="decoder.conv_out.conv",
        note="the class codes more than 16 frames in pieces that it blends",
    ),
    "AutoencoderKLHunyuanVideo15": DiffusersClass(
        "HunyuanVideo 1.5",
        "32, 4 x 16 x 16",
        encode=_encode_each,
        decode=_decode_each,
        norm="RMS norm, attention",
        last="decoder.conv_out.conv",
    ),
    "AutoencoderKLHunyuanImageRefiner": DiffusersClass(
        "HunyuanImage 2.1's refiner",
        "32, 1 x 16 x 16",
        strides=lambda vae: (1, vae.spatial_compression_ratio),
        frames=any_number,
        norm="RMS norm, attention",
        last="decoder.conv_out.conv",
    ),
    "AutoencoderKLCogVideoX": DiffusersClass(
        "CogVideoX",
        "16, 4 x 8 x 8",
        strides=lambda vae: (int(vae.config.temporal_compression_ratio), 2 ** (len(vae.config.block_out_channels) - 1)),
        frames=_cogvideox,
        chunks=_pairs,
        exact_stream=True,
        encode=_encode_cogvideox,
        decode=_decode_cogvideox,
        last="decoder.conv_out.conv",
        note="the class normalises chunks of 8 frames by themselves, and so do streams",
    ),
    "AutoencoderKLMochi": DiffusersClass("Mochi 1", "12, 6 x 8 x 8", last="decoder.proj_out", input_channels=(15,)),
    "AutoencoderKLWan": DiffusersClass(
        "Wan2.1, Wan2.2",
        "16, 4 x 8 x 8; 48, 4 x 16 x 16",
        **WAN,
        blocks=("WanResidualBlock", "WanAttentionBlock", "WanResample"),
        input_channels=(3, 12),
        note="`model=wan` is the same network, faster, with exact tiles and panoramas",
    ),
    "AutoencoderKLQwenImage": DiffusersClass(
        "Qwen-Image",
        "16, 4 x 8 x 8",
        **WAN,
        blocks=("QwenImageResidualBlock", "QwenImageAttentionBlock", "QwenImageResample"),
        input_channels=(3, 4),
        note="also `model=wan stage.init_from=FOLDER`, faster, with exact tiles and panoramas; of 4 channels with "
        "`model.pixel_channels=4`, which codes alpha, too",
    ),
    "AutoencoderKLCosmos": DiffusersClass(
        "Cosmos 1",
        "16, 8 x 8 x 8",
        norm="GroupNorm per frame, attention",
        last="decoder.conv_out.conv_t",
        note="pipelines normalise each latent frame by itself; here the frames are pooled",
    ),
    "AutoencoderKLMagvit": DiffusersClass(
        "EasyAnimate",
        "16, 4 x 8 x 8",
        chunks=_one_by_one,
        exact_stream=True,
        encode=_encode_magvit,
        decode=_decode_magvit,
        blocks=("EasyAnimateResidualBlock3D", "EasyAnimateDownsampler3D", "EasyAnimateUpsampler3D"),
    ),
    "AutoencoderKLAllegro": DiffusersClass(
        "Allegro",
        "4, 4 x 8 x 8",
        strides=lambda vae: (int(vae.config.temporal_compression_ratio), vae.spatial_compression_ratio),
        frames=multiples,
        encode=_encode_allegro,
        decode=_decode_allegro,
        note="coded as a whole; the class blends tiles of 24 x 320 x 320, with equal results for one tile",
    ),
    "AutoencoderKLKVAEVideo": DiffusersClass(
        "Kandinsky (KVAE 3D)",
        "16, 4 x 8 x 8",
        strides=lambda vae: (vae.config.temporal_compress_times, 2 ** (len(vae.config.ch_mult) - 1)),
        frames=_kvae_video,
        **SEGMENTS,
        encode=_encode_kvae_video,
        decode=_decode_kvae_video,
        blocks=("KVAECachedResnetBlock3D", "KVAECachedPXSDownsample", "KVAECachedPXSUpsample"),
        last="decoder.conv_out.conv",
        note="deterministic: the class drops the variance",
    ),
    "Kandinsky6SRVAE": DiffusersClass(
        "Kandinsky 6",
        "64, 4 x 16 x 16",
        **SEGMENTS,
        encode=_encode_kandinsky,
        decode=_decode_kandinsky,
        norm="RMS norm",
        causal=True,
        blocks=("Kandinsky6SRResnetBlock3D", "Kandinsky6SRDownsample", "Kandinsky6SRUpsample"),
        last="decoder.conv_out.conv",
    ),
    "AutoencoderVidTok": DiffusersClass(
        "VidTok",
        "4, 4 x 8 x 8",
        strides=lambda vae: (vae.temporal_compression_ratio, 2 ** len(vae.encoder.spatial_ds)),
        frames=_vidtok,
        encode=_encode_vidtok,
        norm="LayerNorm, attention",
        last="decoder.conv_out.conv",
        note="regularizer=fsq: its quantised latents, with gradients passed through",
    ),
    "AutoencoderKLMiniMaxH3": DiffusersClass(
        "MiniMax-H3",
        "24, 4 x 16 x 16",
        frames=_minimax,
        pixels="imagenet",
        norm="LayerNorm, attention",
        last="decoder.proj_out",
        min_latents=2,
        open_seam=POSITIONS,
        note="the class blends overlapping clips, and tiles of frames above 256 x 256",
    ),
    "AutoencoderKLTemporalDecoder": DiffusersClass(
        "Stable Video Diffusion",
        "4, 8 x 8",
        strides=_levels("block_out_channels"),
        frames=any_number,
        encode=_encode_frames,
        decode=_decode_temporal,
        last="decoder.time_conv_out",
        note="images are encoded one by one, and decoded together",
    ),
}
AUDIO = "an autoencoder of sound"
NOT_SERVED: dict[str, str] = {
    "VQModel": "discrete codes, which need a commitment loss to train",
    "ConsistencyDecoderVAE": "decodes by sampling from a diffusion model",
    "LTX2VideoDiffusionDecoderModel": "a diffusion decoder without an encoder",
    "RFD4ProteinaAutoencoder": "an autoencoder of proteins",
    "MiniMaxMusic3Vocoder": "a vocoder of sound",
    "MMAudioVocoder": "a vocoder of sound",
    **dict.fromkeys(
        (
            "AutoencoderKLKVAEAudio", "AutoencoderKLLTX2Audio", "AutoencoderKLMiniMaxH3Audio", "AutoencoderOobleck",
            "AutoencoderSAME", "Cosmos3AVAEAudioTokenizer", "LongCatAudioDiTVae", "MMAudioVAE",
        ),
        AUDIO,
    ),
}  # fmt: skip

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def to_pixels(video: Tensor, kind: str) -> Tensor:
    """Pixels in [-1, 1] to those of a class."""
    if kind == "signed":
        return video
    unit = video / 2 + 0.5
    return unit if kind == "unit" else (unit - _imagenet(IMAGENET_MEAN, video)) / _imagenet(IMAGENET_STD, video)


def from_pixels(video: Tensor, kind: str) -> Tensor:
    """Inverse of to_pixels."""
    if kind == "signed":
        return video
    unit = video if kind == "unit" else video * _imagenet(IMAGENET_STD, video) + _imagenet(IMAGENET_MEAN, video)
    return 2 * unit - 1


def _imagenet(values: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(values)[:, None, None, None]


def with_alpha(video: Tensor, channels: int) -> Tensor:
    """RGB with opaque alpha, for a network of four channels."""
    return F.pad(video, (0, 0, 0, 0, 0, 0, 0, 1), value=1.0) if channels == 4 else video
