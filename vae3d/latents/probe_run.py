"""Probing autoencoders on one source: the same clips and the same noise for all of them, one model at a time.

Memory: a batch of clips in pixels, and the latents of `count` clips, which tell of channels and spectra; the dear
probes, which decode, see the first `decoded` of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.data.clips import ClipSettings, open_frames, read_clip, to_tensor
from vae3d.data.media import MediaError, MediaInfo
from vae3d.data.segments import bounds_of
from vae3d.data.sources import DataError
from vae3d.data.transforms import resize_crop_params
from vae3d.errors import UserError
from vae3d.inference.scale import off_scale
from vae3d.latents import probes
from vae3d.latents.codec import LatentCodec
from vae3d.latents.statistics import LatentStatistics
from vae3d.models.interface import nearest_frames
from vae3d.models.tiling import Tiled
from vae3d.models.wan import WanVAE
from vae3d.seeding import generator_of, randn_like, seed_of

LEAST_LATENT = 4  # sides of a frame of latents, of which the smallest spectrum and a scaled frame can be had
SHOWN_NOISE = (0.0, 0.2, 0.5, 1.0)


class ProbeError(UserError):
    """Autoencoders that cannot be probed at this size."""


@dataclass(frozen=True)
class ProbeSettings:
    """Which clips are probed: `count` of `frames` x `height` x `width`, `per_file` of each file at places drawn from
    `seed`, spread evenly over the source. short_side: scale files to this before cropping, as in ClipSettings.

    decoded: how many of them go through the probes that decode. batch: clips coded at once. tile, tile_overlap: see
    models.tiling.Tiled; None: nothing is coded in tiles.
    """

    height: int
    width: int
    frames: int = 1
    count: int = 64
    decoded: int = 16
    per_file: int = 1
    short_side: int | None = None
    batch: int = 4
    seed: int = 0
    tile: int | None = None
    tile_overlap: int | None = None

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "count", "decoded", "per_file", "batch"):
            if getattr(self, name) < 1:
                raise ProbeError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass
class TiledCodec:
    """probes.Codec of a WanVAE coded in tiles."""

    model: Tiled

    @property
    def space_stride(self) -> int:
        return self.model.spec.space_stride

    def encode(self, pixels: Tensor) -> Tensor:
        return self.model.model.normalize(self.model.encode_chunk(pixels, None, keep=False)[0].mode())

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        return self.model.decode_chunk(self.model.model.denormalize(z), None, keep=False)[0]


def check_sizes(models: Mapping[str, nn.Module], settings: ProbeSettings) -> None:
    """Raises ProbeError, with all that is wrong, if a model does not take clips of this size whole, or has latents
    of it that are too small to be probed. Models may have different strides."""
    errors = []
    for name, model in models.items():
        stride = model.spec.space_stride
        for key in ("height", "width"):
            size, unit = getattr(settings, key), 2 * stride
            if size % unit or size < LEAST_LATENT * stride:
                nearest = max(LEAST_LATENT * stride, round(size / unit) * unit)
                errors.append(
                    f"{key} is {size}; with {name}'s stride of {stride} it must be a multiple of {unit} (latents are "
                    f"also scaled by half), at least {LEAST_LATENT * stride}: use {nearest}"
                )
        if not model.frames_valid(settings.frames):
            nearest = ", ".join(map(str, nearest_frames(settings.frames, model.frames_valid)))
            errors.append(f"frames is {settings.frames}, which {name} takes with added frames only; use {nearest}")
    if errors:
        raise ProbeError("\n  ".join(["these clips do not fit:", *dict.fromkeys(errors)]))


def clips(table: pd.DataFrame, settings: ProbeSettings) -> Iterator[Tensor]:
    """The clips, [3, T, H, W] uint8, always the same. Raises DataError and MediaError for rows and files that cannot be
    used, among them files that are smaller than a clip: enlarged pixels have the spectrum of no image."""
    faulty = table[table["error"].notna()]
    if len(faulty):
        row = faulty.iloc[0]
        raise DataError(f"row {row['row']} ({row['name']}) {row['error']}")
    files = min(len(table), -(-settings.count // settings.per_file))
    chosen = table.iloc[np.linspace(0, len(table) - 1, files).round().astype(int)]
    cut = ClipSettings(settings.height, settings.width, short_side=settings.short_side, crop="random")
    places = list(zip(chosen["path"], bounds_of(chosen), strict=True)) * settings.per_file  # other files lie between
    for number, (path, bounds) in enumerate(places[: settings.count]):
        rng = np.random.default_rng(seed_of(settings.seed, "probe", number))
        with closing(open_frames(path, cut, bounds)) as reader:
            _require_min_size(path, reader.info, settings)
            yield to_tensor(read_clip(reader, path, cut, settings.frames, rng.random(), rng))


def _require_min_size(path: str, info: MediaInfo, settings: ProbeSettings) -> None:
    if info.num_frames < settings.frames:
        raise MediaError(path, f"is shorter than the clips: {info.num_frames} of {settings.frames} frames; use fewer")
    if info.height < settings.height or info.width < settings.width:
        raise MediaError(
            path,
            f"is {info.height}x{info.width}, smaller than the clips of {settings.height}x{settings.width}; use a "
            "smaller height and width, or other files",
        )
    if (settings.short_side or 0) > min(info.height, info.width):
        raise MediaError(path, f"is {info.height}x{info.width}, smaller than short_side={settings.short_side}")
    size = settings.height, settings.width
    whole = resize_crop_params(info.height, info.width, size, settings.short_side).size == size
    if settings.per_file > 1 and whole and info.num_frames == settings.frames:
        raise MediaError(
            path, f"has only one clip of {size[0]}x{size[1]}; use per_file=1, or a short_side of more than {min(size)}"
        )


Clips = Callable[[], Iterator[Tensor]]


def batches(
    clips: Iterator[Tensor], size: int, device: torch.device | str, most: int | None = None
) -> Iterator[Tensor]:
    """[B, 3, T, H, W] in [-1, 1], of the first `most` clips."""
    held: list[Tensor] = []
    for number, clip in enumerate(clips):
        if most is not None and number == most:
            break
        held.append(clip)
        if len(held) == size:
            yield _pixels(held, device)
            held = []
    if held:
        yield _pixels(held, device)


def _pixels(clips: list[Tensor], device: torch.device | str) -> Tensor:
    return torch.stack(clips).to(device).float() / 127.5 - 1


@torch.inference_mode()
def probe_pixels(clips: Clips, settings: ProbeSettings, strides: set[int]) -> dict[str, Any]:
    """What latents are compared with: the spectra of the clips themselves, and, by stride, of clips that are as small
    as latents of that stride, each pixel the mean of those that it stands for."""
    totals: dict[str, Tensor] = {}
    count = 0
    for pixels in batches(clips(), settings.batch, "cpu"):
        powers = {"space": probes.dct_power(pixels, (-2, -1))}
        if settings.frames > 1:
            powers["time"] = probes.dct_power(pixels, (-3,))
        for stride in sorted(strides):
            powers[str(stride)] = probes.dct_power(F.avg_pool3d(pixels, (1, stride, stride)), (-2, -1))
        count += len(pixels)
        for key, power in powers.items():
            totals[key] = totals.get(key, 0) + power * len(pixels)
    spectra = {key: asdict(probes.spectrum(total / count)) for key, total in totals.items()}
    return {
        "clips": count,
        "space": spectra.pop("space"),
        "time": spectra.pop("time", None),
        "space_at_stride": spectra,
    }


@torch.inference_mode()
def probe_model(
    model: nn.Module, clips: Clips, settings: ProbeSettings, lpips: Callable[[Tensor, Tensor], Tensor] | None = None
) -> dict[str, Any]:
    """All probes of one model, in eval mode, as JSON holds them. lpips: a distance of frames, for interpolation."""
    codec, spec = LatentCodec(model), model.spec
    z, statistics, kl = encode_all(codec, clips, settings)
    told = statistics.summary()
    std_of_mean, std = (torch.tensor(told[key], dtype=torch.float64) for key in ("std_of_mean", "std"))
    power, noise = probes.dct_power(z, (-2, -1)), sum(s**2 for s in told["posterior_std"]) / len(std)
    moving = z[:, :, 1:] if spec.time_stride > 1 else z  # the first latent of a causal VAE stands for a single frame
    rest = told["other_frames"]
    found = {
        "latent_shape": list(z.shape[1:]),
        "strides": [spec.time_stride, spec.space_stride],
        "causal": spec.causal,
        "statistics": told,
        "kl": None if kl is None else kl.tolist(),
        "collapsed": probes.collapsed(std_of_mean, std, kl),
        "space": asdict(probes.spectrum(power)),
        "space_of_samples": asdict(probes.spectrum(power + noise)),  # the posterior's noise is white
        "time": asdict(probes.spectrum(probes.dct_power(moving, (-3,)))) if moving.shape[2] > 1 else None,
        "local_correlation": probes.local_correlation(z),
        "first_against_rest": probes.first_against_rest(told["first_frame"], rest)
        if spec.time_stride > 1 and rest
        else None,
    }
    return found | probe_decoder(codec, clips, settings, told, lpips)


def encode_all(
    codec: LatentCodec, clips: Clips, settings: ProbeSettings
) -> tuple[Tensor, LatentStatistics, Tensor | None]:
    """The means of all normalised latents, [N, C, t, h, w] on the CPU, their statistics, and the KL of every channel,
    [C]; see probes.channel_kl."""
    statistics = LatentStatistics(codec.channels)
    latents, kl = [], []
    for pixels in batches(clips(), settings.batch, codec.device):
        raw = codec.raw_moments(pixels)
        mean, std = codec.model.normalize(raw.mean).cpu(), (raw.std / codec.latents_std(raw.std)).cpu()
        latents.append(mean)
        kl += [probes.channel_kl(m[None], s[None]) for m, s in zip(raw.mean, raw.std, strict=True)]
        for clip in zip(mean, std, strict=True):
            statistics.update(*clip)
    return torch.cat(latents), statistics, None if kl[0] is None else torch.stack(kl).mean(0).cpu()


def probe_decoder(
    codec: LatentCodec,
    clips: Clips,
    settings: ProbeSettings,
    statistics: Mapping[str, Any],
    lpips: Callable[[Tensor, Tensor], Tensor] | None,
) -> dict[str, Any]:
    """The probes that decode: means over clips. statistics: of the normalised latents, LatentStatistics.summary().
    Raises ProbeError if the decoder gives NaN."""
    mean, std = (torch.tensor(statistics[key], device=codec.device) for key in ("mean", "std"))
    sigmas = (0.0, *probes.NOISE)
    found: dict[str, dict[str, list[Tensor]]] = {}
    done, before = 0, None
    for pixels in batches(clips(), settings.batch, codec.device, settings.decoded):
        z = codec.encode(pixels)
        curve = probes.noise_curve(codec, z, pixels, std, _generators(settings, done, z), sigmas)
        if not curve[0].isfinite().all():  # without noise
            raise ProbeError("the decoder's pixels are NaN or infinite; do the weights hold NaN?")
        measured = {
            "encoder_equivariance": probes.encoder_equivariance(codec, pixels, mean),
            "decoder_equivariance_psnr": probes.decoder_equivariance(codec, z, pixels),
            "noise_psnr": dict(zip(map(str, sigmas), curve, strict=True)),
        }
        ends = z if before is None else torch.cat([before, z])
        if len(ends) > 1:  # every clip with the one before it
            measured["interpolation"] = probes.interpolation(codec, ends[:-1], ends[1:], pixels.shape[2], lpips)
        if settings.tile is not None and isinstance(codec.model, WanVAE):
            measured["tiles"] = probes.tiling_error(codec, TiledCodec(tiled(codec.model, settings)), pixels)
        for probe, values in measured.items():
            for key, value in values.items():
                found.setdefault(probe, {}).setdefault(key, []).append(value.cpu())
        before, done = z[-1:], done + len(z)
    empty = dict.fromkeys(("interpolation", "tiles"))
    return empty | {probe: _means(values) for probe, values in found.items()} | {"clips_decoded": done}


def _means(values: Mapping[str, list[Tensor]]) -> dict[str, float | None]:
    return dict(zip(values, probes.finite(torch.stack([torch.cat(v).mean() for v in values.values()])), strict=True))


def _generators(settings: ProbeSettings, first: int, z: Tensor) -> list[torch.Generator]:
    """One per clip, so that its noise does not depend on the batch."""
    return [generator_of(settings.seed, "noise", first + place, device=z.device) for place in range(len(z))]


def tiled(model: WanVAE, settings: ProbeSettings) -> Tiled:
    """Raises ProbeError if the model cannot be coded in such tiles."""
    try:
        return Tiled(model, settings.tile, settings.tile_overlap)
    except ValueError as error:
        raise ProbeError(f"tile={settings.tile}, tile_overlap={settings.tile_overlap}: {error}") from error


@torch.inference_mode()
def decoded_pictures(model: nn.Module, clips: Clips, settings: ProbeSettings, std: list[float]) -> dict[str, Tensor]:
    """What the decoder makes of the first clip under noise, and of the middle between it and the second: label -> its
    first frame, [3, H, W] in [-1, 1]. std: of the latents, of every channel."""
    codec = LatentCodec(model)
    pixels = next(batches(clips(), 2, codec.device))
    z, frames = codec.encode(pixels), pixels.shape[2]
    noise = randn_like(z, _generators(settings, 0, z)) * torch.tensor(std).to(z)[None, :, None, None, None]
    videos = {"original": pixels}
    videos |= {f"noise {sigma:g}": codec.decode(z + sigma * noise, frames) for sigma in SHOWN_NOISE}
    if len(z) > 1:
        videos["midway"] = codec.decode((z[:1] + z[1:2]) / 2, frames)
        videos["other end"] = codec.decode(z[1:2], frames)
    return {label: video[0, :, 0].float().clamp(-1, 1).cpu() for label, video in videos.items()}


def warnings_of(name: str, told: Mapping[str, Any]) -> list[str]:
    """What makes the latents of a model unfit to be diffused as they are."""
    found, statistics = [], told["statistics"]
    means, stds = statistics["mean"], statistics["std"]
    if off_scale(means, stds):
        found.append(
            f"{name}: its normalised latents have means from {min(means):.3f} to {max(means):.3f} and standard "
            f"deviations from {min(stds):.3f} to {max(stds):.3f}, by channel, instead of 0 and 1: write what is "
            "measured into the export (scripts/measure_scale.py --per-channel) before they are diffused"
        )
    if told["collapsed"]:
        channels = ", ".join(map(str, told["collapsed"]))
        found.append(f"{name}: {len(told['collapsed'])} of {told['latent_shape'][0]} channels tell nothing: {channels}")
    return found
