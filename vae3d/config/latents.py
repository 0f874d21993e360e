"""Typed schema and checks of `vae3d encode`. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from vae3d.config.check import Rule, check
from vae3d.config.fields import STRICT, Float, Folder, Int, as_buckets, as_list, setting
from vae3d.config.issues import MISSING, ConfigIssue
from vae3d.config.schema import Buckets, FilesConfig, register
from vae3d.config.validate import SIZE_RULE, TILE_RULE, inference_paths, reader_issues, shape_issues


@dataclass(config=STRICT)
class EncodeConfig(FilesConfig):
    """Encode a data set into a latent cache."""

    source: Any = setting(MISSING, "A table, a JSON list, a folder or one file; or a `_target_` node, as in conf/data.")
    cache: Folder = setting(
        MISSING,
        "Folder to write, or s3:// or gs://. The same command resumes; run several times at once, it shares the work.",
    )
    shard: str | None = setting(
        None, "i/n, also --shard i/n: this is the i-th of n processes, as of a job array. null: the only one."
    )
    stale: Float = setting(
        120.0, "Seconds without a sign of life of a process after which others take over its unfinished file.", gt=0
    )
    wait: bool = setting(
        True, "Stay until the cache is complete, to take over from lost processes. false: end when no file is free."
    )
    short_side: Int | None = setting(None, "Shorter side before cropping. null: as the crop needs it.", ge=1)
    frames: Int | None = setting(None, "Frames of a clip. null: all that the file has.", ge=1)
    buckets: Annotated[Buckets | None, BeforeValidator(as_buckets)] = setting(
        None,
        "Several sizes and frame counts, in the forms of data.buckets: a list of [frames, height, width], or a rule on "
        "`height`, `width` and `frames`. A file takes the size that keeps most of it. null: one size.",
    )
    clips: Literal["one", "all"] = setting("one", "Clips of a file: one, from its middle, or all, one after another.")
    panorama: bool = setting(False, "Files are equirectangular panoramas (2:1), never cropped.")
    flip: bool = setting(False, "Also store every clip mirrored, as an entry of its own.")
    labels: Literal["auto", "column", "folder", "none"] = setting(
        "auto", "column (`label`), folder (its name); auto: column or, without one, folder."
    )
    store: Literal["moments", "mean", "sample"] = setting("moments", "moments: the posterior's mean and deviation.")
    dtype: Literal["fp32", "fp16", "bf16"] = setting("fp16", "Type of the stored latents.")
    writers: Annotated[list[Literal["npy", "webdataset"]], BeforeValidator(as_list)] = setting(list, "Further formats.")
    shard_size: Int = setting(512, "Clips per file. A killed process loses its unfinished file.", ge=1)
    batch_size: Int = setting(
        8, "Clips per forward pass. With buckets: of the largest; of others as many pixels.", ge=1
    )
    chunk_frames: Int | None = setting(None, "Frames encoded at once. null: as many as the model's stream takes.", ge=1)
    workers: Int = setting(4, "Reader processes. 0: read in this process.", ge=0)
    timeout: Float = setting(900.0, "Seconds without a clip from the workers after which it stops. 0: never.", ge=0)
    max_broken: Float = setting(0.2, "Stop when a larger share of the clips cannot be encoded.", ge=0, lt=1)
    retry: bool = setting(False, "Encode files with errors again.")
    verify: Literal["stat", "hash"] = setting(
        "stat", "How replaced source files are found: stat, by size and time; hash, by content, which reads all files."
    )


def _source_issues(config: EncodeConfig) -> Iterator[ConfigIssue]:
    source = config.source
    if isinstance(source, dict) and "_target_" not in source:
        yield ConfigIssue("source", source, "must be a path, or a node with `_target_`", "see conf/data")


def _bucket_issues(config: EncodeConfig) -> Iterator[ConfigIssue]:
    buckets = config.buckets
    if buckets is None:
        return
    of_training = {"buckets.clips_multiple": buckets.clips_multiple}
    sizes = {"frames": config.frames, "height": config.height, "width": config.width}
    if buckets.shapes is None:
        for key in ("height", "width"):
            if sizes[key] is None:
                yield ConfigIssue(key, None, "gives the area of the sizes of buckets, and is null", "set it")
        if buckets.frames is None and config.frames is None:
            yield ConfigIssue("buckets.frames", None, "no frame counts are given", "set it, such as [1, 17], or frames")
    else:
        yield from shape_issues("buckets.shapes", buckets.shapes)
        for key in (key for key, value in sizes.items() if value is not None):
            yield ConfigIssue(key, sizes[key], "is that of each bucket, which buckets list", "use null")
        for i, shape in enumerate(buckets.shapes):
            for key in ("cost", "batch_size", "weight"):
                of_training[f"buckets.shapes[{i}].{key}"] = getattr(shape, key)
    for key, value in of_training.items():
        if value is not None:
            yield ConfigIssue(key, value, "is of training, not of a cache", "leave it out")


def share_of(shard: str | None) -> tuple[int, int] | None:
    """(2, 8), counted from 0, of 3/8; (0, 1) of None; None if it is not i/n with 1 <= i <= n."""
    if shard is None:
        return 0, 1
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        return None
    return int(match[1]) - 1, int(match[2])


# fmt: off
RULES = [
    SIZE_RULE, TILE_RULE, reader_issues, _source_issues, _bucket_issues,
    Rule("cache", lambda c: "://" in c.cache and not c.cache.startswith(("s3://", "gs://")), "cannot be written",
         "give a folder, s3://BUCKET/NAME or gs://BUCKET/NAME"),
    Rule("shard", lambda c: share_of(c.shard) is None, "must be i/n, with i from 1 to n",
         "--shard 1/8 is the first of 8 processes, --shard 8/8 the last"),
    Rule("clips", lambda c: c.clips == "all" and c.frames is None and c.buckets is None,
         "needs the length of a clip", "set frames"),
    Rule("buckets", lambda c: c.buckets is not None and c.panorama,
         "panoramas (panorama=true) are never cropped, so they have one shape", "use null"),
    Rule("short_side", lambda c: c.buckets is not None and c.short_side is not None,
         "is of one size, and buckets has several", "use null"),
    Rule("short_side",
         lambda c: c.short_side is not None and c.height is None and c.buckets is None and not c.panorama,
         "scales frames before they are cropped, and nothing crops them", "set height and width, or use null"),
    Rule("short_side",
         lambda c: None not in (c.short_side, c.height, c.width) and c.short_side < min(c.height, c.width),
         "is smaller than the crop of {c.height}x{c.width}", "raise it, or use null"),
    Rule("writers", lambda c: c.writers and c.dtype == "bf16", "numpy has no bf16", "use dtype=fp16 or dtype=fp32"),
    Rule("short_side", lambda c: c.panorama and c.short_side is not None,
         "panoramas (panorama=true) are never cropped", "use null"),
    Rule("width", lambda c: c.panorama and c.height is not None and c.width != 2 * c.height,
         "must be twice height={c.height}, for panorama=true", "change either"),
]
# fmt: on


check_encoding = partial(check, schema=EncodeConfig, rules=RULES, paths=inference_paths)
register("latents_defaults", EncodeConfig)
