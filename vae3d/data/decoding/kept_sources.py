"""Files and decoders that stay open, so that the next clip of a video costs less. Each process keeps its own."""

from __future__ import annotations

import atexit
import math
import os
import threading
from collections import OrderedDict
from pathlib import Path

from vae3d.data.decoding.frame_source import FrameSource
from vae3d.data.decoding.index_build import build
from vae3d.data.decoding.index_cache import open_index
from vae3d.data.storage.cache import cache_folder
from vae3d.data.storage.files import FileRange, local_range

KEPT = 8  # files per process
KEPT_PIXELS = 2**24  # of one frame of each of them together: eight of 1080p
_kept: OrderedDict[tuple, FrameSource] = OrderedDict()  # by file and its version; the one used last comes last
_kept_lock = threading.Lock()


def open_frame_source(path: str | Path | FileRange, threads: int = 1) -> FrameSource:
    """The source of a path: one that was kept, if its file, tar or object has not changed since. Raises MediaError."""
    file = path if isinstance(path, FileRange) else local_range(path)
    if not file.version:  # by which to find it again
        return FrameSource(file, build(file), threads)
    name = os.path.abspath(file.file) if file.is_plain else file.name
    version = (name, *file.inode, *file.version, cache_folder())
    if threads == 1:
        with _kept_lock:
            source = _kept.pop(version, None)
        if source is not None:
            return source
    source = FrameSource(file, open_index(file), threads)
    # Not kept: decoders with threads, which do not survive a fork, and files that the demuxer reads.
    source.version = version if threads == 1 and source.index.seek is None else None
    return source


def keep_source(source: FrameSource) -> None:
    """Keep a source that was read from open for the next reader of its file, and close those not used for longest.

    Each process keeps its own.
    """
    if source.version is None or source.file is None:
        source.close()
        return
    with _kept_lock:
        closed = [_kept.pop(source.version)] if source.version in _kept else []
        _kept[source.version] = source
        while len(_kept) > KEPT or sum(math.prod(kept.index.header.stored) for kept in _kept.values()) > KEPT_PIXELS:
            closed.append(_kept.popitem(last=False)[1])
    for old in closed:
        old.close()


def close_kept_sources() -> None:
    """Close all files that were kept open."""
    with _kept_lock:
        sources = list(_kept.values())
        _kept.clear()
    for source in sources:
        source.close()


atexit.register(close_kept_sources)
if hasattr(os, "register_at_fork"):  # a thread of the parent may hold the lock while another forks
    os.register_at_fork(
        before=_kept_lock.acquire, after_in_parent=_kept_lock.release, after_in_child=_kept_lock.release
    )
