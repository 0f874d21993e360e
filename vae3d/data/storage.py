"""Where the bytes of a path are: a local file, an object of a store, or a member of a tar.

    /data/a.mp4                                          a local file
    https://host/a.mp4  s3://  gs://  hf://  file://     an object, read with fsspec
    /data/0.tar@1536+238464/clips/a.mp4                  TAR@OFFSET+SIZE/MEMBER: SIZE bytes of an uncompressed tar
    s3://bucket/0.tar@1536+238464/clips/a.mp4            the same in a tar of a store
    /data/0.arrow@840+238464/train/video/7.hfvideo       a row of a dataset of Hugging Face, see dataset_rows.py

local_range gives the local file and the range of bytes of any of them. A local tar is read in place. A remote object,
or a member of a remote tar, is fetched by one range read into $VAE3D_CACHE/objects, which holds at most
$VAE3D_CACHE_GIB (default 20); those that were used longest ago are deleted. All processes and ranks of a machine share
this folder.

Errors that pass (a time-out, a cut connection, a full server) are retried. If they last, StorageError stops the run: an
unreachable store says nothing about its files. Errors of one object (not there, forbidden, too short) are MediaError.

Names of members are never used as paths to write to. The network is touched for URLs only.
"""

from __future__ import annotations

import asyncio
import errno
import glob
import hashlib
import io
import json
import logging
import os
import re
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from vae3d.data.media import DataError, MediaError, one_line
from vae3d.text import plural

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from tenacity import RetryCallState

log = logging.getLogger("vae3d")
T = TypeVar("T")

PACKAGES = {  # protocol -> extra of setup.cfg, the package that fsspec needs
    "http": ("http", "aiohttp"),
    "https": ("http", "aiohttp"),
    "s3": ("s3", "s3fs"),
    "gs": ("gcs", "gcsfs"),
    "hf": (None, "huggingface_hub"),
}
HF_IMAGE, HF_VIDEO = ".hfimage", ".hfvideo"  # suffixes of rows of datasets
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
MEMBER = re.compile(r"(.+?\.(?:tar|arrow)(?:\?.*?)?)@([0-9]{1,18})\+([0-9]{1,18})/(.+)", re.DOTALL)

TRIES = 8  # of a request
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries at most, doubled each time; the actual wait is random
TIMEOUT = 60.0  # seconds without a byte, over HTTP; s3fs and gcsfs have their own limits
PIECE = 2**26  # bytes of a range read; a larger object is read in pieces
HTTP_DEPTH = 16  # folders below one that is listed over HTTP
LOG_EVERY = 60.0  # seconds between two lines about retries
KNOWN_VERSIONS = 2**16  # objects whose size and version a process remembers

DEFAULT_GIB = 20.0
GIB = 2**30
KEEP = 0.9  # share of the limit that is left when the cache is full
USED_AGAIN = 60.0  # seconds after which a use is written down again
ABANDONED = 3600.0  # seconds without a write after which an unfinished file is deleted
UNFINISHED = ".part"  # suffix
SUFFIX = re.compile(r"\.[a-z0-9]{1,8}")

PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
LASTING_ERRNO = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, getattr(errno, "EREMCHG", errno.ENOENT)}
BACKENDS = {"aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "huggingface_hub", "httpx", "requests", "urllib3"}
PASSING_NAMES = {  # of their classes that are no OSError
    *("ClientConnectionError", "ClientPayloadError", "TransferEncodingError"),  # aiohttp
    *("ConnectionError", "HTTPClientError", "IncompleteReadError", "ResponseParserError"),  # botocore
    *("TransportError", "RequestException", "HTTPError"),  # httpx, requests, urllib3
}

retries: Counter[str] = Counter()  # host or bucket -> retries in this process


class StorageError(DataError):
    """A store does not answer, or cannot be used as it is set up. Other ranks may not see it."""

    on_every_rank = False


class _PassingError(Exception):
    """A request failed in a way that may pass. is_short: it ended well, with too few bytes."""

    def __init__(self, reason: str, is_short: bool = False) -> None:
        super().__init__(reason)
        self.is_short = is_short


def cache_folder() -> Path:
    """$VAE3D_CACHE, or vae3d in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("VAE3D_CACHE", home / "vae3d"))


# --- paths


def is_url(path: str | Path) -> bool:
    """Whether a path starts with PROTOCOL://, as an object of a store or a member of a tar there does."""
    return URL.match(os.fspath(path)) is not None


def is_stored(path: str | Path) -> bool:
    """Whether a path is a URL or a member of a tar, which only this module opens. Keep it as text: pathlib makes
    s3:/bucket of s3://bucket."""
    path = os.fspath(path)
    return is_url(path) or split_member(path) is not None


def member_path(tar: str | Path, offset: int, size: int, member: str) -> str:
    """The path of a member whose content is `size` bytes of `tar` from `offset` on. tar: a local path or a URL, with
    the suffix .tar. Raises DataError for another suffix and an empty name, which split_member would not find again."""
    path = f"{os.fspath(tar)}@{offset}+{size}/{member}"
    if split_member(path) != (os.fspath(tar), offset, size, member):
        raise DataError(f"{path}: is no path of a member of a tar; the tar needs the suffix .tar, the member a name")
    return path


def split_member(path: str | Path) -> tuple[str, int, int, str] | None:
    """(tar, offset, size, member) of the path of a member of a tar; None for other paths."""
    path = os.fspath(path)
    found = MEMBER.fullmatch(path) if "@" in path else None
    return (found[1], int(found[2]), int(found[3]), found[4]) if found else None


def name_of(path: str | Path) -> str:
    """A file's path; of a member its name in the tar, of an object its URL, without a query."""
    path = os.fspath(path)
    member = split_member(path)
    if member is not None:
        return member[3]
    return path.partition("?")[0] if _is_http(path) else path


def suffix_of(path: str | Path) -> str:
    """The suffix of a file, an object or a member, in lower case: .mp4."""
    return os.path.splitext(name_of(path))[1].lower()


def resolve(root: str | Path, name: str) -> str:
    """The stored path `name`, relative to `root`, a folder or a URL, unless it is absolute."""
    name = local_name(name) or name
    if is_url(name):
        return name
    member = split_member(name)
    if member is not None and not is_url(root):
        tar, offset, size, inside = member
        return member_path(os.path.abspath(os.path.join(root, tar)), offset, size, inside)
    if not is_url(root):
        return os.path.abspath(os.path.join(root, name))
    if name.startswith("/"):
        parts = urlsplit(os.fspath(root))
        return f"{parts.scheme}://{parts.netloc}{name}"
    return f"{os.fspath(root).rstrip('/')}/{name.removeprefix('./')}"


def folder_of(path: str | Path) -> str | Path:
    """The folder of a table, which relative paths are relative to. Raises DataError for a member of a tar."""
    if not is_stored(path):
        return Path(path).parent
    if split_member(path):
        raise DataError(f"{path} is in a tar; set data.source.root to what its paths are relative to")
    return os.fspath(path).rpartition("/")[0]


def local_name(path: str) -> str | None:
    """The path of a local file or of a file:// URL; None for other URLs."""
    protocol = URL.match(path)
    if protocol is None:
        return path
    return path[protocol.end() :] if protocol[1].lower() == "file" else None


# --- ranges of local files


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
        return FileRange(name, _cached(name, size, version), 0, size, (size, version))
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
        total, version = _remote_version(tar, name)
    if size is not None and offset + size > total:
        raise MediaError(name, f"{tar} ends at byte {total}, before this member; index it again")
    return (total if size is None else size), version


def exists(path: str | Path) -> bool:
    """Whether a local file or an object is there, and may be read. Raises StorageError if its store does not answer."""
    if not is_url(path):
        return os.path.isfile(path)
    try:
        size_and_version(path)
    except MediaError:
        return False
    return True


@contextmanager
def local_copy(path: str | Path) -> Iterator[Path]:
    """A local file with the content and suffix of a stored path, for libraries that open files by name. Errors in the
    block name the stored path. Raises as local_range does."""
    name = os.fspath(path)
    place = local_range(name)
    file = place.file if not split_member(name) or is_url(name) else _cached(name, *size_and_version(name))
    try:
        yield file
    except DataError as error:
        raise type(error)(str(error).replace(str(file), name)) from error


# --- reading objects


def open_range(url: str | Path, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on, of a file or an object. One range read.

    Raises MediaError if it is not there, forbidden or shorter; StorageError if the store does not answer.
    """
    url = os.fspath(url)
    name = f"{url} (bytes {offset} to {offset + size})"
    local = local_name(url)
    if local is None:
        return _fetch(url, offset, size, name)
    try:
        with RangeFile(Path(local), offset, size) as file:
            content = file.read(size)
    except OSError as error:
        raise MediaError(name, f"cannot be read: {error.strerror}") from error
    _check_length(name, content, size)
    return content


def _check_length(name: str, content: bytes, size: int) -> None:
    if len(content) != size:
        raise MediaError(
            name, f"gave {plural(len(content), 'byte')} of {size}; is the file shorter than its index says?"
        )


def _fetch(url: str, offset: int, size: int, name: str) -> bytes:
    """A range of a remote object. name: for messages."""
    if not size:
        return b""

    def request() -> bytes:
        system, path = file_system(url)
        if _is_http(url):
            content, _, version = _sync(system, _http, path, offset, size)
            _check_version(url, name, version)
        else:
            # That of Hugging Face would read 5 MiB ahead.
            options = {"cache_type": "none"} if URL.match(url)[1].lower() == "hf" else {}
            content = system.cat_file(path, start=offset, end=offset + size, **options)
        if len(content) < size:
            raise _PassingError(f"gave {plural(len(content), 'byte')} of {size}", is_short=True)
        if len(content) > size:
            raise MediaError(name, f"gave more than the {plural(size, 'byte')} that were asked for; it ignores ranges")
        return content

    return with_retries(request, url, name)


def _check_version(url: str, name: str, version: str) -> None:
    """Raise MediaError if an object was replaced since its version was asked for: pieces of two would be mixed."""
    with _lock:
        known = _versions.get(url)
        if known is None or known[1] == version or known[1].startswith("W/"):  # weak: equal content may have two
            return
        del _versions[url]
    raise MediaError(name, f"was replaced while it was read: its version was {known[1]} and is {version}")


_versions: OrderedDict[str, tuple[int, str]] = OrderedDict()  # URL -> size and version


def _remote_version(url: str, name: str) -> tuple[int, str]:
    with _lock:
        known = _versions.get(url)
    if known is not None:
        return known

    def request() -> tuple[int, str]:
        system, path = file_system(url)
        if _is_http(url):
            _, size, version = _sync(system, _http, path, 0, None)
            return size, version
        info = system.info(path)
        if info.get("type") == "directory":
            raise MediaError(name, "is a folder, not an object")
        return info["size"], version_of(info)

    return _remember(url, *with_retries(request, url, name))


def _remember(url: str, size: int, version: str) -> tuple[int, str]:
    with _lock:
        _versions[url] = size, version
        while len(_versions) > KNOWN_VERSIONS:
            _versions.popitem(last=False)
    return size, version


def forget_versions() -> None:
    """Ask stores for sizes and versions again."""
    with _lock:
        _versions.clear()


def version_of(info: dict[str, Any]) -> str:
    """What fsspec's stores know of an object, the surest first."""
    keys = ("ETag", "etag", "generation", "blob_id", "md5Hash", "LastModified", "last_modified", "updated", "mtime")
    return next((f"{key} {info[key]}" for key in keys if info.get(key)), "")


async def _http(system: Any, url: str, offset: int, size: int | None) -> tuple[bytes, int, str]:
    """(content of a range, bytes of the object, its version). size: None reads nothing.

    A GET, as presigned URLs allow no HEAD. fsspec's own takes any length and status 200 for a range. Content is never
    decompressed, as ranges and sizes are those of what is stored; nor is more read than was asked for.
    """
    import aiohttp

    session = await system.set_session()
    options = dict(system.kwargs)
    last = offset + (size or 1) - 1
    options["headers"] = {
        **options.pop("headers", {}),
        "Range": f"bytes={offset}-{last}",
        "Accept-Encoding": "identity",
    }
    options.setdefault("timeout", aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT))
    async with session.get(system.encode_url(url), auto_decompress=False, **options) as response:
        version = response.headers.get("ETag") or response.headers.get("Last-Modified", "")
        first, total = _content_range(response.headers.get("Content-Range", ""))
        if response.status == 416 and total is not None and (size is None or offset >= total):
            if size is None and not total:
                return b"", 0, version
            raise MediaError(url, f"has {plural(total, 'byte')}; byte {offset} was asked for")
        response.raise_for_status()
        if response.status == 206 and first != offset:
            raise MediaError(url, f"its server answers with another range: {response.headers.get('Content-Range')!r}")
        if response.status != 206:
            first, total = None, response.content_length
        if size is None:
            if total is None:
                raise MediaError(url, "its server does not say how long it is (no Content-Range or Content-Length)")
            return b"", total, version
        if first is None and (offset, size) != (0, total):
            reason = f"its server ignores ranges (status {response.status} for bytes {offset} to {last})"
            if _is_tar(url):  # none of its members can be read
                raise StorageError(
                    f"{url}: {reason}, by which the members of a tar are read. python -m http.server does so, nginx "
                    "and object stores do not: use one of these, or copy the tars to this machine"
                )
            raise MediaError(url, f"{reason}, by which objects of more than {PIECE // 2**20} MiB are read")
        if total is not None and offset + size > total:
            raise MediaError(url, f"has {plural(total, 'byte')}; bytes {offset} to {last} were asked for")
        content = bytearray()
        try:
            async for chunk in response.content.iter_any():
                content += chunk
                if len(content) > size:
                    break
        except aiohttp.ClientError as error:
            got = f"gave {plural(len(content), 'byte')} of {size}, then the connection broke"
            raise _PassingError(f"{got} ({type(error).__name__})") from error
        return bytes(content), total or 0, version


def _content_range(header: str) -> tuple[int | None, int | None]:
    """(first byte, bytes of the object) of a header Content-Range; None: not given."""
    found = re.fullmatch(r"bytes (?:([0-9]+)-[0-9]+|\*)/([0-9]+|\*)", header.strip())
    if not found:
        return None, None
    return found[1] and int(found[1]), None if found[2] == "*" else int(found[2])


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _is_tar(url: str) -> bool:
    return urlsplit(url).path.lower().endswith(".tar")


def _sync(system: Any, function: Callable, *args: Any) -> Any:
    from fsspec.asyn import sync

    return sync(system.loop, function, system, *args)


# --- file systems of fsspec: one per protocol and process, since its event loop does not survive a fork

_systems: dict[tuple, AbstractFileSystem] = {}
_inherited: list[dict] = []  # of the parent. Kept, because to close their connections would disturb the parent
_lock = threading.RLock()


def file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """fsspec's file system for a URL, and its path there. Settings are those of fsspec's configuration.

    Raises StorageError for an unknown protocol or a missing package.
    """
    import fsspec

    found = URL.match(url)
    protocol = found[1].lower()
    url = f"{protocol}://{url[found.end() :]}"
    if protocol not in PACKAGES:
        raise StorageError(f"{url}: there is no protocol {protocol}://; use file, {', '.join(PACKAGES)}")
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        extra, package = PACKAGES[protocol]
        of_project = f"pip install -e '.[{extra}]' in the project's folder, or " if extra else ""
        raise StorageError(f"{url}: {protocol}:// needs {package}: {of_project}pip install {package}") from error
    options = kind._get_kwargs_from_urls(url)
    key = (protocol, *sorted(options.items()))
    with _lock:
        if key not in _systems:
            _systems[key] = kind(**options, skip_instance_cache=True)
        return _systems[key], kind._strip_protocol(url)


def _after_fork() -> None:
    global _lock, _last_log, _systems
    _inherited.append(_systems)
    _lock, _last_log, _systems = threading.RLock(), 0.0, {}
    retries.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# --- retries


def with_retries(request: Callable[[], T], url: str, name: str) -> T:
    """request(), again if an error may pass. Raises MediaError for errors of the object, StorageError for others."""
    import tenacity

    def once() -> T:
        try:
            return request()
        except (MediaError, DataError, _PassingError) as error:
            if isinstance(error, MediaError):
                raise MediaError(name, error.reason) from error
            raise
        except Exception as error:  # backends have classes of their own, which need not be installed
            if _is_passing(error):
                raise _PassingError(_described(error)) from error
            raise _lasting(error, url, name) from error

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_PassingError),
        stop=tenacity.stop_after_attempt(TRIES),
        wait=tenacity.wait_random_exponential(FIRST_WAIT, LONGEST_WAIT),
        before_sleep=lambda state: _count_retry(url, state),
        reraise=True,
    )
    try:
        return retrying(once)
    except _PassingError as error:
        if error.is_short:
            reason = f"{error}, at the last of {TRIES} tries; is the object shorter than its index says?"
            raise MediaError(name, reason) from error
        raise StorageError(
            f"{name}: the store does not answer; the last of {TRIES} tries: {error}. Run the command again when it does"
        ) from error


