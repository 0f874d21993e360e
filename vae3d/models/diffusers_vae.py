"""The VAEs of CogVideoX and HunyuanVideo, as the library diffusers has them: above all to teach others.

`models/autoencoders/autoencoder_kl_cogvideox.py` and `autoencoder_kl_hunyuan_video.py` of huggingface/diffusers;
CogVideoX, arXiv 2408.06072; HunyuanVideo, arXiv 2412.03603.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Annotated, Any, Literal, TypedDict

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
from vae3d.models.base import reconstruct
from vae3d.models.layers.frames import extend_time, pad_space
from vae3d.models.layers.normalized import LatentNormMixin
from vae3d.models.streaming import IndependentChunks
from vae3d.pixels import check_latents, check_video
from vae3d.types import LatentSpec, Posterior, Reconstruction

log = logging.getLogger("vae3d")
COGVIDEOX, HUNYUAN = KINDS = ("AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo")


class DiffusersVAE(LatentNormMixin):
    """A VAE of diffusers: a VideoAutoencoder, with its results and its keys behind `vae.`.

    kind: one of KINDS. config: what its config.json holds; keys that the installed diffusers does not know are left
    out with a warning. Weights stay in the type that they are given; what is encoded or decoded is cast to it.

    Frames: CogVideoX takes 8 n or 8 n + 1, since diffusers encodes 8 frames and decodes 2 latents at once, and any
    other number comes back shifted against itself (12 as 9, 13 as 16); HunyuanVideo takes 1 + 4 n, beyond 16 in pieces
    that it blends. Other clips are extended by repeating their last frame, sides by repeating their edge, and the
    reconstruction is cut back.
    `normalize` gives what the diffusion model sees of a video; invert_scale_latents of a config is about the picture
    that a video begins with, which is not scaled here.
    Raises UserError without diffusers, ValueError for a config that does not fit.
    """

    @check_arguments
    def __init__(self, kind: str, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.vae = _build(kind, config or {})
        told = self.vae.config
        ratio = told.temporal_compression_ratio
        if kind == COGVIDEOX and ratio != 4:
            raise ValueError(f"temporal_compression_ratio is {ratio}; the pieces that diffusers codes are made for 4")
        space = 2 ** (len(told.block_out_channels) - 1) if kind == COGVIDEOX else told.spatial_compression_ratio
        latents_mean, latents_std = _normalisation(told, told.latent_channels)
        self.spec = LatentSpec(
            told.latent_channels,
            int(ratio),
            space,
            causal=False,  # because GroupNorm pools over time
            **self.register_latent_stats(latents_mean, latents_std, told.latent_channels),
        )

    def encode(self, video: Tensor) -> Posterior:
        """[B, 3, T, H, W] -> posterior over raw latents."""
        check_video(video)
        video = pad_space(extend_time(video, self._fitting(video.shape[2])), self.spec.space_stride)
        return Posterior.from_moments(self.vae.encode(video.to(self.vae.dtype)).latent_dist.parameters)

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Raw latents [B, C, t, h, w] -> video, unclamped; num_frames: by default all that they stand for.

        Raises ValueError if num_frames does not fit the latents.
        """
        check_latents(z, self.spec.channels)
        length = z.shape[2]
        pairs = self.kind == COGVIDEOX and length % 2 == 0  # no first latent that stands for one frame alone
        most = self.spec.time_stride * length if pairs else 1 + self.spec.time_stride * (length - 1)
        frames = most if num_frames is None else num_frames
        if self.latent_frames(frames) != length:
            raise ValueError(f"num_frames is {frames}, which does not fit {length} latent frames")
        return self.vae.decode(z.to(self.vae.dtype)).sample[:, :, :frames]

    def forward(self, video: Tensor, **how: Any) -> Reconstruction:
        """Reconstruct [B, 3, T, H, W]; see VideoAutoencoder.forward."""
        return reconstruct(self, video, **how)

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

    def _fitting(self, frames: int) -> int:
        """The next valid number of frames."""
        return next(n for n in count(frames) if self.frames_valid(n))

    def latent_frames(self, frames: int) -> int:
        return -(-self._fitting(frames) // self.spec.time_stride)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        stride = self.spec.space_stride
        return self.spec.channels, self.latent_frames(frames), -(-height // stride), -(-width // stride)

    def stream(self, height: int, width: int, memory_gib: float | None = None) -> IndependentChunks:
        """The whole video at once: of pieces that know nothing of each other one would see the borders."""
        return IndependentChunks(self, None)


class _Config(TypedDict, total=False):
    """What both kinds have in their config.json."""

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


def _build(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """diffusers' model, with random weights."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; use one of {', '.join(KINDS)}")
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"{kind} is a model of diffusers, which is not installed: pip install diffusers") from error
    model = getattr(diffusers, kind, None)
    if model is None:
        raise UserError(f"diffusers {diffusers.__version__} has no {kind}: pip install --upgrade diffusers")
    own = {key: value for key, value in config.items() if not key.startswith("_")}  # not what tells of versions
    return model(**_checked(own, kind, inspect.signature(model.__init__).parameters, diffusers.__version__))


def _checked(
    own: Mapping[str, Any], kind: str, parameters: Mapping[str, inspect.Parameter], version: str
) -> dict[str, Any]:
    """The entries of a config.json that the installed diffusers takes, checked before it sees them."""
    check_fields(own, CONFIGS[kind], key="config")
    levels = {key: len(own.get(key, parameters[key].default)) for key in LEVELS}
    if len({*levels.values()}) > 1:
        raise ValueError(
            f"there are {', '.join(f'{n} {key}' for key, n in levels.items())}; give one of each per level"
        )
    if unknown := [key for key in own if key not in parameters]:
        names = short(", ".join(unknown))[1:-1]
        log.warning("diffusers %s does not know %s of a %s's config", version, names, kind)
    known = {key: value for key, value in own.items() if key in parameters}
    for key in known.keys() - annotations_of(CONFIGS[kind]).keys():  # of a newer diffusers: what it does is not known
        if known[key] != parameters[key].default:
            raise ValueError(f"{key} is {short(known[key])}; of {kind} only {parameters[key].default!r} is supported")
    return known


def _normalisation(told: Mapping[str, Any], channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the latents, per channel, as diffusers' pipelines use a config:
    (z - mean) * scaling_factor / std."""
    mean, std = told.get("latents_mean"), told.get("latents_std")
    offset = told.get("shift_factor")
    if mean is not None and offset is not None:
        raise ValueError("the config has both shift_factor and latents_mean; which of them is meant?")
    shift = mean if mean is not None else [offset or 0.0] * channels
    deviation = std if std is not None else [1.0] * channels
    if not len(shift) == len(deviation) == channels:
        raise ValueError(
            f"latents_mean and latents_std have {len(shift)} and {len(deviation)} entries; give {channels}"
        )
    return list(map(float, shift)), [value / told["scaling_factor"] for value in deviation]
