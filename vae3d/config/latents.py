"""Typed schema and checks of scripts/encode_latents.py. Imports no torch, so that errors show in a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from vae3d.config.validate import ConfigError, path_errors, typed


@dataclass
class EncodeConfig:
    """Encode a data set into a latent cache."""

    checkpoint: str = MISSING
    source: Any = MISSING  # a table, a JSON list, a folder or one file; or a node with `_target_`, as conf/data has
    cache: str = MISSING  # the folder to write; the same command goes on with it
    root: str | None = None  # what relative paths in a table are relative to; by default the table's folder
    split: str | None = None  # rows of this split only
    model: dict[str, Any] = field(default_factory=dict)  # changes to the checkpoint's model: model.micro_frames=null
    height: int | None = None  # resize and centre-crop to height x width; null: as the file is
    width: int | None = None
    short_side: int | None = None  # scale to this before cropping; null: so that the crop covers the short side
    frames: int | None = None  # of a clip; null: all that the file has
    clips: str = "one"  # of a file: one, from its middle, or all that lie in it one behind the other
    stride: int = 1
    fps: float | None = None  # thin faster videos out to this rate
    panorama: bool = False  # files are equirectangular (2:1), shown whole
    flip: bool = False  # every clip also mirrored, as an entry of its own
    labels: str = "auto"  # column (`label`), folder (its name), none; auto: the column, or else the folder
    store: str = "moments"  # moments (mean and deviation of the posterior), mean, sample
    dtype: str = "fp16"  # fp32, fp16, bf16: of what is stored
    writers: list[str] = field(default_factory=list)  # beside safetensors: npy, webdataset
    shard_size: int = 512  # clips; a process holds a shard in memory, and a kill loses it
    precision: str = "fp32"  # fp32, bf16, fp16: autocast over fp32 weights
    batch_size: int = 8
    chunk_frames: int | None = None  # coded at once; null: what the model's stream takes
    device: str | None = None  # null: cuda if there is one
    workers: int = 4
    timeout: float = 900.0  # seconds without a clip from the workers after which it stops; 0: never
    reader: str = "auto"
    seed: int = 0  # of samples
    max_broken: float = 0.2  # stop when a larger share of the clips cannot be encoded
    retry: bool = False  # encode shards with errors again
    verify: str = "stat"  # how replaced source files are found: stat (size and time), hash (content; reads all files)


CHOICES = {
    "split": (None, "train", "val", "test"),
    "clips": ("one", "all"),
    "labels": ("auto", "column", "folder", "none"),
    "store": ("moments", "mean", "sample"),
    "dtype": ("fp32", "fp16", "bf16"),
    "precision": ("bf16", "fp16", "fp32"),
    "reader": ("auto", "pyav", "decord"),
    "verify": ("stat", "hash"),
}


def _count(value: Any) -> bool:
    return value is None or value >= 1


RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("height", "width", "short_side", "frames", "chunk_frames"), (_count, "at least 1, or null")),
    **dict.fromkeys(("stride", "shard_size", "batch_size"), (_count, "at least 1")),
    "fps": (lambda v: v is None or v > 0, "positive, or null"),
    **dict.fromkeys(("workers", "timeout"), (lambda v: v >= 0, "0 or more")),
    "max_broken": (lambda v: 0 <= v < 1, "a share, from 0 to less than 1"),
    "writers": (lambda v: set(v) <= {"npy", "webdataset"}, "a list of npy, webdataset"),
}


def check_encoding(cfg: DictConfig) -> EncodeConfig:
    """The configuration as typed objects; raises ConfigError naming every error."""
    config, errors = typed(cfg, EncodeConfig, CHOICES, RANGES)
    if (config.height is None) != (config.width is None):
        errors.append("height and width go together; set both, or neither")
    if config.clips == "all" and config.frames is None:
        errors.append("clips=all needs to know how long they are; set frames")
    if config.writers and config.dtype == "bf16":
        errors.append(f"writers={config.writers} cannot hold bf16, which numpy does not have; use dtype=fp16 or fp32")
    if config.panorama and config.short_side is not None:
        errors.append(f"short_side={config.short_side} cuts panoramas, which panorama=true shows whole; use null")
    if config.panorama and config.height is not None and config.width != 2 * config.height:
        errors.append(f"width={config.width} must be twice height={config.height}, for panorama=true")
    if isinstance(config.source, dict) and "_target_" not in config.source:
        errors.append("source must be a path, or a node with `_target_`, as conf/data has")
    errors += path_errors({name: getattr(config, name) for name in ("checkpoint", "source", "root")})
    if errors:
        raise ConfigError(errors)
    return config


ConfigStore.instance().store("latents_schema", EncodeConfig)
