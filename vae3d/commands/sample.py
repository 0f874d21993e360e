"""From configuration to the samples of a latent diffusion model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae3d import distributed
from vae3d.diffusion.base import Sampling
from vae3d.diffusion.data import clip_and_latent_size
from vae3d.diffusion.export import Export, check_same_vae, read_export
from vae3d.diffusion.quality import distances, draw_reference_sets
from vae3d.diffusion.sampling import (
    LATENTS,
    MAX_IN_GRID,
    cached_latents,
    check_latent_rms,
    clear,
    per_rank_batches,
    sample_latents,
    write_files,
    write_grid,
    write_npz,
)
from vae3d.diffusion.scale import LatentStats
from vae3d.errors import UserError
from vae3d.hashing import weights_hash
from vae3d.inference.folder import begin, has_results, locked, resumes
from vae3d.io import naming, remove, write_json
from vae3d.latents.cache import LatentCache
from vae3d.latents.codec import LatentCodec
from vae3d.loading import open_codec
from vae3d.running_stats import RunningStats
from vae3d.training.diffusion_validation import decoded
from vae3d.training.start import working_ranks

if TYPE_CHECKING:
    from vae3d.config.diffusion import SampleConfig

log = logging.getLogger("vae3d")


class Reference(NamedTuple):
    """Latents of a cache that samples are compared with: two sets of places, as many as there are samples."""

    cache: LatentCache
    first: list[int]
    second: list[int]

    def latents(self, places: Sequence[int]) -> Tensor:
        return torch.stack([self.cache[place].z for place in places])


def sample(config: SampleConfig) -> None:
    """Draw the samples that `config` describes, shared among the ranks; the first one writes what is of all of them."""
    process, device = working_ranks(config.device)
    export = read_export(config.checkpoint, config.ema)
    labels = _labels(config, export.config)
    names = [] if labels is None else [export.config["classes"][label] for label in labels]
    asked = (config.num_frames, config.height, config.width)
    size = tuple(ours or told for ours, told in zip(asked, export.config["size"], strict=True))
    write = set(config.write) - ({"npz"} if size[0] > 1 else set())
    if not write:
        raise UserError(f"write=[npz] is for images, and these samples have {size[0]} frames; use grid or files")
    codec = _codec(export, config, device)
    shape = codec.latent_shape(*size)
    if shape[0] != (channels := export.config["network"]["channels"]):
        raise UserError(f"{export.folder} makes latents of {channels} channels, and its autoencoder has {shape[0]}")
    reference = None if config.against is None else _reference(config, codec, shape, names)
    draw = _sampler(export, config, shape, labels, device)
    folder = Path(config.out)
    weights = weights_hash(export.network().state_dict())
    command = _command(config, {"weights": weights, "autoencoder": weights_hash(codec.model.state_dict())}, names)
    with locked(folder, f"out={folder}") if process.is_main_process else nullcontext():
        _make(folder, config.overwrite, command, process.is_main_process, device)
        _write(config, process, device, codec, export, reference, draw, labels, names, size, shape, write)


def _command(config: SampleConfig, weights: Mapping[str, str], names: Sequence[str]) -> dict[str, Any]:
    """What the samples depend on, to tell a resume from another command."""
    free = ("checkpoint", "vae", "out", "overwrite", "device")
    return {**weights, **{name: value for name, value in asdict(config).items() if name not in free}, "labels": names}


def _write(
    config: SampleConfig,
    process: Any,
    device: torch.device,
    codec: LatentCodec,
    export: Export,
    reference: Reference | None,
    draw: Callable[[Sequence[int]], Tensor],
    labels: Sequence[int] | None,
    names: Sequence[str],
    size: tuple[int, int, int],
    shape: Sequence[int],
    write: set[str],
) -> None:
    folder = Path(config.out)
    shown = min(config.count, MAX_IN_GRID) if "grid" in write else 0
    kept = config.count if "npz" in write else shown
    pictures = np.empty((kept if process.is_main_process else 0, *size, 3), np.uint8)
    latents = torch.empty(config.count if reference and process.is_main_process else 0, *shape)
    stats = RunningStats(codec.channels, device)
    for mine in per_rank_batches(config.count, config.batch_size, process.process_index, process.num_processes):
        z = cached_latents(folder, mine, draw).to(device)
        stats.update_channels(z)
        frames = decoded(codec, z, size) if mine else pictures[:0]
        if "files" in write:
            write_files(folder, [f"{i:06d}" + (f"_{names[i]}" if names else "") for i in mine], frames, config.fps)
        sent = [i < kept for i in mine]
        for indices, some, values in distributed.gather_to_main((mine, frames[sent], z.cpu() if reference else None)):
            pictures[[i for i in indices if i < kept]] = some
            if values is not None:
                latents[indices] = values
    latent_stats = LatentStats.over_ranks(stats, config.count)
    if not process.is_main_process:
        return
    if "grid" in write:
        write_grid(folder / "grid", pictures[:shown], fps=config.fps)
    if "npz" in write:
        write_npz(folder, pictures, labels)
    log.info("%d samples of %s -> %s", config.count, export.folder, config.out)
    log.info("their latents (those of the data have mean 0, deviation 1), per channel\n%s", latent_stats.table())
    if doubt := check_latent_rms(latent_stats.rms, export.process(), _sampling(config)):
        log.warning(doubt)
    if reference:
        data = _compare(latents, reference, config)
        if "grid" in write:
            write_grid(folder / "data", decoded(codec, data[:shown], size), fps=config.fps)
    remove(folder / LATENTS)


def _make(folder: Path, overwrite: bool, command: Mapping[str, Any], main: bool, device: torch.device) -> None:
    """Make the folder before the samples, which would be lost. Raises UserError on all ranks if it cannot be, or if it
    holds something that this command did not begin."""
    reason = None
    if main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if overwrite:
                clear(folder)
            if has_results(folder) and not resumes(folder, command, f"out={folder}"):
                rest = "files that sampling did not write" if overwrite else "files; choose another, or overwrite=true"
                reason = f"out={folder} holds {rest}"
            else:
                begin(folder, command)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
        except UserError as error:
            reason = str(error)
    if not distributed.all_ranks_ok(reason is None, device):
        raise UserError(reason or f"out={folder} cannot be used; the first rank tells why")


def _reference(config: SampleConfig, codec: LatentCodec, shape: Sequence[int], names: Sequence[str]) -> Reference:
    cache = LatentCache(config.against, codec)
    if (there := clip_and_latent_size(cache)[1]) != tuple(shape):
        told = [" x ".join(map(str, sizes)) for sizes in (there, shape)]
        raise UserError(f"against={config.against} has latents of {told[0]}, the samples are of {told[1]}")
    return Reference(cache, *draw_reference_sets(cache, config.count, names or None))


def _compare(latents: Tensor, reference: Reference, config: SampleConfig) -> Tensor:
    """Tell and write how far the samples are from the data; the latents that they were compared with."""
    data, other = (reference.latents(places) for places in (reference.first, reference.second))
    found = distances(latents, data, other)
    told = {"against": str(config.against), "count": config.count, "sliced_wasserstein": found}
    file = Path(config.out) / "distances.json"
    with naming(file):
        write_json(file, told)
    log.info(
        "sliced Wasserstein distance to as many latents of %s, in their deviations: %s",
        config.against,
        ", ".join(f"{name} {value:.3f}" for name, value in found.items()),
    )
    return data


def _codec(export: Export, config: SampleConfig, device: torch.device) -> LatentCodec:
    path = config.vae or export.config["vae"]["path"]
    if not Path(path).exists():
        raise UserError(f"{path}, the autoencoder of {export.folder}, is not there; name where it is by vae=PATH")
    codec = open_codec(path, pixel_range="uint8", precision=config.precision, device=device)
    check_same_vae(export.config["vae"], codec, str(path))
    return codec


def _labels(config: SampleConfig, told: Mapping[str, Any]) -> list[int] | None:
    """The class of every sample; None for a network without classes."""
    if not told["network"]["num_classes"]:
        if config.classes or config.guidance != 1:
            raise UserError("the model was trained without classes; leave out classes and guidance")
        return None
    if config.guidance != 1 and told["label_dropout"] == 0:
        raise UserError("the model was trained with label_dropout=0, and so not for guidance; leave out guidance")
    numbers = {told["classes"][number]: number for number in told["trained_classes"]}
    given = config.classes if isinstance(config.classes, list) else [config.classes]
    unknown = [str(name) for name in given if str(name) not in numbers]
    if unknown:
        raise UserError(f"classes={', '.join(unknown)}: the model knows {', '.join(numbers)}")
    asked = [numbers[str(name)] for name in given] or list(numbers.values())
    return [asked[index % len(asked)] for index in range(config.count)]


def _sampling(config: SampleConfig) -> Sampling:
    named = {field.name for field in fields(Sampling)} & {field.name for field in fields(config)}
    return Sampling(**{name: getattr(config, name) for name in named})


def _sampler(
    export: Export,
    config: SampleConfig,
    latent_shape: Sequence[int],
    labels: Sequence[int] | None,
    device: torch.device,
) -> Callable[[Sequence[int]], Tensor]:
    """Numbers of samples -> their latents [B, C, t, h, w], which are finite."""
    network, process = export.network().to(device), export.process()

    def draw(indices: Sequence[int]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            try:
                z = sample_latents(
                    network,
                    process,
                    latent_shape,
                    _sampling(config),
                    seed=config.seed,
                    indices=indices,
                    labels=None if labels is None else [labels[i] for i in indices],
                    batch_size=config.batch_size,
                    device=device,
                )
            except ValueError as error:
                raise UserError(str(error)) from error
        if not z.isfinite().all():
            raise UserError(f"samples of {export.folder} are not finite; more steps, or clip=5, may help")
        return z

    return draw