_last_log = 0.0


def _count_retry(url: str, state: RetryCallState) -> None:
    global _last_log
    host = urlsplit(url).netloc.rpartition("@")[2]  # without a password
    with _lock:
        retries[host] += 1
        total, is_due = retries[host], time.monotonic() - _last_log >= LOG_EVERY
        if is_due:
            _last_log = time.monotonic()
    if is_due:
        error = state.outcome.exception()
        log.warning("%s: %s so far in this process; the last one after: %s", host, plural(total, "retry"), error)


def _status_of(error: BaseException) -> int | None:
    """The HTTP status of an error: of aiohttp, gcsfs, or of libraries that keep the response."""
    places = ((error, "status"), (getattr(error, "response", None), "status_code"), (error, "code"))
    found = (getattr(holder, name, None) for holder, name in places)
    return next((value for value in found if isinstance(value, int) and 100 <= value < 600), None)


def _is_passing(error: BaseException) -> bool:
    status = _status_of(error)
    if status is not None and status >= 400:
        return status in PASSING_STATUS
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    if isinstance(error, TimeoutError | asyncio.TimeoutError | ConnectionError | EOFError):
        return True
    if isinstance(error, OSError):
        return error.errno not in LASTING_ERRNO
    return _is_of_backend(error) and any(kind.__name__ in PASSING_NAMES for kind in type(error).__mro__)


