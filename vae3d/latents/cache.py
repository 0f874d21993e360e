"""Read a latent cache as a dataset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vae3d.data.media import DataError, MediaError
from vae3d.data.sources.webdataset import is_shards
from vae3d.data.storage.paths import is_url
from vae3d.data.storage.stores import find_objects
from vae3d.data.table.rows import exists
from vae3d.latents import shards
from vae3d.latents.codec import LatentCodec, Moments
from vae3d.latents.folder_entries import FolderEntries, RemoteEntries
from vae3d.latents.identity import vae_difference
from vae3d.latents.metadata import read_statistics_file
from vae3d.latents.shards import COMPLETE, META, STATISTICS, CacheError
from vae3d.latents.tar_shards import TarEntries
from vae3d.pixels import value_range
from vae3d.result_folder import settings_difference
from vae3d.seeding import generator_of

MAX_CLASSES = 100_000  # larger numeric labels are names, not class indices
TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
NO_LABEL = -1


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
    path: a local folder, the URL of one that was copied to a store, or tars of latents (latents.tar_shards): a tar, a
    pattern, a folder of them or their index.
    mode: sample (posterior noise is a function of (seed, position), as ClipBatch.generators draws it for clips that are
    encoded during training), or mean; None: sample if the cache stores moments. position defaults to the index.
    split: only entries of this split. flips: include entries of mirrored pixels.
    verify: compare the hashes of all files now, or where there are none, remote or in tars, the checksums of all
    entries; else sizes of local files, and checksums of entries when they are read.
    transform: settings of the transform that the cache must have been made with.

    index: rows of index.csv. labels: their class indices, or NO_LABEL. classes: names by class index; labels that are
    all integers are class indices themselves.
    Raises CacheError, naming what differs, if the cache is incomplete, damaged, mixed from several caches, or made with
    another autoencoder or transform.
    """

    def __init__(
        self,
        path: str | Path,
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
        self._entries, index = open_entries(path, verify)
        self.meta, self.name = self._entries.meta, self._entries.name
        self._check_same_source(codec, transform)
        self.mode = self._mode(mode)
        self._select(index, split, flips)
        factors = self.meta["vae"] if codec is None else vars(codec.model.spec)
        self.latents_mean, self.latents_std = (
            torch.tensor(factors[name])[:, None, None, None] for name in ("latents_mean", "latents_std")
        )
        if verify and not self._entries.has_hashes:
            for number in range(len(self)):
                self.moments(number)

    def _select(self, index: pd.DataFrame, split: str | None, flips: bool) -> None:
        """Keep the rows of a split, with or without mirrored entries, and their classes."""
        self.classes = class_names(index["label"])
        if split is not None:
            index = index[index["split"] == split]
        if not flips:
            index = index[~index["flip"]]
        if index.empty:
            raise CacheError(f"{self.name} has no entries of split {split}")
        self.index = index.reset_index(drop=True)
        class_index = {"": NO_LABEL} | {name: index for index, name in enumerate(self.classes)}
        self.labels = [class_index[label] for label in self.index["label"]]
        self._keys, self._shards = self.index["key"].tolist(), self.index["shard"].tolist()
        self._shapes, self._checksums = self.index["latent"].tolist(), self.index["crc32"].tolist()

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int | tuple[int, int]) -> Latent:
        # The noise would depend on the type of a NumPy or torch integer.
        index, position = map(int, index if isinstance(index, tuple) else (index, index))
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
        shard, key = self._shards[index], self._keys[index]
        entry = self._entries.read(shard, key)
        if why := self._entry_error(index, entry):
            raise self._entries.damaged(shard, key, why)
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
        hint = f"delete {self.name}/{COMPLETE} and encode again"
        return read_statistics_file(self._entries.file(STATISTICS), self.meta["vae"]["channels"], hint)

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
                f"{self.name} holds latents of another autoencoder, {vae['checkpoint']} ({vae['model']}): {why}; "
                "give its own checkpoint, or encode again"
            )
        if transform is None:
            return
        there = {name: self.meta["transform"].get(name) for name in transform}
        if why := settings_difference(there, transform):
            raise CacheError(f"{self.name} holds latents of another transform: {why}; encode again, or set the same")

    def _mode(self, mode: str | None) -> str:
        store = self.meta["store"]
        possible = {"moments": ("sample", "mean"), "mean": ("mean",), "sample": ("sample",)}[store]
        if mode is not None and mode not in possible:
            in_training = ", in a training vae.sample=true" if mode == "mean" else ""
            raise CacheError(f"mode={mode}: {self.name} stores {store}; use mode={possible[0]}{in_training}")
        return mode or possible[0]


def open_entries(path: str | Path, verify: bool) -> tuple[FolderEntries | TarEntries, pd.DataFrame]:
    """What reads the entries of a cache, and their rows of index.csv. Raises CacheError. Arguments: see LatentCache."""
    if is_shards(path):
        return TarEntries.open(path)
    if not is_url(path):
        return FolderEntries.open(path, verify)
    url = str(path).rstrip("/")
    if _is_folder_cache(url):
        return RemoteEntries.open(url, verify)
    try:
        return TarEntries.open(path)
    except CacheError as error:
        raise CacheError(f"{path} is no latent cache, which has {COMPLETE}, and no tars of latents: {error}") from error


def _is_folder_cache(url: str) -> bool:
    """Whether a URL is a cache with an index, complete or not; a folder of tars may have meta.json too."""
    if exists(f"{url}/{COMPLETE}"):
        return True
    try:
        return exists(f"{url}/{META}") and any(name.startswith(f"{url}/shards/") for name in find_objects(url))
    except (MediaError, DataError):  # a server that lists nothing
        return False


def class_names(labels: Sequence[str]) -> list[str]:
    """Class names by class index: integer labels are the indices, others are sorted."""
    names = sorted({label for label in labels if label != ""})
    if names and all(len(name) < 19 and name.isdecimal() and name == str(int(name)) for name in names):
        largest = max(map(int, names))
        if largest < MAX_CLASSES:
            return [str(index) for index in range(1 + largest)]
    return names
