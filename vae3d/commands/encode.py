"""Encode a data set into a latent cache: from configuration to job."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, fields
from statistics import mean
from typing import TYPE_CHECKING

from vae3d.config.latents import share_of
from vae3d.data.batches.aspects import AUTO
from vae3d.data.batches.buckets import buckets_of, share_kept
from vae3d.data.media import DataError
from vae3d.data.sources.image_folder import open_images_or_source
from vae3d.data.sources.open_source import Source
from vae3d.data.table.probe import fill_metadata
from vae3d.data.table.rows import NUMBERS
from vae3d.distributed import check_ranks_agree, init_inference
from vae3d.hashing import json_hash
from vae3d.latents.clips import Item, Shape, Transform, items_of
from vae3d.latents.codec import LatentCodec
from vae3d.latents.encode import EncodeJob, encode_cache
from vae3d.loading import instantiate, open_codec, require_file_channels
from vae3d.models.interface import nearest_frames
from vae3d.text import plural

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from vae3d.config.latents import EncodeConfig

log = logging.getLogger("vae3d")


def run(config: EncodeConfig) -> None:
    """Write the latent cache that `config` describes, or resume it, or help other processes that write it."""
    ranks, device = init_inference(config.device)
    check_ranks_agree(asdict(config))
    codec = open_encoder(config, device)
    with ranks.main_process_first():  # it probes the files; the others read its cache
        job = open_job(config, codec)
    check_ranks_agree(
        {
            "clips to encode": len(job.items),
            "their names and order": json_hash([item.key for item in job.items]),
            "their labels, splits and texts": json_hash([[item.label, item.split, item.text] for item in job.items]),
        }
    )
    part, parts = share_of(config.shard)
    index, count = part * ranks.num_processes + ranks.process_index, parts * ranks.num_processes
    encode_cache(job, index, count, ranks.wait_for_everyone, quiet=not ranks.is_main_process)


def open_encoder(config: EncodeConfig, device: torch.device) -> LatentCodec:
    """The autoencoder on `device`."""
    codec = open_codec(
        config.checkpoint,
        pixel_range="uint8",
        precision=config.precision,
        chunk_frames=config.chunk_frames,
        device=device,
        changes=config.model,
        tile=config.tile,
        tile_overlap=config.tile_overlap,
    )
    require_file_channels(codec.model, config.checkpoint)
    return codec


def open_job(config: EncodeConfig, codec: LatentCodec | None = None) -> EncodeJob:
    """The clips of the source. codec: None for a process that does not encode."""
    source = source_of(config)
    table = source.table()
    transform = transform_of(config, table)
    items, errors = items_of(table, transform, labels=config.labels, split=config.split)
    notes = (*padding(codec, transform), *tile_notes(codec)) if codec is not None else ()
    for note in (*getattr(source, "notes", ()), *notes, *bucket_notes(items, transform, table)):
        log.info(note)
    return EncodeJob(config, codec, items, errors, transform)


def source_of(config: EncodeConfig) -> Source:
    """The data source; a folder of images only is an ImageFolder, as in training."""
    if not isinstance(config.source, str):
        return instantiate(config.source, "source")
    return open_images_or_source(config.source, config.root)


def transform_of(config: EncodeConfig, table: pd.DataFrame) -> Transform:
    """How clips are read. Buckets of aspects=auto are those of the table's files. Raises DataError if none opens."""
    settings = {field.name: getattr(config, field.name) for field in fields(Transform)}
    if config.buckets is None:
        return Transform(**settings)
    heights = widths = None
    if config.buckets.shapes is None and AUTO in config.buckets.aspects:
        rows = table if config.split is None else table[table["split"] == config.split]
        known = fill_metadata(rows.reset_index(drop=True), NUMBERS)[0]
        if known.empty:
            raise DataError("buckets.aspects=auto: no file can be opened, whose aspect ratio would count")
        heights, widths = known["height"].to_numpy(float), known["width"].to_numpy(float)
    buckets = buckets_of(config.buckets, [config.frames], (config.height, config.width), heights, widths)
    shapes = tuple(sorted((bucket.frames, *bucket.size) for bucket in buckets))
    return Transform(**settings | {"frames": None, "height": None, "width": None, "buckets": shapes})


def bucket_notes(items: Sequence[Item], transform: Transform, table: pd.DataFrame) -> list[str]:
    """Lines with the clips of every bucket, and the share of their files' pixels that is kept."""
    if not transform.buckets:
        return []
    known = fill_metadata(table, NUMBERS)[0]
    aspects = dict(zip(known["row"], (known["width"] / known["height"]).astype(float), strict=True))
    kept: dict[Shape, list[float]] = {shape: [] for shape in transform.buckets}
    for item in items:
        kept[item.shape].append(float(share_kept(aspects[item.row], item.shape[1:])))
    empty = ["x".join(map(str, shape)) for shape, shares in kept.items() if not shares]
    lines = [f"{plural(len(kept) - len(empty), 'bucket')} of frames x height x width:"]
    for shape, shares in kept.items():
        if shares:
            name = "x".join(map(str, shape))
            lines.append(f"  {name}: {plural(len(shares), 'clip')}, {mean(shares):.1%} of the pixels kept")
    if empty:
        lines.append(f"  without clips: {', '.join(empty)}")
    return lines


def padding(codec: LatentCodec, transform: Transform) -> list[str]:
    """Notes on clips that the autoencoder pads to its strides: their last latents contain padding. Raises what
    check_size raises."""
    stride, fits, notes = codec.space_stride, codec.model.frames_valid, []
    for shape in transform.buckets or [(transform.frames, transform.height, transform.width)]:
        if None not in shape[1:]:
            codec.model.check_size(*shape[1:])
        of = f" of bucket {'x'.join(map(str, shape))}" if transform.buckets else ""
        for name, size in zip(("height", "width"), shape[1:], strict=True):
            if (size or 0) % stride:
                notes.append(f"{name}={size}{of} is padded to a multiple of {stride}")
        if shape[0] is not None and not fits(shape[0]):
            nearest = ", ".join(map(str, nearest_frames(shape[0], fits)))
            notes.append(f"frames={shape[0]}{of} is padded with extra frames; without: {nearest}")
    return notes


def tile_notes(codec: LatentCodec) -> list[str]:
    return [] if codec.model.tiling is None else [f"coded in {codec.model.tiling}"]
