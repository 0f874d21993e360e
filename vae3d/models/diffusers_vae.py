"""The VAEs of CogVideoX and HunyuanVideo, wrapped from diffusers; mainly as teachers for distillation.

`models/autoencoders/autoencoder_kl_cogvideox.py` and `autoencoder_kl_hunyuan_video.py` of huggingface/diffusers;
CogVideoX, arXiv 2408.06072; HunyuanVideo, arXiv 2412.03603.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Annotated, Any, Literal, TypedDict, get_args

from torch import Tensor, nn

from vae3d.arguments import (
    Count,
    Depth,
    Deviation,
    Mean,
    Range,
    Width,
    Widths,
    annotations_of,
    check_arguments,
    check_fields,
    short,
)
from vae3d.errors import UserError
from vae3d.models.interface import VideoAutoencoder
from vae3d.models.layers.frames import extend_time, pad_space
from vae3d.models.streaming import IndependentChunks
from vae3d.pixels import check_latents, check_video
from vae3d.text import plural
from vae3d.types import LatentSpec, Posterior

log = logging.getLogger("vae3d")
Kind = Literal["AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo"]
KINDS = COGVIDEOX, HUNYUAN = get_args(Kind)


class DiffusersVAE(VideoAutoencoder):
    """A VAE of diffusers, whose state-dict keys get the prefix `vae.`.

    kind: one of KINDS. config: the content of its config.json. Keys that the installed diffusers does not have are
    skipped with a warning. Inputs are cast to the dtype of the weights.

    Frames: CogVideoX takes 8 n or 8 n + 1: diffusers encodes 8 frames and decodes 2 latents at once, and returns other
    clips misaligned and of another length (12 frames as 9, 13 as 16). HunyuanVideo takes 1 + 4 n, beyond 16 in chunks
    that it blends.
    `normalize` returns the video latents that the diffusion model sees. invert_scale_latents, a setting for the first
    image of image-to-video models, is ignored.
    Raises UserError without diffusers, ValueError for a config that does not fit.
    """

    @check_arguments
    def __init__(self, kind: Kind, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.vae = _build(kind, config or {})
        config = self.vae.config
        ratio = config.temporal_compression_ratio
        if kind == COGVIDEOX and ratio != 4:
            raise ValueError(f"temporal_compression_ratio is {ratio}; diffusers' chunks of 8 frames need 4")
        space = 2 ** (len(config.block_out_channels) - 1) if kind == COGVIDEOX else config.spatial_compression_ratio
        self.spec = LatentSpec(
            config.latent_channels,
            int(ratio),
            space,
            causal=False,  # GroupNorm pools over time
            **self.register_latent_stats(*_latent_stats(config), config.latent_channels),
        )

    def encode(self, video: Tensor) -> Posterior:
        """[B, 3, T, H, W] -> posterior over raw latents."""
        check_video(video)
        video = pad_space(extend_time(video, self._valid_frames(video.shape[2])), self.spec.space_stride)
        return Posterior.from_moments(self.vae.encode(video.to(self.vae.dtype)).latent_dist.parameters)

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        check_latents(z, self.spec.channels)
        length = z.shape[2]
        pairs = self.kind == COGVIDEOX and length % 2 == 0  # the first latent decodes to 4 frames, not to 1
        max_frames = self.spec.time_stride * length if pairs else 1 + self.spec.time_stride * (length - 1)
        frames = max_frames if num_frames is None else num_frames
        if self.latent_frames(frames) != length:
            raise ValueError(f"num_frames is {frames}, which does not fit {plural(length, 'latent frame')}")
        return self.vae.decode(z.to(self.vae.dtype)).sample[:, :, :frames]

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        vae = self.vae
        parts = {"encoder": [vae.encoder, vae.quant_conv], "decoder": [vae.post_quant_conv, vae.decoder]}
        return {name: [module for module in modules if module is not None] for name, modules in parts.items()}

    def last_layers(self) -> list[nn.Parameter]:
        return [self.vae.decoder.conv_out.conv.weight]

    def frames_valid(self, frames: int) -> bool:
        if self.kind == COGVIDEOX:
            return frames >= 1 and frames % 8 in (0, 1)
        return frames >= 1 and (frames - 1) % self.spec.time_stride == 0

    def _valid_frames(self, frames: int) -> int:
        """The smallest valid number of frames from `frames` on."""
        return next(n for n in count(frames) if self.frames_valid(n))

    def latent_frames(self, frames: int) -> int:
        return -(-self._valid_frames(frames) // self.spec.time_stride)

    def stream(self, height: int, width: int, memory_gib: float | None = None) -> IndependentChunks:
        """The whole video at once: independent chunks would show seams."""
        return IndependentChunks(self, None)


class _Config(TypedDict, total=False):
    """Keys that both kinds have in their config.json."""

    in_channels: Literal[3]
    out_channels: Literal[3]
    block_out_channels: Widths
    latent_channels: Width
    layers_per_block: Depth
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"]
    norm_num_groups: Width
    scaling_factor: Deviation


class _CogVideoXConfig(_Config, total=False):
    down_block_types: Sequence[Literal["CogVideoXDownBlock3D"]]
    up_block_types: Sequence[Literal["CogVideoXUpBlock3D"]]
    norm_eps: Annotated[float, Range(0, 1)]
    temporal_compression_ratio: Literal[1, 2, 4, 8]
    sample_height: Count
    sample_width: Count
    shift_factor: Mean | None
    latents_mean: Sequence[Mean] | None
    latents_std: Sequence[Deviation] | None
    force_upcast: bool
    use_quant_conv: bool
    use_post_quant_conv: bool
    invert_scale_latents: bool


class _HunyuanConfig(_Config, total=False):
    down_block_types: Sequence[Literal["HunyuanVideoDownBlock3D"]]
    up_block_types: Sequence[Literal["HunyuanVideoUpBlock3D"]]
    spatial_compression_ratio: Literal[1, 2, 4, 8, 16, 32]
    temporal_compression_ratio: Literal[4, 8]
    mid_block_add_attention: bool


LEVELS = ("block_out_channels", "down_block_types", "up_block_types")
CONFIGS: dict[str, type] = {COGVIDEOX: _CogVideoXConfig, HUNYUAN: _HunyuanConfig}


def _build(kind: Kind, config: Mapping[str, Any]) -> nn.Module:
    """diffusers' model with random weights, from the entries of its config.json that the installed diffusers takes."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"{kind} is a model of diffusers, which is not installed: pip install diffusers") from error
    model = getattr(diffusers, kind, None)
    if model is None:
        raise UserError(f"diffusers {diffusers.__version__} has no {kind}: pip install --upgrade diffusers")
    parameters = inspect.signature(model.__init__).parameters
    own = {key: value for key, value in config.items() if not key.startswith("_")}  # without _class_name and versions
    check_fields(own, CONFIGS[kind], key="config")
    levels = {key: len(own.get(key, parameters[key].default)) for key in LEVELS}
    if len({*levels.values()}) > 1:
        raise ValueError(
            f"there are {', '.join(f'{n} {key}' for key, n in levels.items())}; give one of each per level"
        )
    if unknown := [key for key in own if key not in parameters]:
        names = short(", ".join(unknown))[1:-1]
        log.warning("diffusers %s has no %s in the config of %s; skipped", diffusers.__version__, names, kind)
    known = {key: value for key, value in own.items() if key in parameters}
    for key in known.keys() - annotations_of(CONFIGS[kind]).keys():  # new in diffusers, with unknown effects
        if known[key] != parameters[key].default:
            raise ValueError(f"{key} is {short(known[key])}; only {parameters[key].default!r} is supported for {kind}")
    return model(**known)


def _latent_stats(config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the latents per channel: diffusers' pipelines use (z - mean) * factor / std."""
    channels = config["latent_channels"]
    mean, std, shift = config.get("latents_mean"), config.get("latents_std"), config.get("shift_factor")
    if mean is not None and shift is not None:
        raise ValueError("the config has both shift_factor and latents_mean; remove one")
    mean = [shift or 0.0] * channels if mean is None else mean
    std = [1.0] * channels if std is None else std
    return list(map(float, mean)), [value / config["scaling_factor"] for value in std]
