"""Content of a cache's meta.json, complete.json, index.csv and statistics.json, checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import pandas as pd

from vae3d.arguments import Count, Range, Size, Width, annotations_of
from vae3d.io import read_text
from vae3d.latents import shards
from vae3d.latents.identity import VaeMetadata
from vae3d.latents.shards import INDEX, META, STATISTICS, CacheError, IndexRow
from vae3d.text import one_line

MAX_INDEX_BYTES = 2**32
TEXTS, INTEGERS = ([name for name, kind in annotations_of(IndexRow).items() if kind is of] for of in (str, int))
Finite = Annotated[float, Range(-1e300, 1e300)]


class CachedVae(VaeMetadata):
    checkpoint: str
    channels: Width
    time_stride: Width
    space_stride: Width


class Meta(TypedDict):
    """What is read of meta.json."""

    vae: CachedVae
    digest: str
    precision: str
    pixel_range: str
    transform: Mapping[str, Any]
    store: Literal["moments", "mean", "sample"]
    dtype: Literal["fp32", "fp16", "bf16"]
    flip: bool
    seed: Any
    clips: Count
    clips_hash: str
    shard_size: Count
    writers: Sequence[str]


Hashes = TypedDict("Hashes", {META: str, INDEX: str, STATISTICS: str})


class Complete(TypedDict):
    """What is read of complete.json. sha256: of the files beside it."""

    shards: Count
    entries: Count
    sha256: Hashes


def read_complete(file: Path) -> dict[str, Any]:
    """Read complete.json. Raises CacheError for a missing key and for a wrong value."""
    hint = "delete it, and run the command that made the cache again"
    return shards.read_json(file, Complete, hint)


def read_meta_file(file: Path) -> dict[str, Any]:
    """Read meta.json. Raises CacheError for a missing key and for a wrong value."""
    meta = shards.read_json(file, Meta)
    vae = meta["vae"]
    for name in ("latents_mean", "latents_std"):
        if len(vae[name]) != vae["channels"]:
            raise CacheError(f"{file}: vae.{name} has {len(vae[name])} entries; give {vae['channels']}")
    return meta


def read_index(file: Path, meta: Mapping[str, Any]) -> pd.DataFrame:
    """Read index.csv; missing texts are empty. Raises CacheError for a table that `finish` cannot have written."""
    try:
        text = StringIO(read_text(file, MAX_INDEX_BYTES))
        index = pd.read_csv(text, dtype=dict.fromkeys(TEXTS, str), keep_default_na=False, na_values={"fps": [""]})
    except (OSError, TypeError, ValueError, OverflowError) as error:  # ValueError: also of pandas' parser
        raise CacheError(f"{file} cannot be read: {one_line(error)}; encode again") from error
    if why := rows_error(index, meta):
        raise CacheError(f"{file} has {why}; encode again")
    return index


def rows_error(index: pd.DataFrame, meta: Mapping[str, Any]) -> str | None:
    """What no table of a cache has; None if nothing is wrong. index: rows of index.csv, its texts read as such."""
    if lacking := [name for name in IndexRow.__required_keys__ if name not in index]:
        return f"no {', '.join(sorted(lacking))}"
    for name in INTEGERS:
        if index[name].dtype.kind != "i" or (index[name] < 0).any():
            return f"a `{name}` that is not an integer from 0"
    if (index["shard"] >= shards.shards_in(meta)).any():
        return "a shard that does not exist"
    if not index["latent"].str.fullmatch(rf"{meta['vae']['channels']}(x[1-9][0-9]{{0,6}}){{3}}").all():
        return f"a `latent` that is not a shape of {meta['vae']['channels']} x t x h x w"
    if not index["key"].is_unique or (index["key"] == "").any():
        return "a key twice, or none"
    if index["flip"].dtype != bool:
        return "a `flip` that is not True or False"
    return None


def read_statistics_file(file: Path, channels: int, hint: str) -> dict[str, Any]:
    """Read statistics.json, a LatentStatistics.summary. hint: what to do about a damaged one. Raises CacheError."""
    defined = Annotated[Sequence[Finite], Size(channels, channels)]
    values = Annotated[Sequence[Finite | None], Size(channels, channels)]
    lists = ("mean", "std", "std_of_mean", "posterior_std", "covariance_eigenvalues", "kurtosis", "skewness")
    kinds = dict.fromkeys(lists, values) | dict.fromkeys(("clips", "shift", "scale"), Finite)
    kinds |= {"participation_ratio": Finite | None, "percentiles": Mapping[str, defined]}
    return shards.read_json(file, TypedDict("Statistics", kinds), hint)
