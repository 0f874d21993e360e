"""Encode a data set into a latent cache: from configuration to job."""

from __future__ import annotations

import logging
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from vae3d.data.image_folder import ImageFolder
from vae3d.data.readers import is_image
from vae3d.data.sources import Folder, Source, open_source
from vae3d.data.storage import is_stored
from vae3d.distributed import check_ranks_agree, init_inference
from vae3d.hashing import json_hash
from vae3d.latents.clips import Transform, items_of
from vae3d.latents.codec import LatentCodec
from vae3d.latents.encode import EncodeJob, encode_cache
from vae3d.loading import instantiate, open_codec, require_file_channels
from vae3d.models.interface import nearest_frames

if TYPE_CHECKING:
    from vae3d.config.latents import EncodeConfig

log = logging.getLogger("vae3d")


def run(config: EncodeConfig) -> None:
    """Write the latent cache that `config` describes, or resume it."""
    ranks, device = init_inference(config.device)
    check_ranks_agree(asdict(config))
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
    source = open_images_or_source(config)
    transform = Transform(**{field.name: getattr(config, field.name) for field in fields(Transform)})
    with ranks.main_process_first():  # it probes the files; the others read its cache
        items, errors = items_of(source.table(), transform, labels=config.labels, split=config.split)
    check_ranks_agree(
        {
            "clips to encode": len(items),
            "their names and order": json_hash([item.key for item in items]),
            "their labels, splits and texts": json_hash([[item.label, item.split, item.text] for item in items]),
        }
    )
    if ranks.is_main_process:
        for note in (*getattr(source, "notes", ()), *padding(codec, transform), *tile_notes(codec)):
            log.info(note)
    job = EncodeJob(config, codec, items, errors, transform)
    encode_cache(job, ranks.process_index, ranks.num_processes, ranks.wait_for_everyone)


def open_images_or_source(config: EncodeConfig) -> Source:
    """The data source; a folder of images only becomes an ImageFolder, whose subfolders name splits, as in training."""
    if not isinstance(config.source, str):
        return instantiate(config.source)
    source = open_source(config.source, config.root)
    is_folder = isinstance(source, Folder) and not is_stored(source.path) and source.path.is_dir()
    images = is_folder and source.table()["path"].map(is_image).all()
    return ImageFolder(config.source) if images else source


def padding(codec: LatentCodec, transform: Transform) -> list[str]:
    """Notes on clips that the autoencoder pads to its strides: their last latents contain padding."""
    sizes = {name: getattr(transform, name) or 0 for name in ("height", "width")}
    stride = codec.space_stride
    notes = [f"{name}={size} is padded to a multiple of {stride}" for name, size in sizes.items() if size % stride]
    fits = codec.model.frames_valid
    if transform.frames is not None and not fits(transform.frames):
        nearest = ", ".join(map(str, nearest_frames(transform.frames, fits)))
        notes.append(f"frames={transform.frames} is padded with extra frames; without: {nearest}")
    return notes


def tile_notes(codec: LatentCodec) -> list[str]:
    return [] if codec.model.tiling is None else [f"coded in {codec.model.tiling}"]
