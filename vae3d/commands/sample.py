"""Draw samples from a latent diffusion model: from configuration to files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from vae3d import distributed
from vae3d.checkpoints.location import cached_repository, exists, list_some
from vae3d.diffusion import sampling
from vae3d.diffusion.base import Sampling
from vae3d.diffusion.export import Export, check_same_vae, read_export
from vae3d.diffusion.quality import distances, draw_reference_sets
from vae3d.distributed import init_inference
from vae3d.errors import UserError
from vae3d.hashing import json_hash, weights_hash
from vae3d.inference.pictures import grid
from vae3d.io import naming, remove, write_json
from vae3d.latents.cache import LatentCache
from vae3d.latents.codec import LatentCodec
from vae3d.latents.scale import LatentStats
from vae3d.layout import place
from vae3d.loading import open_codec
from vae3d.pixels import Quantized
from vae3d.progress import progress
from vae3d.result_folder import has_results, is_ours, locked, resumes, write_command
from vae3d.running_stats import RunningStats
from vae3d.text import plural
from vae3d.transfer import on_host

if TYPE_CHECKING:
    from vae3d.config.diffusion import SampleConfig

log = logging.getLogger("vae3d")
Reference = tuple[LatentCache, tuple[list[int], list[int]]]  # a cache, and two disjoint sets of as many of its latents


def run(config: SampleConfig) -> None:
    """Draw config.count samples of one size, or of every trained one, shared among the ranks; the main process writes
    the files that join all of them."""
    process, device = init_inference(config.device)
    export = read_export(config.checkpoint, config.ema)
    labels = sample_labels(config, export.config)
    names = [] if labels is None else [export.config["classes"][label] for label in labels]
    configs = per_size(config, export.config["sizes"])
    sizes = [sample_size(each, export.config["size"]) for each in configs]
    writes = [files_to_write(each, size) for each, size in zip(configs, sizes, strict=True)]
    codec = open_autoencoder(export, config, device)
    if any("npz" in write for write in writes) and codec.model.pixel_channels != 3:
        raise UserError(
            f"write=[npz] is for images of 3 channels, and the autoencoder's have {codec.model.pixel_channels}; use "
            "grid or files"
        )
    shapes = [codec.latent_shape(*size) for size in sizes]
    if (ours := shapes[0][0]) != (channels := export.config["network"]["channels"]):
        raise UserError(f"{export.folder} has latents of {plural(channels, 'channel')}, and its autoencoder {ours}")
    cache = None if config.against is None else LatentCache(config.against, codec)
    references = [None if cache is None else open_reference(config, cache, shape, names) for shape in shapes]
    hashes = {"weights": weights_hash(export.network().state_dict())}
    hashes["autoencoder"] = weights_hash(codec.model.state_dict())
    for each, size, write, reference in zip(configs, sizes, writes, references, strict=True):
        draw_and_write(each, export, codec, labels, names, size, write, reference, hashes, process, device)


def per_size(config: SampleConfig, sizes: Sequence[Sequence[int]]) -> list[SampleConfig]:
    """`config`, or with config.every_size one for each of the sizes, with a folder named after it."""
    if not config.every_size:
        return [config]
    return [
        replace(
            config,
            every_size=False,
            num_frames=frames,
            height=height,
            width=width,
            out=str(Path(config.out) / f"{frames}x{height}x{width}"),
        )
        for frames, height, width in sizes
    ]


def sample_size(config: SampleConfig, default: Sequence[int]) -> tuple[int, int, int]:
    """Frames, height and width of the samples."""
    wanted = (config.num_frames, config.height, config.width)
    return tuple(own or other for own, other in zip(wanted, default, strict=True))


def files_to_write(config: SampleConfig, size: Sequence[int]) -> set[str]:
    """config.write; of videos without npz. Raises UserError if nothing is left."""
    write = set(config.write) - ({"npz"} if size[0] > 1 else set())
    if not write:
        raise UserError(
            f"write=[npz] is for images, and these samples have {plural(size[0], 'frame')}; use grid or files"
        )
    return write


def draw_and_write(
    config: SampleConfig,
    export: Export,
    codec: LatentCodec,
    labels: Sequence[int] | None,
    names: Sequence[str],
    size: tuple[int, int, int],
    write: set[str],
    reference: Reference | None,
    hashes: Mapping[str, str],
    process: PartialState,
    device: torch.device,
) -> None:
    """Draw samples of one size into config.out. names: of the labels. hashes: of the weights, for command.json."""
    main, rank, world_size = process.is_main_process, process.process_index, process.num_processes
    shape = codec.latent_shape(*size)
    settings = Sampling(**{field.name: getattr(config, field.name) for field in fields(Sampling)})
    draw = make_sampler(export, config, settings, shape, labels, device)
    independent = ("checkpoint", "vae", "out", "overwrite", "device", "every_size")  # others change the samples
    chosen = {name: value for name, value in asdict(config).items() if name not in independent}
    command = {**hashes, **chosen, "labels": json_hash(names)}  # of all samples: 50,000 names may be too large a file

    folder = Path(config.out)
    with locked(folder, f"out={folder}") if main else nullcontext():
        prepare_folder(folder, config.overwrite, command, main, device)
        in_grid = min(config.count, sampling.MAX_IN_GRID) if "grid" in write else 0
        kept = config.count if "npz" in write else in_grid
        pictures = np.empty((kept if main else 0, *size, codec.model.pixel_channels), np.uint8)
        latents = torch.empty(config.count if reference and main else 0, *shape)
        stats = RunningStats(codec.channels, device)
        batches = list(sampling.per_rank_batches(config.count, config.batch_size, rank, world_size))

        def samples() -> Iterator[tuple[list[int], Tensor, list[Quantized]]]:
            for mine in progress(batches, unit="batch", hidden=not main):
                z = sampling.cached_latents(folder, mine, draw).to(device)
                stats.update_channels(z)
                yield mine, z, list(sampling.decode_parts(codec, z, size)) if mine else []

        for mine, z, parts in on_host(samples(), device):
            frames = np.concatenate([pictures[:0], *(part.numpy(codec.output_name) for part in parts)])
            if "files" in write:
                for i, sample in zip(mine, frames, strict=True):
                    stem = folder / sampling.file_stem(i, names[i] if names else "")
                    sampling.write_frames(stem, sample, config.fps)
            sent = [i < kept for i in mine]
            batch = (mine, frames[sent], z if reference else None)
            for indices, some, values in distributed.gather_to_main(batch):
                pictures[[i for i in indices if i < kept]] = some
                if values is not None:
                    latents[indices] = values
        stats.all_reduce()
        if not main:
            return
        if "grid" in write:
            sampling.write_frames(folder / "grid", grid(pictures[:in_grid]), config.fps)
        if "npz" in write:
            sampling.write_npz(folder, pictures, labels)
        log.info("%s of %s -> %s", plural(config.count, "sample"), export.folder, config.out)
        latent_stats = LatentStats.of(stats, config.count)
        rms, of_data = latent_stats.rms(), export.data_rms()
        log.info("their latents (root mean square %.3g, the data's %.3g): %s", rms, of_data, latent_stats)
        if warning := sampling.check_latent_rms(rms, of_data, export.process(), settings):
            log.warning(warning)
        if reference:
            data = compare_with_data(latents, reference, config)
            if "grid" in write:
                sampling.write_frames(folder / "data", grid(sampling.decoded(codec, data[:in_grid], size)), config.fps)
        remove(folder / sampling.LATENTS)


def sample_labels(config: SampleConfig, metadata: Mapping[str, Any]) -> list[int] | None:
    """The class of every sample; None for a network without classes."""
    if not metadata["network"]["num_classes"]:
        if config.classes or config.guidance != 1:
            raise UserError("the model was trained without classes; leave out classes and guidance")
        return None
    if config.guidance != 1 and metadata["label_dropout"] == 0:
        raise UserError("the model was trained with label_dropout=0, which guidance needs; leave out guidance")
    index_of = {metadata["classes"][index]: index for index in metadata["trained_classes"]}
    given = config.classes if isinstance(config.classes, list) else [config.classes]
    unknown = [str(name) for name in given if str(name) not in index_of]
    if unknown:
        raise UserError(f"classes={list_some(unknown)}: the model's classes are {list_some(index_of, 20)}")
    chosen = [index_of[str(name)] for name in given] or list(index_of.values())
    return [chosen[index % len(chosen)] for index in range(config.count)]


def open_autoencoder(export: Export, config: SampleConfig, device: torch.device) -> LatentCodec:
    """The autoencoder that the model was trained with. Raises UserError if it is missing or another one."""
    path = config.vae or export.config["vae"]["path"]
    if not exists(path) and cached_repository(path) is None:
        raise UserError(f"{path}, the autoencoder of {export.folder}, does not exist; give its path as vae=PATH")
    codec = open_codec(path, pixel_range="uint8", precision=config.precision, device=device)
    check_same_vae(export.config["vae"], codec, str(path))
    codec.model.set_tiles(config.tile, config.tile_overlap)
    return codec


def open_reference(config: SampleConfig, cache: LatentCache, shape: Sequence[int], names: Sequence[str]) -> Reference:
    """Latents of the cache of the samples' shape. Raises UserError if it has too few."""
    of_shape = [group.entries for group in cache.sizes() if group.latent_shape == tuple(shape)]
    if not of_shape:
        found = dict.fromkeys(" x ".join(map(str, group.latent_shape)) for group in cache.sizes())
        ours = " x ".join(map(str, shape))
        raise UserError(f"against={config.against} has latents of {', '.join(found)}, the samples are of {ours}")
    entries = np.sort(np.concatenate(of_shape))
    return cache, draw_reference_sets(cache, config.count, names or None, entries)


