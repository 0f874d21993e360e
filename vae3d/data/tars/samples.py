"""Tar shards in the layout of webdataset: the samples of one, and where the bytes of their members are."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from stat import S_ISREG
from typing import BinaryIO, NamedTuple

from vae3d.data.media import DataError, MediaError
from vae3d.data.storage.files import open_range, size_and_version
from vae3d.data.storage.paths import is_url, member_path
from vae3d.text import one_line

REMOTE_BLOCK = 2**19  # bytes of a range read of headers
MAX_PADDING = 2**20  # zero bytes after the end of a tar
MAX_HEADER = 2**20  # bytes of a member's name, and of others that a header declares
# Digits of a header: names of files have at most 255 bytes, and tarfile's time grows with the square of their number.
LONG_NUMBER = re.compile(rb"[0-9]{256}")
MAX_SIDECAR = 2**24  # bytes of a .json, .txt or .cls member
SIDECARS = ("json", "txt", "cls")
COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
METADATA_NAME = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips


@dataclass(frozen=True)
class Shard:
    """A tar file. path: absolute, or a URL. stamp: its modification time or ETag; "" if the server gives neither."""

    path: str
    bytes: int
    stamp: str


class Member(NamedTuple):
    """offset, size: bytes of its content within the tar. content: of small text members, else None."""

    name: str
    offset: int
    size: int
    content: bytes | None


class Sample(NamedTuple):
    """key, and members by extension in lower case."""

    key: str
    members: dict[str, Member]


def find_shard(path: str) -> Shard:
    """A tar file as it is now. Raises DataError if it does not exist, or its name is that of another file."""
    if path.lower().endswith(COMPRESSED_TAR):
        raise DataError(f"{path} is compressed; single samples can be read of plain tars only: decompress it")
    if is_url(path):
        member_path(path, 0, 0, "x")  # raises for a name that paths of members cannot have
        try:
            size, stamp = size_and_version(path)
        except MediaError as error:
            raise DataError(str(error)) from error
        return Shard(path, size, f"version:{stamp}")
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(
            f"{path}: {'no such file' if isinstance(error, FileNotFoundError) else error.strerror}"
        ) from error
    if not S_ISREG(stat.st_mode):  # to open a pipe would wait for ever
        raise DataError(f"{path} is no file, but a folder, a pipe or a device")
    if not path.lower().endswith(".tar"):
        raise DataError(f"{path} is no tar: its name does not end in .tar")
    member_path(path, 0, 0, "x")
    return Shard(os.path.abspath(path), stat.st_size, f"mtime:{stat.st_mtime_ns}")


class RangeReader:
    """A remote file that can be read from any byte on, in ranges of at least REMOTE_BLOCK bytes."""

    def __init__(self, url: str, size: int) -> None:
        self.url, self.length = url, size
        self._position, self._start, self._block = 0, 0, b""

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.length}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self._position)
        size = left if size is None or size < 0 else min(size, left)
        first = self._position - self._start
        if not 0 <= first <= first + size <= len(self._block):
            wanted = min(left, max(size, REMOTE_BLOCK))
            self._start, first = self._position, 0
            self._block = open_range(self.url, self._start, wanted) if wanted else b""
        self._position += size
        return self._block[first : first + size]


@contextmanager
def open_shard(shard: Shard) -> Iterator[BinaryIO]:
    """The bytes of a tar, local or at a URL, within the block. Raises OSError, MediaError, StorageError."""
    if is_url(shard.path):
        yield RangeReader(shard.path, shard.bytes)
    else:
        with open(shard.path, "rb") as stream:
            yield stream


def samples_of(shard: Shard, with_content: Callable[[int, str], bool] = lambda *_: False) -> Iterator[Sample]:
    """The samples of a tar in their order: consecutive members whose names are equal up to the first dot.

    with_content: (number of the sample, name of the member) -> whether to read the member, as .json, .txt and .cls
    always are.
    Skips folders, hidden files, and names that webdataset skips: without an extension, and __NAME__.
    Raises DataError, naming the member, for a tar that is truncated, damaged or compressed, and for links, sparse
    members, and names that are not UTF-8 or occur twice.
    """
    try:
        with open_shard(shard) as stream:
            yield from _samples(shard.path, stream, with_content)
    except DataError:  # a ValueError, too
        raise
    except MediaError as error:
        raise DataError(str(error)) from error
    except (tarfile.TarError, EOFError, OverflowError, ValueError, RecursionError) as error:
        raise DataError(f"{shard.path} is damaged or truncated: {one_line(error)}") from error
    except OSError as error:
        raise DataError(f"{shard.path} cannot be read: {error.strerror or one_line(error)}") from error


class _HeaderReader:
    """A tar for tarfile, which reads no more than headers: they may declare names of any length."""

    def __init__(self, stream: BinaryIO) -> None:
        self.seek, self.tell, self._read = stream.seek, stream.tell, stream.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        content = self._read(size)
        if LONG_NUMBER.search(content):
            raise tarfile.ReadError("a header with a number of more than 255 digits")
        return content


def _samples(path: str, stream: BinaryIO, with_content: Callable[[int, str], bool]) -> Iterator[Sample]:
    start = stream.read(max(map(len, COMPRESSED)))
    if kind := next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None):
        raise DataError(f"{path} is compressed ({kind}); single samples can be read of plain tars only: decompress it")
    if not start:
        raise DataError(f"{path} is empty (0 bytes)")
    stream.seek(0)
    sample: Sample | None = None
    number = -1  # of the sample
    # Strict UTF-8: else a name that is none would become one that no other program can read.
    headers = _HeaderReader(stream)
    with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        empty = tar.firstmember is None  # in which Python 3.10 would seek to -1
        while not empty and (info := tar.next()) is not None:
            tar.members.clear()  # tarfile keeps them all
            if info.size < 0 or tar.offset < info.offset_data:  # it would go in circles
                raise DataError(f"{path} is damaged: {info.name} has {info.size} bytes")
            parts = _name_parts(path, info)
            if parts is None:
                continue
            key, extension = parts
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample, number = Sample(key, {}), number + 1
            if extension in sample.members:
                raise DataError(f"{path}: has the member {info.name} twice")
            content = None
            if extension in SIDECARS and info.size > MAX_SIDECAR:
                raise DataError(f"{path}: {info.name} has {info.size} bytes, more than {MAX_SIDECAR}")
            if extension in SIDECARS or with_content(number, info.name):
                stream.seek(info.offset_data)  # not by extractfile, which reads many small pieces
                content = stream.read(info.size)
                if len(content) != info.size:
                    raise DataError(f"{path} is truncated: it ends within {info.name}")
            sample.members[extension] = Member(info.name, info.offset_data, info.size, content)
        _check_end(path, stream, tar.offset)
    if sample is not None:
        yield sample


def _name_parts(path: str, info: tarfile.TarInfo) -> tuple[str, str] | None:
    """Key and extension of a member; None for one that is skipped. Raises DataError."""
    # As webdataset splits a name: at the first dot of its last component.
    folder, slash, file = info.name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if info.isdir() or METADATA_NAME.match(info.name) or not (stem and dot):  # also d/._a.jpg, which macOS adds
        return None
    try:
        info.name.encode()
    except UnicodeEncodeError as error:
        name = info.name.encode("utf-8", "surrogateescape")
        raise DataError(f"{path}: the name of the member {name!r} is not UTF-8; rename it") from error
    if info.issparse():
        raise DataError(f"{path}: {info.name} is a sparse member; make the tar without --sparse")
    if not info.isreg():
        kind = "a link" if info.islnk() or info.issym() else "no file"
        hint = "; make the tar with --dereference --hard-dereference" if kind == "a link" else ""
        raise DataError(f"{path}: {info.name} is {kind}{hint}")
    return folder + slash + stem, extension.lower()


def _check_end(path: str, stream: BinaryIO, end: int) -> None:
    """tarfile ends without an error at a header that is damaged or missing, and reads nothing behind the end."""
    rest = stream.seek(0, os.SEEK_END) - end
    stream.seek(end)
    padding = stream.read(MAX_PADDING)
    if len(padding) < tarfile.BLOCKSIZE:
        raise DataError(f"{path} is truncated: it ends at byte {end} without the mark of a tar's end")
    if padding[: tarfile.BLOCKSIZE].strip(b"\0"):
        raise DataError(f"{path} is damaged: it has no header of a member at byte {end}")
    if rest > MAX_PADDING or padding.strip(b"\0"):
        raise DataError(f"{path} ends at byte {end}, and {rest} bytes follow; are several tars joined in one file?")
