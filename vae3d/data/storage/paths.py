"""Paths as text: of local files, of objects of a store, and of members of tars.

    /data/a.mp4                                          a local file
    https://host/a.mp4  s3://  gs://  hf://  file://     an object of a store
    /data/0.tar@1536+238464/clips/a.mp4                  TAR@OFFSET+SIZE/MEMBER: SIZE bytes of an uncompressed tar
    s3://bucket/0.tar@1536+238464/clips/a.mp4            the same in a tar of a store
    /data/0.arrow@840+238464/train/video/7.hfvideo       a row of a dataset of Hugging Face, see sources/dataset_rows.py

files.py opens them. Names of members are never used as paths to write to.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from vae3d.data.media import DataError

HF_IMAGE, HF_VIDEO = ".hfimage", ".hfvideo"  # suffixes of rows of datasets
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
TAR = (".tar", ".arrow")  # suffixes of what has members
QUERY = re.compile(r"(?s:.)\.(?:tar|arrow)\?")  # the end of a tar's name, where a query follows
PLACE = re.compile(r"@([0-9]{1,18})\+([0-9]{1,18})/(?=(?s:.))")


def is_url(path: str | Path) -> bool:
    """Whether a path starts with PROTOCOL://, as an object of a store or a member of a tar there does."""
    return URL.match(os.fspath(path)) is not None


def is_stored(path: str | Path) -> bool:
    """Whether a path is a URL or a member of a tar, which only files.py opens. Keep it as text: pathlib makes
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
    if "@" not in path:
        return None
    # Not by one pattern, whose time would grow with the square of the path's length.
    query = QUERY.search(path)
    for found in PLACE.finditer(path):
        place = found.start()
        if path.endswith(TAR, 1, place) or (query is not None and query.end() <= place):
            return path[:place], int(found[1]), int(found[2]), path[found.end() :]
    return None


def name_of(path: str | Path) -> str:
    """A file's path; of a member its name in the tar, of an object its URL, without a query."""
    path = os.fspath(path)
    member = split_member(path)
    if member is not None:
        return member[3]
    return path.partition("?")[0] if is_http(path) else path


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


def is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))
