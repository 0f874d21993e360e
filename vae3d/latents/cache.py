"""Read a latent cache as a dataset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from vae3d.arguments import Count, Range, Size, Width
from vae3d.data.media import MediaError
from vae3d.data.paths import is_url
from vae3d.data.storage import local_range
from vae3d.hashing import file_hash
from vae3d.inference.folder import settings_difference
from vae3d.io import FileError, read_text
from vae3d.latents import shards
from vae3d.latents.codec import LatentCodec, Moments
from vae3d.latents.identity import VaeMetadata, vae_difference
from vae3d.latents.remote_tensors import RemoteTensors
from vae3d.latents.shards import COMPLETE, INDEX, KINDS, META, STATISTICS, CacheError
from vae3d.pixels import value_range
from vae3d.seeding import generator_of

OPEN_SHARDS = 64  # open files per process
MAX_CLASSES = 100_000  # larger numeric labels are names, not class indices
TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
MAX_INDEX_BYTES = 2**32
NO_LABEL = -1
Finite = Annotated[float, Range(-1e300, 1e300)]
TEXT_COLUMNS = ("key", "latent", "label", "split", "text", "source")  # of index.csv


class Latent(NamedTuple):
    """z: [C, t, h, w], normalised, fp32. label: class index, or NO_LABEL."""

    z: Tensor
    label: int
    key: str


class SizeGroup(NamedTuple):
    """Entries of one size. size: (frames, height, width) of their clips. latent_shape: (C, t, h, w). entries: their
    indices, ascending."""

    size: tuple[int, int, int]
    latent_shape: tuple[int, int, int, int]
    entries: np.ndarray


class LatentCache(Dataset[Latent]):
    """The entries of a latent cache (see latents.shards), by index, or by (index, position in the training order).

    Latents are normalised: with the codec's statistics, if it is given, so that statistics that were measured later
    apply; else with the model's statistics at the time of encoding.
    mode: sample (posterior noise is a function of (seed, position), as ClipBatch.generators draws it for clips that are
    encoded during training), or mean; None: sample if the cache stores moments. position defaults to the index.
    split: only entries of this split. flips: include entries of mirrored pixels.
    folder: a local one, or the URL of one that was copied to a store. There entries are read by one range read per
    tensor; meta.json, the index and the statistics are copied to the cache of remote objects (data.storage).
    verify: compare the files' hashes now, of a remote cache the checksums of all entries; else their sizes, and
    checksums of entries when they are read.
    transform: settings of the transform that the cache must have been made with.

    index: rows of index.csv. labels: their class indices, or NO_LABEL. classes: names by class index; labels that are
    all integers are class indices themselves.
    Raises CacheError, naming what differs, if the cache is incomplete, damaged, mixed from several caches, or made with
    another autoencoder or transform.
    """

    def __init__(
        self,
        folder: str | Path,
        codec: LatentCodec | None = None,
        *,
        mode: str | None = None,
        seed: int = 0,
        split: str | None = None,
        flips: bool = True,
        transform: Mapping[str, Any] | None = None,
        verify: bool = False,
    ) -> None:
        self.seed = seed
        self._locate(folder)
        no_cache = "is not a latent cache, which has {}; make one with scripts/encode_latents.py"
        self.meta = read_meta_file(self._file(META, no_cache))
        self._check_same_source(codec, transform)
        self._check_shards(verify)
        self.mode = self._mode(mode)
        self._select(self._read_index(), codec, split, flips)
        if verify and not self._has_hashes:
            for number in range(len(self)):
                self.moments(number)

    def _locate(self, folder: str | Path) -> None:
        self.is_remote = is_url(folder)
        self.folder = str(folder).rstrip("/") if self.is_remote else Path(folder)
        self._open: dict[int, Any] = {}

    @property
    def _has_hashes(self) -> bool:
        """Whether _check_shards compares the hashes of all files; else `verify` reads all entries."""
        return not self.is_remote

    def _check_shards(self, verify: bool) -> None:
        self._complete = read_complete(
            self._file(COMPLETE, "is not complete; it has no {}: run the command that began it again")
        )
        self.shards = self._complete["shards"]
        if not self.is_remote:
            self._check_integrity(verify)

    def _read_index(self) -> pd.DataFrame:
        """The rows of all entries, checked against complete.json. Raises CacheError."""
        complete = self._complete
        index = read_index(self._file(INDEX), self.meta["vae"]["channels"], self.shards)
        if len(index) != complete["entries"]:
            raise CacheError(
                f"{self.folder}/{INDEX} has {len(index)} rows; {complete['entries']} were written; encode again"
            )
        for name in (META, INDEX, STATISTICS):
            try:
                same = file_hash(self._file(name)) == complete["sha256"][name]
            except (OSError, FileError) as error:
                raise CacheError(f"{self.folder}/{name} cannot be read: {error}; encode again") from error
            if not same:
                raise CacheError(
                    f"{self.folder}/{name} has changed since it was written: its sha256 differs; encode again"
                )
        return index

    def _select(self, index: pd.DataFrame, codec: LatentCodec | None, split: str | None, flips: bool) -> None:
        """Keep the rows of a split, with or without mirrored entries, and their classes."""
        self.classes = class_names(index["label"])
        if split is not None:
            index = index[index["split"] == split]
        if not flips:
            index = index[~index["flip"]]
        if index.empty:
            raise CacheError(f"{self.folder} has no entries of split {split}")
        self.index = index.reset_index(drop=True)
        class_index = {"": NO_LABEL} | {name: index for index, name in enumerate(self.classes)}
        self.labels = [class_index[label] for label in self.index["label"]]
        self._keys, self._shards = self.index["key"].tolist(), self.index["shard"].tolist()
        self._shapes, self._checksums = self.index["latent"].tolist(), self.index["crc32"].tolist()
        factors = self.meta["vae"] if codec is None else vars(codec.model.spec)
        self.latents_mean, self.latents_std = (
            torch.tensor(factors[name])[:, None, None, None] for name in ("latents_mean", "latents_std")
        )

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int | tuple[int, int]) -> Latent:
        index, position = index if isinstance(index, tuple) else (index, index)
        moments = self.moments(index)
        z = moments.mean
        if self.mode == "sample" and self.meta["store"] == "moments":
            generator = generator_of(self.seed, position, "noise")
            z = moments.sample(generator)
        return Latent(z, self.labels[index], self._keys[index])

    def moments(self, index: int) -> Moments:
        """The normalised posterior of an entry, [C, t, h, w] each; std is 0 in caches of means or samples.

        Raises CacheError if the entry has changed since it was written.
        """
        entry = self._read(index)
        if why := self._entry_error(index, entry):
            raise self._damaged(index, why)
        mean, *rest = (tensor.float() for tensor in entry.values())
        std = rest[0] if rest else torch.zeros_like(mean)
        return Moments((mean - self.latents_mean) / self.latents_std, std / self.latents_std)

    def sizes(self, entries: Sequence[int] | None = None) -> list[SizeGroup]:
        """The entries by size of their clips, the smallest first. entries: only these."""
        index = self.index if entries is None else self.index.iloc[list(entries)]
        groups = index.groupby(["frames", "height", "width", "latent"])
        return [
            SizeGroup(tuple(map(int, size)), tuple(map(int, latent.split("x"))), rows.index.to_numpy())
            for (*size, latent), rows in groups
        ]

    @property
    def statistics(self) -> dict[str, Any]:
        """Statistics of the raw latents of all entries; see LatentStatistics.summary."""
        channels = self.meta["vae"]["channels"]
        defined = Annotated[Sequence[Finite], Size(channels, channels)]
        values = Annotated[Sequence[Finite | None], Size(channels, channels)]
        lists = ("mean", "std", "std_of_mean", "posterior_std", "covariance_eigenvalues", "kurtosis", "skewness")
        kinds = dict.fromkeys(lists, values) | dict.fromkeys(("clips", "shift", "scale"), Finite)
        kinds |= {"participation_ratio": Finite | None, "percentiles": Mapping[str, defined]}
        hint = f"delete {self.folder}/{COMPLETE} and encode again"
        return shards.read_json(self._file(STATISTICS), TypedDict("Statistics", kinds), hint)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files cannot be pickled

    def _file(self, name: str, missing: str = "has no {}; encode again") -> Path:
        """A file of the cache, such as meta.json; of a remote one a local copy. missing: the error without it."""
        try:
            return local_range(f"{self.folder}/{name}").file
        except (OSError, MediaError) as error:
            why = f" ({error.reason})" if isinstance(error, MediaError) else ""
            raise CacheError(f"{self.folder} {missing.format(name)}{why}") from error

    def _shard_file(self, number: int) -> str:
        return f"{self.folder}/shards/{shards.name_of(number)}.safetensors"

    def _read(self, index: int) -> dict[str, Tensor]:
        """The stored tensors of an entry, by kind."""
        key, shard = self._keys[index], self._shards[index]
        return {kind: self._tensor(shard, f"{kind}/{key}") for kind in KINDS[self.meta["store"]]}

    def _damaged(self, index: int, why: str) -> CacheError:
        key, shard = self._keys[index], self._shards[index]
        return CacheError(f"{self._shard_file(shard)}: {key} {why}; the file is damaged: {self._mending(shard)}")

    def _mending(self, shard: int) -> str:
        """What to do about a damaged shard."""
        if self.is_remote:
            return "copy it again from where it was encoded"
        return f"delete {shards.marker_file(self.folder, shard)} and encode again"

    def _tensor(self, shard: int, name: str) -> Tensor:
        file = self._shard_file(shard)
        try:
            if shard not in self._open:
                if len(self._open) >= OPEN_SHARDS:
                    self._open.pop(next(iter(self._open)))
                self._open[shard] = RemoteTensors(file) if self.is_remote else safe_open(file, framework="pt")
            return self._open[shard].get_tensor(name)
        except (OSError, SafetensorError, MediaError) as error:
            why = error.reason if isinstance(error, MediaError) else error
            raise CacheError(f"{file} cannot be read ({why}); {self._mending(shard)}") from error

    def _entry_error(self, index: int, entry: Mapping[str, Tensor]) -> str | None:
        """What is wrong with the stored tensors of an entry; None if nothing is."""
        for kind, tensor in entry.items():
            if str(tensor.dtype) != f"torch.{TORCH_NAMES[self.meta['dtype']]}":
                return f"{kind} is {tensor.dtype}, but the cache has {self.meta['dtype']}"
            if (shape := "x".join(map(str, tensor.shape))) != self._shapes[index]:
                return f"{kind} is {shape}, but index.csv says {self._shapes[index]}"
        if shards.checksum(entry) != self._checksums[index]:
            return "has changed since it was written: its checksum differs"
        if any(not math.isfinite(sum(value_range(tensor))) for tensor in entry.values()):
            return "holds NaN or infinity"
        return None

    def _check_same_source(self, codec: LatentCodec | None, transform: Mapping[str, Any] | None) -> None:
        vae = self.meta["vae"]
        if codec is not None and (why := vae_difference(vae, codec)):
            raise CacheError(
                f"{self.folder} holds latents of another autoencoder, {vae['checkpoint']} ({vae['model']}): {why}; "
                "give its own checkpoint, or encode again"
            )
        if transform is None:
            return
        there = {name: self.meta["transform"].get(name) for name in transform}
        if why := settings_difference(there, transform):
            raise CacheError(f"{self.folder} holds latents of another transform: {why}; encode again, or set the same")

    def _check_integrity(self, verify: bool) -> None:
        for number in range(self.shards):
            marker_file = shards.marker_file(self.folder, number)
            marker = shards.read_marker(self.folder, number, verify=verify)
            if marker is None:
                raise CacheError(f"{marker_file} is missing; encode again to make the shard")
            if marker["of"] != self.meta["digest"]:
                raise CacheError(
                    f"{shards.shard_file(self.folder, number)} belongs to another cache ({marker['of']}) than "
                    f"{self.folder / META} ({self.meta['digest']}); caches cannot be mixed"
                )
            if why := shards.damage(self.folder, number, marker, verify=verify):
                raise CacheError(f"{why}; delete {marker_file} and encode again")

    def _mode(self, mode: str | None) -> str:
        store = self.meta["store"]
        possible = {"moments": ("sample", "mean"), "mean": ("mean",), "sample": ("sample",)}[store]
        if mode is not None and mode not in possible:
            raise CacheError(f"mode is {mode}, but {self.folder} stores {store}; use {' or '.join(possible)}")
        return mode or possible[0]


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


def read_index(file: Path, channels: int, shards: int) -> pd.DataFrame:
    """Read index.csv; missing texts are empty. Raises CacheError for a table that `finish` cannot have written."""
    try:
        text = StringIO(read_text(file, MAX_INDEX_BYTES))
        index = pd.read_csv(
            text, dtype=dict.fromkeys(TEXT_COLUMNS, str), keep_default_na=False, na_values={"fps": [""]}
        )
        whole = index[["number", "shard", "frames", "height", "width", "crc32"]]
        shapes = index["latent"].str.fullmatch(rf"{channels}(x[1-9][0-9]{{0,6}}){{3}}")
        checks = {
            "a value that is not an integer": all(dtype.kind == "i" for dtype in whole.dtypes),
            "a shard that does not exist": bool(whole["shard"].between(0, shards - 1).all()),
            "a `latent` that is not a shape of C x t x h x w": bool(shapes.all()),
            "a key twice": index["key"].is_unique and bool((index["key"] != "").all()),
            "a `flip` that is not True or False": index["flip"].dtype == bool,
            "no label, split, text or source": {"label", "split", "text", "source"} <= set(index.columns),
        }
    except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:  # ValueError: also of pandas' parser
        raise CacheError(f"{file} cannot be read: {' '.join(str(error).split())}; encode again") from error
    if wrong := [name for name, sound in checks.items() if not sound]:
        raise CacheError(f"{file} has {wrong[0]}; encode again")
    return index


def class_names(labels: Sequence[str]) -> list[str]:
    """Class names by class index: integer labels are the indices, others are sorted."""
    names = sorted({label for label in labels if label != ""})
    if names and all(len(name) < 19 and name.isdecimal() and name == str(int(name)) for name in names):
        largest = max(map(int, names))
        if largest < MAX_CLASSES:
            return [str(index) for index in range(1 + largest)]
    return names
