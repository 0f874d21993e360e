"""Read the entries of a latent cache in a folder, local or copied to a store; see latents.shards for its files.

latents.tar_shards reads those in tars. Both have the same methods, and find an entry by its shard and key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vae3d.data.media import MediaError
from vae3d.data.storage.files import local_range
from vae3d.hashing import file_hash
from vae3d.io import FileError
from vae3d.latents import shards
from vae3d.latents.metadata import read_complete, read_index, read_meta_file
from vae3d.latents.remote_tensors import RemoteTensors
from vae3d.latents.shards import COMPLETE, INDEX, KINDS, META, STATISTICS, CacheError

OPEN_SHARDS = 64  # open files per process


class FolderEntries:
    """Entries of a local folder. name: that of the cache in messages. meta: content of meta.json.

    has_hashes: whether `check` can compare the hashes of all files.
    """

    has_hashes = True

    def __init__(self, folder: str | Path) -> None:
        self.name = str(folder)
        self._open: dict[int, Any] = {}
        self.meta = read_meta_file(self.file(META, "is not a latent cache, which has {}; make one with vae3d encode"))

    @classmethod
    def open(cls, folder: str | Path, verify: bool) -> tuple[FolderEntries, pd.DataFrame]:
        """The entries, and their rows of index.csv. verify: see LatentCache. Raises CacheError, as all methods do."""
        entries = cls(folder)
        complete = read_complete(
            entries.file(COMPLETE, "is not complete; it has no {}: run the command that began it again")
        )
        entries.check(verify)
        return entries, entries._read_index(complete)

    def read(self, shard: int, key: str) -> dict[str, Tensor]:
        """The stored tensors of an entry, by kind."""
        file = self._shard_file(shard)
        try:
            if shard not in self._open:
                if len(self._open) >= OPEN_SHARDS:
                    self._open.pop(next(iter(self._open)))
                self._open[shard] = self._open_shard(file)
            return {kind: self._open[shard].get_tensor(f"{kind}/{key}") for kind in KINDS[self.meta["store"]]}
        except (OSError, SafetensorError, MediaError) as error:
            why = error.reason if isinstance(error, MediaError) else error
            raise CacheError(f"{file} cannot be read ({why}); {self._hint(shard)}") from error

    def damaged(self, shard: int, key: str, why: str) -> CacheError:
        """The error for an entry that differs from its row."""
        return CacheError(f"{self._shard_file(shard)}: {key} {why}; the file is damaged: {self._hint(shard)}")

    def file(self, name: str, missing: str = "has no {}; encode again") -> Path:
        """A file of the cache, such as meta.json; of a remote one a local copy. missing: the error without it."""
        try:
            return local_range(f"{self.name}/{name}").file
        except (OSError, MediaError) as error:
            why = f" ({error.reason})" if isinstance(error, MediaError) else ""
            raise CacheError(f"{self.name} {missing.format(name)}{why}") from error

    def check(self, verify: bool) -> None:
        """Compare the shards with their markers: sizes of files, and with `verify` hashes."""
        folder = Path(self.name)
        for number in range(shards.shards_in(self.meta)):
            marker_file = shards.marker_file(folder, number)
            marker = shards.read_marker(folder, number, verify=verify)
            if marker is None:
                raise CacheError(f"{marker_file} is missing; encode again to make the shard")
            if marker["of"] != self.meta["digest"]:
                raise CacheError(
                    f"{self._shard_file(number)} belongs to another cache ({marker['of']}) than {folder / META} "
                    f"({self.meta['digest']}); caches cannot be mixed"
                )
            if why := shards.damage(folder, number, marker, verify=verify):
                raise CacheError(f"{why}; {self._hint(number)}")

    def _read_index(self, complete: dict[str, Any]) -> pd.DataFrame:
        """The rows of all entries, checked against complete.json."""
        index = read_index(self.file(INDEX), self.meta)
        if len(index) != complete["entries"]:
            raise CacheError(
                f"{self.name}/{INDEX} has {len(index)} rows; {complete['entries']} were written; encode again"
            )
        for name in (META, INDEX, STATISTICS):
            try:
                same = file_hash(self.file(name)) == complete["sha256"][name]
            except (OSError, FileError) as error:
                raise CacheError(f"{self.name}/{name} cannot be read: {error}; encode again") from error
            if not same:
                raise CacheError(
                    f"{self.name}/{name} has changed since it was written: its sha256 differs; encode again"
                )
        return index

    def _shard_file(self, shard: int) -> str:
        return f"{self.name}/shards/{shards.name_of(shard)}.safetensors"

    def _open_shard(self, file: str) -> Any:
        return safe_open(file, framework="pt")

    def _hint(self, shard: int) -> str:
        """What to do about a damaged shard."""
        return f"delete {shards.marker_file(Path(self.name), shard)} and encode again"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files cannot be pickled


class RemoteEntries(FolderEntries):
    """Entries of the URL of a folder: one range read per tensor. Other files are copied to the cache of remote
    objects (data.storage)."""

    has_hashes = False

    def check(self, verify: bool) -> None:
        """Nothing: shards are not fetched whole."""

    def _open_shard(self, file: str) -> RemoteTensors:
        return RemoteTensors(file)

    def _hint(self, shard: int) -> str:
        return "copy it again from where it was encoded"
