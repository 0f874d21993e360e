"""Typed schema and checks of scripts/encode_latents.py. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from omegaconf import DictConfig
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from vae3d.config.check import Rule, check
from vae3d.config.fields import STRICT, Float, Int, Precision, Reader, Split, as_list
from vae3d.config.issues import MISSING, ConfigIssue
from vae3d.config.schema import register
from vae3d.config.validate import SIZE_RULE


@dataclass(config=STRICT)
class EncodeConfig:
    """Encode a data set into a latent cache."""

    checkpoint: str = Field(MISSING, description="A run folder, an export or published weights.")
    source: Any = Field(
        MISSING, description="A table, a JSON list, a folder or one file; or a `_target_` node, as in conf/data."
    )
    cache: str = Field(MISSING, description="Folder to write. The same command resumes.")
    root: str | None = Field(None, description="Folder of relative paths in a table. null: the table's folder.")
    split: Split | None = Field(None, description="Only rows of this split. null: all.")
    model: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of the model that differ from the checkpoint's."
    )
    height: Int | None = Field(None, ge=1, description="Resize and centre-crop to height x width. null: as the file.")
    width: Int | None = Field(None, ge=1, description="See `height`.")
    short_side: Int | None = Field(
        None,
        ge=1,
        description="Resize the shorter side to this before cropping. null: the smallest size the crop fits in.",
    )
    frames: Int | None = Field(None, ge=1, description="Frames of a clip. null: all that the file has.")
    clips: Literal["one", "all"] = Field(
        "one", description="Clips of a file: one, from its middle, or all, one after another."
    )
    stride: Int = Field(1, ge=1, description="Take every n-th frame.")
    fps: Float | None = Field(None, gt=0, description="Reduce faster videos to this frame rate. null: keep all.")
    panorama: bool = Field(False, description="Files are equirectangular panoramas (2:1), never cropped.")
    flip: bool = Field(False, description="Also store every clip mirrored, as an entry of its own.")
    labels: Literal["auto", "column", "folder", "none"] = Field(
        "auto",
        description="Class of a clip: column (`label`) or folder (its name); auto: the column if there is one, "
        "else the folder.",
    )
    store: Literal["moments", "mean", "sample"] = Field(
        "moments", description="moments: mean and standard deviation of the posterior."
    )
    dtype: Literal["fp32", "fp16", "bf16"] = Field("fp16", description="Of the stored latents.")
    writers: Annotated[list[Literal["npy", "webdataset"]], BeforeValidator(as_list)] = Field(
        default_factory=list, description="Further formats, beside safetensors."
    )
    shard_size: Int = Field(512, ge=1, description="Clips per file. A killed process loses its unfinished file.")
    precision: Precision = Field("fp32", description="Autocast over fp32 weights.")
    batch_size: Int = Field(8, ge=1, description="Clips per forward pass.")
    chunk_frames: Int | None = Field(
        None, ge=1, description="Frames encoded at once. null: as many as the model's stream takes."
    )
    device: str | None = Field(None, description="null: cuda if there is a GPU.")
    workers: Int = Field(4, ge=0, description="Reader processes. 0: read in this process.")
    timeout: Float = Field(
        900.0, ge=0, description="Seconds without a clip from the workers after which it stops. 0: never."
    )
    reader: Reader = Field("auto", description="Library that decodes videos.")
    seed: Int = Field(0, ge=0, description="Seed of the samples.")
    max_broken: Float = Field(0.2, ge=0, lt=1, description="Stop when a larger share of the clips cannot be encoded.")
    retry: bool = Field(False, description="Encode files with errors again.")
    verify: Literal["stat", "hash"] = Field(
        "stat",
        description="How replaced source files are found: stat, by size and time; hash, by content, which "
        "reads all files.",
    )


def _source_issues(config: EncodeConfig) -> Iterator[ConfigIssue]:
    source = config.source
    if isinstance(source, dict) and "_target_" not in source:
        yield ConfigIssue("source", source, "must be a path, or a node with `_target_`", "see conf/data")


# fmt: off
RULES = [
    SIZE_RULE, _source_issues,
    Rule("clips", lambda c: c.clips == "all" and c.frames is None, "needs the length of a clip", "set frames"),
    Rule("writers", lambda c: c.writers and c.dtype == "bf16", "numpy has no bf16", "use dtype=fp16 or dtype=fp32"),
    Rule("short_side", lambda c: c.panorama and c.short_side is not None,
         "panoramas (panorama=true) are never cropped", "use null"),
    Rule("width", lambda c: c.panorama and c.height is not None and c.width != 2 * c.height,
         "must be twice height={c.height}, for panorama=true", "change either"),
]
# fmt: on


def check_encoding(cfg: DictConfig) -> EncodeConfig:
    """The configuration as typed objects. Raises ConfigError with every error."""
    return check(cfg, EncodeConfig, RULES, lambda c: {"checkpoint": c.checkpoint, "source": c.source, "root": c.root})


register("latents_defaults", EncodeConfig)
