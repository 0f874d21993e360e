"""From configuration to latents: codecs, and the job that makes a cache."""

from __future__ import annotations

import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from vae3d.data.image_folder import ImageFolder
from vae3d.data.readers import is_image
from vae3d.data.sources import Folder, Source, open_source
from vae3d.latents.clips import Transform, items_of
from vae3d.latents.codec import LatentCodec
from vae3d.latents.encode import Job, encode_cache
from vae3d.latents.identity import digest_of
from vae3d.loading import instantiate, open_codec
from vae3d.models.base import nearest_frames
from vae3d.training.agreement import check_ranks_agree
from vae3d.training.start import working_ranks

if TYPE_CHECKING:
    from vae3d.config.latents import EncodeConfig

log = logging.getLogger("vae3d")


def _source(config: EncodeConfig) -> Source:
    """A folder of nothing but images is read as in training, with the splits that its folders are called after."""
    if not isinstance(config.source, str):
        return instantiate(config.source)
    source = open_source(config.source, config.root)
    images = isinstance(source, Folder) and source.path.is_dir() and source.table()["path"].map(is_image).all()
    return ImageFolder(config.source) if images else source


def padding(codec: LatentCodec, transform: Transform) -> list[str]:
    """What the autoencoder adds to clips of this size; their last latents stand for it, too."""
    odd = {name: size for name in ("height", "width") if (size := getattr(transform, name) or 0) % codec.space_stride}
    notes = [f"{name}={size} is filled up to a multiple of {codec.space_stride}" for name, size in odd.items()]
    fits = codec.model.frames_valid
    if transform.frames is not None and not fits(transform.frames):
        nearest = ", ".join(map(str, nearest_frames(transform.frames, fits)))
        notes.append(f"frames={transform.frames} is filled up with added frames; whole are {nearest}")
    return notes


def encode(config: EncodeConfig) -> None:
    """Make the latent cache that `config` describes, or go on with it."""
    ranks, device = working_ranks(config.device)
    check_ranks_agree(asdict(config))
    codec = open_codec(
        config.checkpoint,
        pixel_range="uint8",
        precision=config.precision,
        chunk_frames=config.chunk_frames,
        device=device,
        changes=config.model,
    )
    source = _source(config)
    transform = Transform(**{field.name: getattr(config, field.name) for field in fields(Transform)})
    with ranks.main_process_first():  # which probes the files, where it must; the others find its answers on disk
        items, errors = items_of(source.table(), transform, labels=config.labels, split=config.split)
    check_ranks_agree(
        {
            "clips to encode": len(items),
            "their names and order": digest_of([item.key for item in items]),
            "their labels, splits and texts": digest_of([[item.label, item.split, item.text] for item in items]),
        }
    )
    if ranks.is_main_process:
        for note in (*getattr(source, "notes", ()), *padding(codec, transform)):
            log.info(note)
    named = {field.name for field in fields(Job)} & {field.name for field in fields(config)}
    settings = {name: getattr(config, name) for name in named - {"checkpoint", "source"}}
    told = config.source if isinstance(config.source, str) else str(config.source)
    job = Job(codec, config.checkpoint, told, Path(config.cache), items, errors, transform, **settings)
    encode_cache(job, ranks.process_index, ranks.num_processes, ranks.wait_for_everyone)
