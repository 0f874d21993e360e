"""The autoencoders of diffusers as VideoAutoencoders: to fine-tune, to distil from, to run.

One adapter; vae3d/models/diffusers_classes.py has what differs between the classes. They run in diffusers' own code,
and weights go back to it by the layout `diffusers`.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from vae3d.arguments import ArgumentError, Count, Range, check_arguments, short
from vae3d.errors import UserError
from vae3d.models.diffusers_classes import (
    CLASSES,
    NOT_SERVED,
    DiffusersClass,
    FrameRule,
    frame_batches,
    from_pixels,
    latent_channels,
    to_pixels,
    with_alpha,
)
from vae3d.models.interface import VideoAutoencoder, choose_latents
from vae3d.models.layers.checkpointing import checkpoint_blocks
from vae3d.models.layers.circular import make_circular
from vae3d.models.layers.frames import extend_time, pad_space
from vae3d.models.tiling import code_in_tiles
from vae3d.pixels import check_latents, check_video
from vae3d.seeding import Generators
from vae3d.types import Delta, LatentSpec, Posterior, Reconstruction, cat_posteriors

log = logging.getLogger("vae3d")
PREFIX = "vae."  # of the class's state-dict keys
SEED = 0  # of the noise that decoders of LTX-Video 0.9.1 add


class DiffusersVAE(VideoAutoencoder):
    """An autoencoder of diffusers, whose state-dict keys get the prefix `vae.`.

    kind: a key of CLASSES, which has its frame rule, latent convention and more. config: the content of its
    config.json; keys that the installed diffusers does not have are skipped with a warning.
    gradient_checkpointing: recompute each block in backward; diffusers' own where that is right, else ours.
    frame_batch: frames that a network of images codes at once; None: all. decode_timestep: what decoders that take a
    timestep (LTX-Video from 0.9.1) are given; 0 decodes latents as they are, diffusers' default.
    pad_w: original is the class's own padding; circular closes the seam of 360 degree panoramas, with the same weights.
    The width must then be a multiple of the space stride.

    Clips are extended by their last frame to what the class takes, sides by their edge to multiples of the space
    stride; reconstructions are cropped. Inputs are cast to the dtype of the weights. Output is not clamped.
    `normalize` returns the video latents that the diffusion model sees.
    Raises UserError without diffusers or for a class that is not served, ValueError for a config that does not fit.
    """

    @check_arguments
    def __init__(
        self,
        kind: str,
        config: Mapping[str, Any] | None = None,
        *,
        gradient_checkpointing: bool = False,
        frame_batch: Count | None = 4,
        decode_timestep: Annotated[float, Range(0, 1)] = 0.0,
        pad_w: Literal["original", "circular"] = "original",
    ) -> None:
        super().__init__()
        self.table = entry_of(kind)
        self.kind = kind
        self.vae = _build(kind, config or {})
        self.frame_batch = frame_batch  # of table.chunks = frame_batches
        self.decode_timestep = decode_timestep
        self.latent = self.table.latent
        self.input_channels = self.vae.config.get("in_channels", self.vae.config.get("input_channels", 3))
        self._strides = self.table.strides(self.vae)
        self.frame_rule: FrameRule = self.table.frames(self.vae, self._strides[0])
        mean, std = self.table.stats(self.vae)
        self.register_buffer("latents_mean", mean.clone().view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("latents_std", std.clone().view(1, -1, 1, 1, 1), persistent=False)
        self._update_spec()
        if self.table.stats_saved:
            self.register_load_state_dict_post_hook(lambda model, _keys: model._read_stats())
        self.circular = pad_w == "circular"
        if self.circular:
            if self.table.open_seam:
                raise ValueError(f"pad_w is circular; the seam of {kind} stays open: {self.table.open_seam}")
            make_circular(self.vae)
        if gradient_checkpointing:
            if self.table.blocks:
                checkpoint_blocks(self.vae, self.table.blocks)
            else:
                self.vae.enable_gradient_checkpointing()

    def _read_stats(self) -> None:
        """The statistics that came with the weights."""
        mean, std = self.table.stats(self.vae)
        with torch.no_grad():
            self.latents_mean.copy_(mean.view_as(self.latents_mean))
            self.latents_std.copy_(std.view_as(self.latents_std))
        self._update_spec()

    def _update_spec(self) -> None:
        time, space = self._strides
        causal = self.table.causal and self.vae.config.get("is_causal", True)
        self.spec = LatentSpec(latent_channels(self.vae.config), time, space, causal, **self.latent_stats())

    def encode(self, video: Tensor) -> Posterior | Delta:
        """[B, 3, T, H, W] -> raw latents: a posterior, or a point where the class is deterministic.

        Raises ValueError for a size that the class does not take.
        """
        check_video(video)
        self.check_size(*video.shape[-2:])
        frames = self._valid_frames(video.shape[2])
        latents = self.frame_rule.latents(frames)
        x = self._prepare(extend_time(video, frames))
        coded, cache = [], None
        for chunk in x.split([n for _, n in self._chunks(latents)], 2):
            part, cache = self._encode_chunk(chunk, cache)
            coded.append(part)
        found = cat_posteriors(coded)
        self._check_shape(
            "latents", found.mean, (self.spec.channels, latents, *self.spec.latent_size(*video.shape[-2:]))
        )
        return found

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Raw latents [B, C, t, h, w] -> video, not clamped."""
        check_latents(z, self.spec.channels)
        length = z.shape[2]
        frames = self.frame_rule.frames(length) if num_frames is None else num_frames
        rule = f"; a {self.kind} takes {self.frame_rule.text} frames, and others extended to the next of these"
        self.check_frames(frames, length, rule)
        video, cache = [], None
        for chunk in z.to(self.vae.dtype).split([t for t, _ in self._chunks(length)], 2):
            part, cache = self._decode_chunk(chunk, cache)
            video.append(part)
        found, space = torch.cat(video, 2), self.spec.space_stride
        self._check_shape("frames", found[:, :, :frames], (3, frames, space * z.shape[3], space * z.shape[4]))
        return found[:, :, :frames]

    def _encode_chunk(self, x: Tensor, cache: Any) -> tuple[Posterior | Delta, Any]:
        encode = partial(self.table.encode, self)
        if self.tiling is None:
            return encode(x, cache)
        return code_in_tiles(self.tiling, encode, x, cache, self.spec.space_stride)

    def _decode_chunk(self, z: Tensor, cache: Any) -> tuple[Tensor, Any]:
        decode = partial(self.table.decode, self)
        if self.tiling is not None:
            decode = partial(self.tiling, "decoder", decode, unit_in=1, unit_out=self.spec.space_stride)
        if self._draws_noise:
            # LTX-Video 0.9.1 draws noise from the global generator; here the same in every call.
            with torch.random.fork_rng([z.device] if z.is_cuda else []):
                torch.manual_seed(SEED)
                video, cache = decode(z, cache)
        else:
            video, cache = decode(z, cache)
        return from_pixels(video[:, :3], self.table.pixels), cache

    @property
    def _draws_noise(self) -> bool:
        return any(getattr(m, "per_channel_scale1", None) is not None for m in self.vae.modules())

    @property
    def kind_of_network(self) -> str:
        return self.kind

    @property
    def whole_frames(self) -> str:
        if self._draws_noise:
            return "noise, which the decoder draws for every call"
        return self.table.whole_frames

    def set_tiles(self, tile: int | None, overlap: int | None = None) -> None:
        """See VideoAutoencoder.set_tiles. Raises UserError for a class whose frames have only one size."""
        if tile is not None and self.table.fixed_size:
            side = self.vae.decoder_image_size
            raise UserError(f"tile={tile}: a {self.kind} takes frames of {side}x{side} only; leave out tile")
        super().set_tiles(tile, overlap)

    def _prepare(self, video: Tensor) -> Tensor:
        """Pixels as the class takes them, sides padded."""
        video = pad_space(video, self.spec.space_stride)
        return with_alpha(to_pixels(video, self.table.pixels), self.input_channels).to(self.vae.dtype)

    def _chunks(self, latents: int) -> list[tuple[int, int]]:
        """(latents, frames) of each chunk of a clip of this many latents."""
        sizes = self.table.chunks(self, latents)
        if len(sizes) == 1:
            return [(latents, self.frame_rule.frames(latents))]
        stride = self.spec.time_stride
        return [(sizes[0], self.frame_rule.frames(sizes[0])), *((size, size * stride) for size in sizes[1:])]

    def _check_shape(self, what: str, found: Tensor, expected: Sequence[int]) -> None:
        """Raises ValueError for a configuration with other strides than the table says."""
        if tuple(found.shape[1:]) != tuple(expected):
            raise ValueError(
                f"{self.kind} with this configuration returns {what} of {list(found.shape[1:])}, and not "
                f"{list(expected)}; its strides are not supported"
            )

    def check_size(self, height: int, width: int) -> None:
        super().check_size(height, width)
        if self.table.fixed_size:
            side = self.vae.decoder_image_size
            if (height, width) != (side, side):
                raise UserError(f"the frames are {height}x{width}; this {self.kind} takes {side}x{side} only")
        smallest = self.spec.space_stride * (self.table.min_latents - 1) + 1
        if min(height, width) < smallest:
            raise UserError(f"the frames are {height}x{width}; a {self.kind} takes sides of at least {smallest}")

    def set_frame_batch(self, frames: int) -> bool:
        self.frame_batch = frames
        return self.table.chunks is frame_batches

    def chunk_steps(self) -> list[tuple[nn.Module, str]]:
        return [(self, "_encode_chunk"), (self, "_decode_chunk")]

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        vae = self.vae
        parts = {"encoder": ("encoder", "quant_conv"), "decoder": ("post_quant_conv", "decoder")}
        if hasattr(vae, "regularization"):  # VidTok's quantiser
            parts["encoder"] = (*parts["encoder"], "regularization")
        found = {part: [getattr(vae, name, None) for name in names] for part, names in parts.items()}
        return {part: [module for module in modules if module is not None] for part, modules in found.items()}

    def last_layers(self) -> list[nn.Parameter]:
        module: Any = self.vae
        for name in self.table.last.split("."):
            module = module[int(name)] if name.lstrip("-").isdigit() else getattr(module, name)
        return [module.weight]

    def frames_valid(self, frames: int) -> bool:
        return self.frame_rule.is_valid(frames)

    def _valid_frames(self, frames: int) -> int:
        """The smallest valid number of frames from `frames` on."""
        return next(n for n in count(frames) if self.frames_valid(n))

    def latent_frames(self, frames: int) -> int:
        return self.frame_rule.latents(self._valid_frames(frames))

    def stream(self, height: int, width: int, memory_gib: float | None = None) -> DiffusersStream:
        """The class's own chunks, which give the result of the whole clip; where it has none, the whole video."""
        self.check_size(height, width)
        return DiffusersStream(self)


