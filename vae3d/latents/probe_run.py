"""Run the probes: all autoencoders see the same clips and the same noise, one model at a time.

Memory: one batch of clips in pixels, and the latents of `count` clips. The expensive probes, which decode, use only the
first `decoded` clips.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.arguments import Count, check_fields
from vae3d.data.batches.clips import ClipSettings, open_frames, read_clip, resize_crop_params, to_tensor
from vae3d.data.media import DataError, MediaError, MediaInfo
from vae3d.data.table.segments import bounds_of
from vae3d.errors import UserError
from vae3d.latents import probes
from vae3d.latents.codec import LatentCodec
from vae3d.latents.scale import off_scale
from vae3d.latents.statistics import LatentStatistics, finite
from vae3d.models.interface import VideoAutoencoder, nearest_frames
from vae3d.seeding import generator_of, randn_like, seed_of

MIN_LATENT_SIDE = 4  # the smallest latents with a spectrum that can also be scaled by 1/2
SHOWN_NOISE = (0.0, 0.2, 0.5, 1.0)


class ProbeError(UserError):
    """Autoencoders that cannot be probed at this size."""


@dataclass(frozen=True)
class ProbeSettings:
    """Which clips to probe: `count` clips of `frames` x `height` x `width`, from files spread evenly over the source.

    per_file: clips per file, at positions drawn from `seed`. short_side: scale files to it before cropping, as in
    ClipSettings. decoded: number of clips for the probes that decode. batch: clips coded at once. tile, tile_overlap:
    see VideoAutoencoder.set_tiles; None: no tiles.
    """

    height: Count
    width: Count
    frames: Count = 1
    count: Count = 64
    decoded: Count = 16
    per_file: Count = 1
    short_side: Count | None = None
    batch: Count = 4
    seed: int = 0
    tile: int | None = None
    tile_overlap: int | None = None

    def __post_init__(self) -> None:
        check_fields(vars(self), type(self))


@dataclass
class TiledCodec:
    """A probes.Codec that codes in tiles, with another codec's model."""

    codec: LatentCodec
    tile: int
    overlap: int | None = None

    @property
    def space_stride(self) -> int:
        return self.codec.space_stride

    def encode(self, pixels: Tensor) -> Tensor:
        with self._tiles():
            return self.codec.encode(pixels)

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        with self._tiles():
            return self.codec.decode(z, num_frames)

    @contextmanager
    def _tiles(self) -> Iterator[None]:
        self.codec.model.set_tiles(self.tile, self.overlap)
        try:
            yield
        finally:
            self.codec.model.set_tiles(None)


def try_tiles(model: VideoAutoencoder, settings: ProbeSettings) -> tuple[bool, str]:
    """Whether the model can be coded in these tiles, and which they are, or why not."""
    try:
        model.set_tiles(settings.tile, settings.tile_overlap)
    except UserError as error:
        return False, str(error)
    text = str(model.tiling)
    model.set_tiles(None)
    return True, text


def check_sizes(models: Mapping[str, nn.Module], settings: ProbeSettings) -> None:
    """Raises ProbeError, listing all errors, if a model would pad clips of this size, or if its latents are too small
    to be probed. Models may have different strides."""
    errors = []
    for name, model in models.items():
        stride = model.spec.space_stride
        for key in ("height", "width"):
            size, unit = getattr(settings, key), 2 * stride
            if size % unit or size < MIN_LATENT_SIDE * stride:
                nearest = max(MIN_LATENT_SIDE * stride, round(size / unit) * unit)
                errors.append(
                    f"{key} is {size}; with {name}'s stride of {stride} it must be a multiple of {unit} (latents are "
                    f"also scaled by 1/2), at least {MIN_LATENT_SIDE * stride}: use {nearest}"
                )
        if not model.frames_valid(settings.frames):
            nearest = ", ".join(map(str, nearest_frames(settings.frames, model.frames_valid)))
            errors.append(f"frames is {settings.frames}, which {name} would pad; use {nearest}")
    if errors:
        raise ProbeError("\n  ".join(["clips of this size do not fit:", *dict.fromkeys(errors)]))