def make_sampler(
    export: Export,
    config: SampleConfig,
    settings: Sampling,
    latent_shape: Sequence[int],
    labels: Sequence[int] | None,
    device: torch.device,
) -> Callable[[Sequence[int]], Tensor]:
    """A function from indices of samples to their latents [B, C, t, h, w]. Raises UserError if they are not finite."""
    network, process = place(export.network(), device), export.process()

    def draw(indices: Sequence[int]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            try:
                z = sampling.sample_latents(
                    network,
                    process,
                    latent_shape,
                    settings,
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


def prepare_folder(folder: Path, overwrite: bool, command: Mapping[str, Any], main: bool, device: torch.device) -> None:
    """Create the folder before the first sample is drawn.

    Raises UserError on all ranks if that fails, or if the folder holds files of another command.
    """
    reason = None
    if main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if overwrite and is_ours(folder):
                sampling.clear(folder)
            if has_results(folder) and not resumes(folder, command, f"out={folder}"):
                reason = f"out={folder} holds files that sampling did not write; choose another folder"
            else:
                write_command(folder, command)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
        except UserError as error:
            reason = str(error)
    if not distributed.all_ranks_ok(reason is None, device):
        raise UserError(reason or f"out={folder} cannot be used; see the error of the first rank")


def compare_with_data(latents: Tensor, reference: Reference, config: SampleConfig) -> Tensor:
    """Log and write the distances between samples and cached latents; returns the latter."""
    cache, sets = reference
    data, other = (torch.stack([cache[index].z for index in indices]) for indices in sets)
    found = distances(latents, data, other)
    file = Path(config.out) / "distances.json"
    with naming(file):
        write_json(file, {"against": str(config.against), "count": config.count, "sliced_wasserstein": found})
    log.info(
        "sliced Wasserstein distance to as many latents of %s, in their deviations: %s",
        config.against,
        ", ".join(f"{name} {value:.3f}" for name, value in found.items()),
    )
    return data