class DiffusersStream:
    """Codes a video in the chunks that DiffusersVAE codes a clip in; equal to it."""

    lookahead = 0

    def __init__(self, model: DiffusersVAE) -> None:
        self.model = model
        self._encoder_cache: Any = None
        self._decoder_cache: Any = None
        self._full: list[int] = []  # frames of the chunks to come, with those by which the clip is extended

    def chunks(self, frames: int) -> list[int]:
        model = self.model
        full = [n for _, n in model._chunks(model.latent_frames(frames))]
        self._full = list(full)
        full[-1] -= sum(full) - frames
        return full

    def __call__(self, video: Tensor, *, sample: bool = False, generator: Generators = None) -> Reconstruction:
        model, (frames, height, width) = self.model, video.shape[2:]
        x = model._prepare(extend_time(video, self._full.pop(0)))
        posterior, self._encoder_cache = model._encode_chunk(x, self._encoder_cache)
        z = choose_latents(posterior, None, sample, generator)
        rec, self._decoder_cache = model._decode_chunk(z.to(model.vae.dtype), self._decoder_cache)
        return Reconstruction(rec[:, :, :frames, :height, :width], posterior, z)


def entry_of(kind: str) -> DiffusersClass:
    """The table's entry of a class. Raises UserError for one that is not served, with the reason."""
    if kind in CLASSES:
        return CLASSES[kind]
    if kind in NOT_SERVED:
        raise UserError(f"{kind} is {NOT_SERVED[kind]}; use one of {', '.join(CLASSES)}")
    raise UserError(f"kind is {short(kind)}; use one of {', '.join(CLASSES)}")


