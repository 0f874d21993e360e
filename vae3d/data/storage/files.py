"""Open what a path names (see paths.py): a local file, an object of a store, or a member of a tar.

local_range gives the local file and the range of bytes of any of them. A local tar is read in place. A remote object,
or a member of a remote tar, is fetched by one range read (stores.py) into a cache on disk (object_cache.py). The
network is touched for URLs only.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae3d.data.media import DataError, MediaError
from vae3d.data.storage.object_cache import cached_copy
from vae3d.data.storage.paths import is_stored, is_url, local_name, split_member, suffix_of
from vae3d.data.storage.stores import check_current, read_range, remote_version
from vae3d.text import plural


class RangeFile(io.RawIOBase):
    """A range of a local file as a file of its own, for reading. name: of a file with the same suffix."""

    _file: io.FileIO | None = None

    def __init__(self, file: Path, offset: int, size: int, suffix: str = "") -> None:
        self._file = open(file, "rb", buffering=0)  # noqa: SIM115
        self._offset, self.size, self._position = offset, size, 0
        self.name = f"content{suffix}"

    def pread(self, size: int, position: int) -> bytes:
        """`size` bytes from `position` on, fewer at the end. Safe in threads."""
        size = min(size, self.size - position)
        if size <= 0 or position < 0:
            return b""
        content = os.pread(self._file.fileno(), size, self._offset + position)
        while len(content) < size:  # one call gives at most 2 GiB
            more = os.pread(self._file.fileno(), size - len(content), self._offset + position + len(content))
            if not more:
                break
            content += more
        return content

    def readall(self) -> bytes:
        content = self.pread(self.size - self._position, self._position)
        self._position += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        content = self.pread(len(view), self._position)
        view[: len(content)] = content
        self._position += len(content)
        return len(content)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if position < 0:
            raise ValueError(f"negative position {position}")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


@dataclass(frozen=True)
class FileRange:
    """The bytes of a path, in a local file. name: the path, for messages. version: size and modification time (ns) of
    the file or tar; of a remote one its size and version (see size_and_version); empty if it will not be read again.
    inode: device and inode of a file that is no copy."""

    name: str
    file: Path
    offset: int
    size: int
    version: tuple[int, int | str] | tuple[()]
    inode: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether it is a local file and no more."""
        return not is_stored(self.name)

    def __str__(self) -> str:
        return self.name

    def open(self) -> RangeFile:
        """Open it for reading. A copy that was deleted from the cache in the meantime is fetched again.

        Raises OSError, and as local_range does.
        """
        place = self
        while True:
            try:
                return RangeFile(place.file, place.offset, place.size, suffix_of(self.name))
            except FileNotFoundError:
                if place.inode:  # no copy
                    raise
                place = local_range(self.name)

    def read(self) -> bytes:
        """The content. Raises MediaError if the file became shorter."""
        with self.open() as file:
            content = file.read()
        if len(content) != self.size:
            raise MediaError(self.name, f"was cut: {len(content)} bytes are left of {self.size}")
        return content


def local_range(path: str | Path) -> FileRange:
    """The local file and range of a path. A remote object is fetched, unless the cache has it.

    Raises MediaError if an object, tar or member is not there, DataError if its store or the cache cannot be used, and
    OSError for a missing plain file.
    """
    name = os.fspath(path)
    member = split_member(name)
    tar, offset, size, _ = member or (name, 0, None, "")
    local = local_name(tar)
    if local is None:
        size, version = size_and_version(name)
        return FileRange(name, _copy(name, size, version), 0, size, (size, version))
    stat = _stat(name, local)
    if size is None:
        size = stat.st_size
    elif offset + size > stat.st_size:
        raise MediaError(name, f"{tar} ends at byte {stat.st_size}, before this member; index it again")
    version = (stat.st_size, stat.st_mtime_ns)
    return FileRange(name, Path(local), offset, size, version, (stat.st_dev, stat.st_ino))


def _stat(name: str, local: str) -> os.stat_result:
    """Of a local file or tar. Raises MediaError, or OSError for a plain file."""
    try:
        return os.stat(local)
    except OSError as error:
        if name == local:
            raise
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise MediaError(name, f"no such file: {local}" if missing else f"cannot be read: {error.strerror}") from error


def size_and_version(path: str | Path) -> tuple[int, int | str]:
    """Bytes of a file, object or member, and the version of the file, object or tar that holds them.

    Version: of a local file its modification time (ns); of an object its ETag, or else what its store has. One request
    per object and process. Raises as local_range does.
    """
    name = os.fspath(path)
    member = split_member(name)
    tar, offset, size, _ = member or (name, 0, None, "")
    local = local_name(tar)
    if local is not None:
        stat = _stat(name, local)
        total, version = stat.st_size, stat.st_mtime_ns
    else:
        total, version = remote_version(tar, name)
    if size is not None and offset + size > total:
        raise MediaError(name, f"{tar} ends at byte {total}, before this member; index it again")
    return (total if size is None else size), version


def _copy(name: str, size: int, version: int | str) -> Path:
    """The copy in the cache of a remote object or a member."""
    url, offset, _, _ = split_member(name) or (name, 0, size, "")

    def read(start: int, count: int) -> bytes:
        if local_name(url) is not None:
            return open_range(url, offset + start, count)
        content = read_range(url, offset + start, count, name)
        if 0 < start == size - count:  # the last of several pieces
            check_current(url, name)
        return content

    return cached_copy(name, size, version, read)


@contextmanager
def local_copy(path: str | Path) -> Iterator[Path]:
    """A local file with the content and suffix of a stored path, for libraries that open files by name. Errors in the
    block name the stored path. Raises as local_range does."""
    name = os.fspath(path)
    place = local_range(name)
    file = place.file if not split_member(name) or is_url(name) else _copy(name, *size_and_version(name))
    try:
        yield file
    except DataError as error:
        raise type(error)(str(error).replace(str(file), name)) from error


def open_range(url: str | Path, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on, of a file or an object. One range read.

    Raises MediaError if it is not there, forbidden or shorter; StorageError if the store does not answer.
    """
    url = os.fspath(url)
    name = f"{url} (bytes {offset} to {offset + size})"
    local = local_name(url)
    if local is None:
        return read_range(url, offset, size, name)
    try:
        with RangeFile(Path(local), offset, size) as file:
            content = file.read(size)
    except OSError as error:
        raise MediaError(name, f"cannot be read: {error.strerror}") from error
    if len(content) != size:
        got = plural(len(content), "byte")
        raise MediaError(name, f"gave {got} of {size}; is the file shorter than its index says?")
    return content
