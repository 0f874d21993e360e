"""Write, list and delete the objects of a store (s3://, gs://). Reading is that of files.py.

Requests are repeated after errors that pass, as reads are. An object is there as a whole or not at all.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from vae3d.data.media import MediaError
from vae3d.data.storage import files, stores

SMALL = 2**25  # bytes of an object that is sent in one request


class Object(NamedTuple):
    """version: its ETag, or what its store has instead. modified: seconds since 1970, by the store's clock."""

    size: int
    version: str
    modified: float


def put(file: Path, url: str) -> None:
    """Write a file to an object, and replace what it was. Raises MediaError, StorageError; OSError for the file."""
    content = file.read_bytes() if file.stat().st_size <= SMALL else None

    def request() -> None:
        system, path = stores.file_system(url)
        if content is None:
            system.put_file(str(file), path)
        else:
            system.pipe_file(path, content)

    stores.with_retries(request, url, url)


def remove(url: str) -> None:
    """Delete an object, if it is there. Raises MediaError, StorageError."""

    def request() -> None:
        system, path = stores.file_system(url)
        with suppress(FileNotFoundError):
            system.rm_file(path)

    stores.with_retries(request, url, url)


def find(url: str) -> Object | None:
    """An object as it is now; None if it does not exist. Raises MediaError, StorageError."""

    def request() -> Object | None:
        system, path = stores.file_system(url)
        system.invalidate_cache()
        try:
            info = system.info(path)
        except FileNotFoundError:
            return None
        return None if info.get("type") == "directory" else _object(info)

    return stores.with_retries(request, url, url)


def listing(url: str) -> dict[str, Object]:
    """The objects under a URL as they are now, by their names from there. Raises MediaError, StorageError."""

    def request() -> dict[str, Object]:
        system, path = stores.file_system(url)
        system.invalidate_cache()
        try:
            infos = system.find(path, detail=True)
        except FileNotFoundError:
            return {}
        return {
            name.removeprefix(path).lstrip("/"): _object(info)
            for name, info in infos.items()
            if info.get("type") != "directory"
        }

    return stores.with_retries(request, url, url)


def get(url: str, file: Path) -> bool:
    """Copy an object, as it is now, to a file; whether it exists. Raises MediaError, StorageError."""
    found = find(url)
    if found is None:
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        for start in range(0, found.size, stores.PIECE):
            stream.write(files.open_range(url, start, min(stores.PIECE, found.size - start)))
    return True


def _object(info: dict[str, Any]) -> Object:
    when = next((info[key] for key in ("LastModified", "updated", "mtime") if info.get(key)), None)
    if isinstance(when, str):
        when = datetime.fromisoformat(when.replace("Z", "+00:00"))
    if when is None:
        raise MediaError(str(info.get("name")), "its store does not say when it was written")
    modified = when.timestamp() if isinstance(when, datetime) else float(when)
    return Object(info["size"], stores.version_of(info), modified)
