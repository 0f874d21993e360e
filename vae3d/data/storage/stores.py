"""Requests to the stores of remote objects (https://, s3://, gs://, hf://), by fsspec: read, list, ask for a version.

Errors that pass (a time-out, a cut connection, a full server) are retried. If they last, StorageError stops the run: an
unreachable store says nothing about its files. Errors of one object (not there, forbidden, too short) are MediaError.
"""

from __future__ import annotations

import asyncio
import errno
import glob
import logging
import os
import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from vae3d.data.media import DataError, MediaError
from vae3d.data.storage.paths import URL, is_http, local_name
from vae3d.text import one_line, plural

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

TRIES = 8  # of a request
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries at most, doubled each time; the actual wait is random
TIMEOUT = 60.0  # seconds without a byte, over HTTP; s3fs and gcsfs have their own limits
PIECE = 2**26  # bytes of a range read; a larger object is read in pieces
HTTP_DEPTH = 16  # folders below one that is listed over HTTP
LOG_EVERY = 60.0  # seconds between two lines about retries
KNOWN_VERSIONS = 2**16  # objects whose size and version a process remembers

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


# --- ranges and versions


def read_range(url: str, offset: int, size: int, name: str) -> bytes:
    """A range of an object. name: for messages. Raises MediaError, StorageError."""
    if not size:
        return b""

    def request() -> bytes:
        system, path = file_system(url)
        if is_http(url):
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


def check_current(url: str, name: str) -> None:
    """Raise MediaError if an object that was read in pieces was replaced meanwhile. Over HTTP each piece says so."""
    if not is_http(url):
        system, path = file_system(url)
        system.invalidate_cache(path)
        _check_version(url, name, _ask_version(url, name)[1])


def remote_version(url: str, name: str) -> tuple[int, str]:
    """Bytes of an object and its version, see version_of; asked for once per process. name: for messages. Raises
    MediaError, StorageError."""
    with _lock:
        known = _versions.get(url)
    return known or _remember(url, *_ask_version(url, name))


def _ask_version(url: str, name: str) -> tuple[int, str]:
    def request() -> tuple[int, str]:
        system, path = file_system(url)
        if is_http(url):
            _, size, version = _sync(system, _http, path, 0, None)
            return size, version
        info = system.info(path)
        if info.get("type") == "directory":
            raise MediaError(name, "is a folder, not an object")
        return info["size"], version_of(info)

    return with_retries(request, url, name)


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
        reason = f"access is denied: {_described(error)}. Credentials are those of fsspec (docs/large_data.md){public}"
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
    depth = {"maxdepth": HTTP_DEPTH} if is_http(url) else {}  # pages may link to others without end
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
        if not is_http(url) and info.get("size") is not None and version_of(info):
            _remember(name, info["size"], version_of(info))
    return sorted(names, key=lambda name: name.split("/"))