def clips(table: pd.DataFrame, settings: ProbeSettings) -> Iterator[Tensor]:
    """The clips, [3, T, H, W] uint8, the same every time.

    Raises DataError and MediaError for unusable rows and files, such as files smaller than a clip: upscaled pixels
    would change the spectra.
    """
    invalid = table[table["error"].notna()]
    if len(invalid):
        row = invalid.iloc[0]
        raise DataError(f"row {row['row']} ({row['name']}) {row['error']}")
    files = min(len(table), -(-settings.count // settings.per_file))
    chosen = table.iloc[np.linspace(0, len(table) - 1, files).round().astype(int)]
    cut = ClipSettings(settings.height, settings.width, short_side=settings.short_side, crop="random")
    segments = list(zip(chosen["path"], bounds_of(chosen), strict=True)) * settings.per_file
    for number, (path, bounds) in enumerate(segments[: settings.count]):
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
    clips: Iterator[Tensor], size: int, device: torch.device | str, max_clips: int | None = None
) -> Iterator[Tensor]:
    """Batches [B, 3, T, H, W] in [-1, 1] of the first `max_clips` clips."""
    clips = islice(clips, max_clips)
    while batch := list(islice(clips, size)):
        yield torch.stack(batch).to(device).float() / 127.5 - 1


@torch.inference_mode()
def probe_pixels(clips: Clips, settings: ProbeSettings, strides: set[int]) -> dict[str, Any]:
    """Spectra of the clips, for comparison with latents: in space, in time, and by stride averaged down to the size of
    the latents."""
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
    """Run all probes on a model. Returns JSON-able results. lpips: distance of frames, for probes.interpolation."""
    codec, spec = LatentCodec(model), model.spec
    z, statistics, kl = encode_all(codec, clips, settings)
    summary = statistics.summary()
    std_of_mean, std = (torch.tensor(summary[key], dtype=torch.float64) for key in ("std_of_mean", "std"))
    power = probes.dct_power(z, (-2, -1))
    noise = sum(s**2 for s in summary["posterior_std"]) / len(std)
    moving = z[:, :, 1:] if spec.time_stride > 1 else z  # the first latent frame stands for a single video frame
    rest = summary["other_frames"]
    results = {
        "latent_shape": list(z.shape[1:]),
        "strides": [spec.time_stride, spec.space_stride],
        "causal": spec.causal,
        "statistics": summary,
        "kl": None if kl is None else kl.tolist(),
        "collapsed": probes.collapsed(std_of_mean, std, kl),
        "space": asdict(probes.spectrum(power)),
        "space_of_samples": asdict(probes.spectrum(power + noise)),  # the posterior's noise is white
        "time": asdict(probes.spectrum(probes.dct_power(moving, (-3,)))) if moving.shape[2] > 1 else None,
        "local_correlation": probes.local_correlation(z),
        "first_against_rest": probes.first_against_rest(summary["first_frame"], rest)
        if spec.time_stride > 1 and rest
        else None,
    }
    return results | probe_decoder(codec, clips, settings, summary, lpips)


def encode_all(
    codec: LatentCodec, clips: Clips, settings: ProbeSettings
) -> tuple[Tensor, LatentStatistics, Tensor | None]:
    """Posterior means of all normalised latents, [N, C, t, h, w] on the CPU, their statistics, and
    probes.channel_kl."""
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
    """Means over clips of the probes that decode. statistics: LatentStatistics.summary() of the normalised latents.

    Raises ProbeError if the decoder outputs NaN."""
    mean, std = (torch.tensor(statistics[key], device=codec.device) for key in ("mean", "std"))
    sigmas = (0.0, *probes.NOISE)
    values: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    decoded, previous = 0, None
    for pixels in batches(clips(), settings.batch, codec.device, settings.decoded):
        z = codec.encode(pixels)
        curve = probes.noise_curve(codec, z, pixels, std, _generators(settings, decoded, z), sigmas)
        if not curve[0].isfinite().all():  # without noise
            raise ProbeError("the decoder's pixels are NaN or infinite; do the weights hold NaN?")
        measured = {
            "encoder_equivariance": probes.encoder_equivariance(codec, pixels, mean),
            "decoder_equivariance_psnr": probes.decoder_equivariance(codec, z, pixels),
            "noise_psnr": dict(zip(map(str, sigmas), curve, strict=True)),
        }
        ends = z if previous is None else torch.cat([previous, z])
        if len(ends) > 1:  # every clip with the previous one
            measured["interpolation"] = probes.interpolation(codec, ends[:-1], ends[1:], pixels.shape[2], lpips)
        if settings.tile is not None and try_tiles(codec.model, settings)[0]:
            tiled = TiledCodec(codec, settings.tile, settings.tile_overlap)
            measured["tiles"] = probes.tiling_error(codec, tiled, pixels)
        for probe, results in measured.items():
            for key, value in results.items():
                values[probe][key].append(value.cpu())
        previous, decoded = z[-1:], decoded + len(z)
    means = {probe: {key: _mean(parts) for key, parts in results.items()} for probe, results in values.items()}
    return {"interpolation": None, "tiles": None} | means | {"clips_decoded": decoded}


def _mean(parts: list[Tensor]) -> float | None:
    return finite(torch.cat(parts).mean()[None])[0]


def _generators(settings: ProbeSettings, first: int, z: Tensor) -> list[torch.Generator]:
    """One per clip, so that noise does not depend on the batch size."""
    return [generator_of(settings.seed, "noise", first + index, device=z.device) for index in range(len(z))]


@torch.inference_mode()
def decoded_pictures(model: nn.Module, clips: Clips, settings: ProbeSettings, std: list[float]) -> dict[str, Tensor]:
    """First frames, [3, H, W] in [-1, 1], by label: the first clip decoded with noise on its latents, and the midpoint
    between its latents and the second clip's. std: per channel, of the latents."""
    codec = LatentCodec(model)
    pixels = next(batches(clips(), 2, codec.device))
    z, frames = codec.encode(pixels), pixels.shape[2]
    noise = randn_like(z, _generators(settings, 0, z)) * torch.tensor(std).to(z)[None, :, None, None, None]
    videos = {"original": pixels}
    videos |= {f"noise {sigma:g}": codec.decode(z + sigma * noise, frames) for sigma in SHOWN_NOISE}
    if len(z) > 1:
        videos["midpoint"] = codec.decode((z[:1] + z[1:2]) / 2, frames)
        videos["other end"] = codec.decode(z[1:2], frames)
    return {label: video[0, :, 0].float().clamp(-1, 1).cpu() for label, video in videos.items()}


def warnings_of(name: str, results: Mapping[str, Any], unscalable: str | None) -> list[str]:
    """Warnings about latents that are not fit for diffusion. results: of probe_model. unscalable: see
    scale.unscalable_reason."""
    warnings = []
    means, stds = results["statistics"]["mean"], results["statistics"]["std"]
    if off_scale(means, stds):
        hint = (
            "before diffusion, write the measured statistics into the export (vae3d measure-scale --per_channel)"
            if unscalable is None
            else f"no scale can be set: {unscalable}; trainer.any_scale=true trains on them as they are"
        )
        warnings.append(
            f"{name}: normalised latents have means from {min(means):.3f} to {max(means):.3f} and standard "
            f"deviations from {min(stds):.3f} to {max(stds):.3f}, by channel, instead of 0 and 1: {hint}"
        )
    if results["collapsed"]:
        channels = ", ".join(map(str, results["collapsed"]))
        count = f"{len(results['collapsed'])} of {results['latent_shape'][0]}"
        warnings.append(f"{name}: {count} channels have collapsed: {channels}")
    return warnings
