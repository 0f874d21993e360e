"""Small data sets, and jobs that encode them in this process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests import tiny
from tests.latents import families
from vae3d.commands.encode import transform_of
from vae3d.config.latents import EncodeConfig
from vae3d.data.sources.open_source import open_source
from vae3d.latents.clips import ClipReader, items_of
from vae3d.latents.codec import LatentCodec
from vae3d.latents.encode import EncodeJob, encode_cache

SMALL = {"height": 16, "width": 16}


def pictures(folder: Path, count: int = 3, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """`count` images in a folder of every class."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(tiny.frames(1, seed=10 * number + i)[0]).save(folder / name / f"{i}.png")
    return folder


def codec(name: str = "spatial", **settings: Any) -> LatentCodec:
    return LatentCodec(families.model(name), **{"pixel_range": "uint8", **settings})


def job(source: Path, folder: Path, ours: LatentCodec | None = None, **settings: Any) -> EncodeJob:
    settings = {**SMALL, "workers": 0, "shard_size": 2, "batch_size": 2, **settings}
    config = EncodeConfig(checkpoint="runs/x", source=str(source), cache=str(folder), **settings)
    table = open_source(source).table()
    transform = transform_of(config, table)
    items, errors = items_of(table, transform, labels=config.labels, split=config.split)
    return EncodeJob(config, ours or codec(), items, errors, transform)


def made(source: Path, folder: Path, ours: LatentCodec | None = None, **settings: Any) -> Path:
    encode_cache(job(source, folder, ours, **settings))
    return folder


def pixels(of: EncodeJob, number: int) -> torch.Tensor:
    """What a clip of a job is encoded from, [1, 3, T, H, W] uint8."""
    return ClipReader(of.items, of.transform)[number].pixels[None]


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def array(content: bytes) -> torch.Tensor:
    """Of a .npy file."""
    return torch.from_numpy(np.load(io.BytesIO(content)))
