"""Storage of a latent cache that is written: a folder, or an object store.

Both have the same methods. Files are named as in the cache, such as shards/00000.json, and are written in `folder`
first: that of the cache itself, or a temporary one, from which `put` copies them to the store.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vae3d.data.storage import objects
from vae3d.data.storage.paths import is_url
from vae3d.hashing import file_hash
from vae3d.io import naming, remove, remove_unfinished
from vae3d.latents import shards
from vae3d.latents.claims import Claims, StoreClaims
from vae3d.latents.metadata import read_meta_file
from vae3d.latents.shards import META, WRITERS, CacheError
from vae3d.latents.statistics import LatentStatistics
from vae3d.result_folder import has_results

CLAIMS = ".claims"
CONNECTIONS = 16  # at a time


def storage_of(cache: str | Path) -> LocalStorage | ObjectStorage:
    """cache: a folder or a URL."""
    return ObjectStorage(str(cache)) if is_url(cache) else LocalStorage(Path(cache))


def read_meta(storage: LocalStorage | ObjectStorage) -> dict[str, Any]:
    """Content of meta.json. Raises CacheError if there is no cache."""
    if not storage.get(META):
        raise CacheError(f"{storage.name} is not a latent cache: it has no {META}; make one with vae3d encode")
    return read_meta_file(storage.folder / META)


def partial_statistics(storage: LocalStorage | ObjectStorage) -> tuple[dict[str, Any], list[int], LatentStatistics]:
    """(content of meta.json, its complete shards, statistics of these) of a cache that may be incomplete.

    Raises CacheError if there is no such cache, no shard, or a shard that is damaged or of another cache.
    """
    meta = read_meta(storage)
    numbers = sorted(storage.done())
    if not numbers:
        raise CacheError(f"{storage.name} has no complete shard yet")
    storage.get(*(name for number in numbers for name in shards.summaries_of(number)))
    for number in numbers:
        marker = shards.read_marker(storage.folder, number)
        if marker["of"] != meta["digest"]:
            raise CacheError(f"shard {number} of {storage.name} belongs to another cache; caches cannot be mixed")
        if why := storage.damage(number, marker, verify=False):
            raise CacheError(f"{why}; encode again")
    return meta, numbers, shards.read_statistics(storage.folder, numbers)


class LocalStorage:
    """A folder that all processes share."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)

    def claims(self, stale: float) -> Claims:
        return Claims(self.folder / CLAIMS, stale)

    def make(self) -> None:
        """Create the folder. Raises CacheError if it would be written through a link."""
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if linked := [name for name in ("shards", *WRITERS) if (self.folder / name).is_symlink()]:
            raise CacheError(
                f"{self.folder / linked[0]} is a symbolic link; files would be written to its target: delete it"
            )

    def is_empty(self) -> bool:
        return not has_results(self.folder, besides=(CLAIMS,))

    def done(self) -> set[int]:
        """The shards that have markers."""
        return shards.numbers_done(self.folder)

    def stamp(self, name: str) -> Any:
        """Differs once a file was written again; None if it does not exist."""
        return shards.stamp(self.folder / name)

    def stamps(self) -> dict[str, Any]:
        """Those of all markers."""
        return {name: self.stamp(name) for name in map(shards.marker_name, sorted(self.done()))}

    def get(self, *names: str) -> bool:
        """Bring files to `folder`; whether all of them exist."""
        return all((self.folder / name).is_file() for name in names)

    def put(self, *names: str) -> None:
        """Publish files that were written in `folder`, in this order."""

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def damage(self, number: int, marker: Mapping[str, Any], verify: bool) -> str | None:
        """See shards.damage."""
        return shards.damage(self.folder, number, marker, verify=verify)

    def clean(self) -> None:
        """Delete the files that killed processes left."""
        for name in ("", "shards", *WRITERS):
            remove_unfinished(self.folder / name)


class ObjectStorage:
    """A URL of a store that all processes can write. Files are prepared in a temporary folder of this process."""

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        self._tmp = tempfile.TemporaryDirectory(prefix="vae3d_encode_")
        self.folder = Path(self._tmp.name)

    def claims(self, stale: float) -> StoreClaims:
        return StoreClaims(f"{self.name}/{CLAIMS}", self.folder / CLAIMS, stale)

    def make(self) -> None:
        """A store has no folders."""

    def is_empty(self) -> bool:
        return all(name.startswith(f"{CLAIMS}/") for name in objects.listing(self.name))

    def done(self) -> set[int]:
        return shards.numbers_of(objects.listing(f"{self.name}/shards"))

    def stamp(self, name: str) -> Any:
        return objects.find(f"{self.name}/{name}")

    def stamps(self) -> dict[str, Any]:
        found = objects.listing(f"{self.name}/shards")
        return {name: found[name] for name in sorted(found) if shards.numbers_of([name])}

    def get(self, *names: str) -> bool:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return all(pool.map(lambda name: objects.get(f"{self.name}/{name}", self.folder / name), names))

    def put(self, *names: str) -> None:
        for name in names:
            path = self.folder / name
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                list(pool.map(lambda file: objects.put(file, f"{self.name}/{file.relative_to(self.folder)}"), files))
        for name in names:
            remove(self.folder / name)

    def remove(self, name: str) -> None:
        objects.remove(f"{self.name}/{name}")

    def damage(self, number: int, marker: Mapping[str, Any], verify: bool) -> str | None:
        for file, written in marker["files"].items():
            name = f"shards/{file}"
            found = self.stamp(name)
            if found is None:
                return f"{self.name}/{name} is missing"
            if found.size != written["bytes"]:
                return f"{self.name}/{name} has {found.size} bytes; {written['bytes']} were written"
            if verify:
                self.get(name)
                changed = file_hash(self.folder / name) != written["sha256"]
                remove(self.folder / name)
                if changed:
                    return f"{self.name}/{name} has changed since it was written: its sha256 differs"
        return None

    def clean(self) -> None:
        shutil.rmtree(self.folder / "shards", ignore_errors=True)