# ---- building a class from a config.json

LEVELS = ("block_out_channels", "down_block_types", "up_block_types")
MAX_INT, MAX_LAYERS, MAX_ENTRIES, MAX_STATS = 2**20, 64, 16, 4096
COUNTS = re.compile(r"(^|_)(num_|layers_per|blocks$|layers$|num$)")  # keys that say how many layers there are
MAX_NAME = 64
STATS = ("latents_mean", "latents_std")
NULLABLE = (*STATS, "scaling_factor", "patch_size")
# diffusers does not check its configurations: these are what wrong ones end in.
BUILD_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, AssertionError)
BUILD_ERRORS += (RuntimeError, NotImplementedError)


def _build(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """diffusers' model with random weights, from the entries of its config.json that the installed diffusers takes."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"{kind} is a model of diffusers, which is not installed: pip install diffusers") from error
    cls = getattr(diffusers, kind, None)
    if cls is None:
        raise UserError(f"diffusers {diffusers.__version__} has no {kind}: pip install --upgrade diffusers")
    package = CLASSES[kind].needs
    if package is not None and not _is_installed(package):
        raise UserError(f"{kind} needs the package {package}, which is not installed: pip install {package}")
    parameters = inspect.signature(cls.__init__).parameters
    own = {key: value for key, value in config.items() if not key.startswith("_")}  # without _class_name and versions
    if unknown := [key for key in own if key not in parameters]:
        names = short(", ".join(unknown))[1:-1]
        log.warning("diffusers %s has no %s in the config of %s; skipped", diffusers.__version__, names, kind)
    known = {key: value for key, value in own.items() if key in parameters}
    for key, value in known.items():
        _check_entry(key, value, parameters[key].default)
    _check_channels(kind, known, parameters)
    defaults = {key: parameters[key].default for key in LEVELS if key in parameters}
    levels = {key: len(value) for key, value in (defaults | known).items() if key in LEVELS}  # lists, as checked
    if len({*levels.values()}) > 1:
        raise ValueError(
            f"there are {', '.join(f'{n} {key}' for key, n in levels.items())}; give one of each per level"
        )
    try:
        vae = cls(**known)
    except BUILD_ERRORS as error:
        raise ValueError(f"diffusers does not build a {kind} from this config: {short(str(error))}") from error
    if hasattr(vae, "noise_tau"):
        vae.noise_tau = 0.0  # stage.latent_noise adds noise, by the run's seed
    return vae


def _is_installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def _check_entry(key: str, value: Any, default: Any) -> None:
    """Raises ArgumentError for a value of another type than the default's, or so large that it would not be built."""
    if key == "dropout" and value:
        raise ArgumentError(f"config.dropout is {short(value)}; only 0 is supported, since forward draws no noise")
    if value is None and (default is None or key in NULLABLE):
        return
    largest = MAX_LAYERS if COUNTS.search(key) and "groups" not in key else MAX_INT
    kinds: list[Any] = [type(default)] if isinstance(default, bool | int | float | str) else [list, bool, float, str]
    if isinstance(default, list | tuple):
        kinds = [list]
    elif isinstance(default, str):
        kinds = [str, list]  # one for all levels, or one per level
    _check_value(key, value, kinds, largest, MAX_STATS if key in STATS else MAX_ENTRIES)


def _check_value(key: str, value: Any, kinds: Sequence[type], largest: int, entries: int, depth: int = 0) -> None:
    """kinds: what it may be; a float also an integer. largest: number. entries: of a list."""
    if isinstance(value, list | tuple) and list in kinds and depth < 2:
        if len(value) > entries:
            raise ArgumentError(f"config.{key} is {short(value)}; give at most {entries} entries")
        for index, item in enumerate(value):
            _check_value(f"{key}[{index}]", item, (list, bool, float, str), largest, entries, depth + 1)
        return
    is_bool, is_int = isinstance(value, bool), isinstance(value, int) and not isinstance(value, bool)
    fits = {
        bool: is_bool,
        int: is_int and 0 <= value <= largest,
        float: (is_int or isinstance(value, float)) and -MAX_INT <= value <= largest,
        str: isinstance(value, str) and len(value) <= MAX_NAME,
        list: False,
    }
    if not any(fits[kind] for kind in kinds):
        words = {
            bool: "true or false",
            int: f"an integer from 0 to {largest}",
            float: f"a number up to {largest}",
            str: f"text of at most {MAX_NAME} characters",
            list: f"a list of at most {entries} entries",
        }
        raise ArgumentError(f"config.{key} is {short(value)}; give {' or '.join(words[kind] for kind in kinds)}")


def _check_channels(kind: str, config: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Raises ArgumentError for a network that does not take and return RGB."""
    table = CLASSES[kind]
    for key in ("in_channels", "input_channels", "out_channels", "out_ch", "num_channels"):
        if key in parameters:
            value = config.get(key, parameters[key].default)
            allowed = (
                table.input_channels
                if "in" in key
                else tuple(n for n in (3, 4, 12) if n == 3 or n in table.input_channels)
            )
            if value not in allowed:
                raise ArgumentError(f"config.{key} is {short(value)}; give {' or '.join(map(str, allowed))}")