def _is_of_backend(error: BaseException) -> bool:
    return any(kind.__module__.partition(".")[0] in BACKENDS for kind in type(error).__mro__)


def _lasting(error: Exception, url: str, name: str) -> Exception:
    """The error to raise; `error` itself if it is a bug."""
    status = _status_of(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        what = f"no such object (status {status})" if status else "no such object or bucket"
        return MediaError(name, what)
    denied = isinstance(error, PermissionError) or status in (401, 403)
    if denied or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        protocol = url.partition(":")[0].upper()
        public = f"; for a public bucket: export FSSPEC_{protocol}='{{\"anon\": true}}'" if protocol == "S3" else ""
        reason = f"access is denied: {_described(error)}. Credentials are those of fsspec (docs/data.md){public}"
        return MediaError(name, reason) if denied else StorageError(f"{name}: {reason}")
    if isinstance(error, OSError | ValueError) or status or _is_of_backend(error):
        return MediaError(name, f"cannot be read: {_described(error)}")
    return error


def _described(error: BaseException) -> str:
    status = _status_of(error)
    text = one_line(error, 200)
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return "no answer in time"
    if status:
        return f"status {status}" + (f" {error.message}" if getattr(error, "message", "") else "")
    return text if type(error).__name__ in text else f"{type(error).__name__}: {text}"


# --- the cache of remote objects


def cache_limit() -> int:
    """Bytes that the cache may have: $VAE3D_CACHE_GIB. Raises DataError."""
    given = os.environ.get("VAE3D_CACHE_GIB", DEFAULT_GIB)
    try:
        limit = float(given)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise DataError(f"VAE3D_CACHE_GIB={given}: use the GiB that fetched objects may take on disk, such as 20")
    return int(limit * GIB)


def _cached(name: str, size: int, version: int | str) -> Path:
    """The local copy of a remote object or member, fetched if it is not there.

    Its name has a hash of path and version: a replaced object is another one.
    """
    key = hashlib.blake2b(json.dumps([name, size, version]).encode(), digest_size=16).hexdigest()
    suffix = suffix_of(name)
    file = cache_folder() / "objects" / key[:2] / f"{key[2:]}{suffix if SUFFIX.fullmatch(suffix) else ''}"
    try:
        stat = file.stat()
    except FileNotFoundError:
        stat = None
    except OSError as error:
        raise _unusable(error) from error
    if stat is not None and stat.st_size == size:
        if time.time() - stat.st_atime > USED_AGAIN:
            with suppress(OSError):  # deleted meanwhile, or another user's
                os.utime(file, ns=(time.time_ns(), stat.st_mtime_ns))
        return file
    url, offset, _, _ = split_member(name) or (name, 0, size, "")
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        _reserve(part, size, name)
        with part.open("r+b") as stream:
            for start in range(0, size, PIECE):
                piece = min(PIECE, size - start)
                stream.write(_read_piece(url, offset + start, piece, name))
        os.replace(part, file)
    except OSError as error:
        raise _unusable(error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return file


def _read_piece(url: str, offset: int, size: int, name: str) -> bytes:
    return open_range(url, offset, size) if local_name(url) is not None else _fetch(url, offset, size, name)


def _unusable(error: OSError) -> StorageError:
    folder = cache_folder() / "objects"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"the disk of the cache folder {folder} is full ({error.strerror}); lower VAE3D_CACHE_GIB (now "
            f"{cache_limit() / GIB:g}), or set VAE3D_CACHE to a folder on another disk"
        )
    return StorageError(
        f"the cache folder {folder} cannot be used ({error.strerror}); set VAE3D_CACHE to a writable folder"
    )


def _reserve(part: Path, size: int, name: str) -> None:
    """Make the unfinished file with its full size, and delete copies if the cache would become larger than its limit.

    The file `bytes` has the size of the cache, an upper bound: it is counted again when it reaches the limit.
    """
    from filelock import FileLock

    limit, folder = cache_limit(), cache_folder() / "objects"
    if size > limit:
        raise DataError(
            f"{name} has {size / GIB:.3g} GiB, more than VAE3D_CACHE_GIB={limit / GIB:g}, the limit of all fetched "
            f"objects in {folder}; raise it"
        )
    part.parent.mkdir(parents=True, exist_ok=True)
    total_file = folder / "bytes"
    with FileLock(folder / "lock").acquire(poll_interval=0.005):
        try:
            total = int(total_file.read_text())
        except (FileNotFoundError, ValueError):  # or a machine went down while it was written
            total = limit
        if total + size > limit:
            total = _delete_oldest(folder, min(int(KEEP * limit), limit - size))
        with part.open("xb") as stream:
            stream.truncate(size)
        total_file.write_text(str(total + size))


def _delete_oldest(folder: Path, target: int) -> int:
    """Delete the copies that were used longest ago until `target` bytes are left. Returns how many are.

    Files that are being written count and stay. A process that has a deleted file open goes on reading it.
    """
    copies, total, now = [], 0, time.time()
    for place in os.scandir(folder):
        for entry in os.scandir(place) if place.is_dir(follow_symlinks=False) else ():
            with suppress(FileNotFoundError):
                stat = entry.stat(follow_symlinks=False)
                total += stat.st_size
                if not entry.name.endswith(UNFINISHED):
                    copies.append((stat.st_atime_ns, stat.st_size, entry.path))
                elif now - stat.st_mtime > ABANDONED:
                    copies.append((0, stat.st_size, entry.path))
    for _, size, path in sorted(copies):
        if total <= target:
            break
        with suppress(FileNotFoundError):
            os.unlink(path)
        total -= size
    return total


# --- listing


def list_urls(pattern: str) -> list[str]:
    """The files or objects of a pattern: {000..999} and {a,b} stand for each value, whether it exists or not; `*` for
    what is there, sorted. Of paths and URLs. Raises DataError if nothing is there for a `*`, or a brace is missing."""
    import braceexpand

    try:
        patterns = list(braceexpand.braceexpand(pattern)) if "{" in pattern else [pattern]
    except braceexpand.UnbalancedBracesError as error:
        raise DataError(f"{pattern}: {error}") from error
    found: list[str] = []
    for one in patterns:
        matches = _matches(one) if "*" in one else [one]
        if not matches:
            raise DataError(f"{one}: no file matches")
        found += matches
    return found


def _matches(pattern: str) -> list[str]:
    local = local_name(pattern)
    if local is not None:
        names = sorted(glob.glob(glob.escape(local).replace("[*]", "*"), recursive=True))
        return [f"file://{name}" if local != pattern else name for name in names]
    return _listed(pattern, lambda system, path: system.glob(path, detail=True))


def find_objects(url: str) -> list[str]:
    """The URLs of all objects under a URL, sorted; the URL itself if it is an object. Raises MediaError, DataError."""
    depth = {"maxdepth": HTTP_DEPTH} if _is_http(url) else {}  # pages may link to others without end
    return _listed(url, lambda system, path: system.find(path, detail=True, **depth))


def _listed(url: str, request: Callable[[AbstractFileSystem, str], dict[str, dict]]) -> list[str]:
    """The objects that a request lists. Their sizes and versions are remembered where the store gives them."""

    def listing() -> dict[str, dict]:
        system, path = file_system(url)
        return {str(system.unstrip_protocol(name)): info for name, info in request(system, path).items()}

    infos = with_retries(listing, url, url)
    names = [name for name, info in infos.items() if info.get("type") != "directory"]
    for name in names:
        info = infos[name]
        if not _is_http(url) and info.get("size") is not None and version_of(info):
            _remember(name, info["size"], version_of(info))
    return sorted(names, key=lambda name: name.split("/"))
