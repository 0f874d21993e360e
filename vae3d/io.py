"""Files: read untrusted ones safely, and write so that a file is either complete or not there.

Readers return plain values only (dict, list, str, int, float, bool, None) in bounded time, and raise FileError for
anything else. Writers never follow a symbolic link.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vae3d.errors import UserError

MAX_BYTES = 2**20  # of a JSON file; a larger one takes seconds to parse
MAX_YAML_BYTES = 2**18  # likewise
MAX_BITS = 64  # of an integer
LONG_NUMBER = re.compile(r"[-+0-9a-fxob_:.eE]{200,}")  # PyYAML takes minutes for 1:1:1:..., a number to base 60
MAX_DEPTH = 32  # of nested lists and dicts


class FileError(UserError):
    """A file that cannot be used; the message names it, what is wrong, and where in it."""


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file, a byte-order mark removed. Raises FileError if it is missing, larger, or not text."""
    check_regular(path)
    try:
        with open(path, "rb") as stream:
            content = stream.read(max_bytes + 1)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise FileError(f"{path}: has more than {max_bytes} bytes, the maximum for a file of this kind")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def check_regular(path: str | Path) -> None:
    """Raises FileError for a pipe or a device, whose reading may never end; a file that is missing passes."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise FileError(f"{path}: is not a regular file")


def read_json(path: str | Path, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a JSON file. Raises FileError."""
    return parse_json(read_text(path, max_bytes), str(path))


def parse_json(text: str, source: str) -> Any:
    """The value of a JSON text; `source` names it in errors. Raises FileError."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise FileError(f"{source}: is nested more than {MAX_DEPTH} levels deep") from error
    except ValueError as error:  # also: an integer of more than 4300 digits
        raise FileError(f"{source}: is not JSON: {error}") from error
    return check_plain(value, source)


def read_yaml(path: str | Path, max_bytes: int = MAX_YAML_BYTES) -> Any:
    """The value in a YAML file without tags, aliases and `${...}`. Raises FileError."""
    return parse_yaml(read_text(path, max_bytes), str(path))


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; `source` names it in errors. Raises FileError."""
    import yaml  # here: scripts/fetch_weights.py reads JSON where no package is installed

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    try:
        # Look at the events first: aliases explode, and deep nesting exhausts the stack, while values are built.
        for event in yaml.parse(text, Loader=loader):
            where = f"{source}, line {event.start_mark.line + 1}"
            if isinstance(event, yaml.AliasEvent):
                raise FileError(f"{where}: alias *{event.anchor} is not allowed; write the value out")
            if getattr(event, "tag", None) is not None and event.tag != "!":
                raise FileError(f"{where}: tag {event.tag} is not allowed; use plain numbers, text, lists and dicts")
            if isinstance(event, yaml.ScalarEvent) and not event.style and LONG_NUMBER.fullmatch(event.value):
                raise FileError(f"{where}: a number of {len(event.value)} characters is not allowed")
            depth += isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent))
            depth -= isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent))
            if depth > MAX_DEPTH:
                raise FileError(f"{where}: is nested more than {MAX_DEPTH} levels deep")
        value = yaml.load(text, Loader=loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: such as the date 2026-99-99
        if isinstance(error, FileError):
            raise
        raise FileError(f"{source}: is not YAML: {' '.join(str(error).split())}") from error
    return check_plain(value, source)


def check_plain(value: Any, source: str, key: str = "", depth: int = 0) -> Any:
    """`value` itself, if it holds only finite numbers, text without `${`, booleans, None, lists, and dicts with text
    keys. Raises FileError naming the key."""
    where = f"{source}: {key}" if key else str(source)
    if depth > MAX_DEPTH:
        raise FileError(f"{where}: is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        for name, inner in value.items():
            if type(name) is not str:
                raise FileError(f"{where}: a key is not text but a {type(name).__name__}")
            if not name.isprintable():
                raise FileError(f"{where}: the key {name[:80]!r} has characters that cannot be printed")
            check_plain(name, source, f"{key}.{name}".lstrip("."), depth + 1)
            check_plain(inner, source, f"{key}.{name}".lstrip("."), depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            check_plain(inner, source, f"{key}[{index}]", depth + 1)
    elif isinstance(value, str):
        if "${" in value:
            raise FileError(f"{where}: {value[:80]!r} holds `${{`, an interpolation, which is not allowed in a file")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise FileError(f"{where}: {value} is not a finite number")
    elif type(value) is int:
        if value.bit_length() > MAX_BITS:
            raise FileError(f"{where}: an integer of {value.bit_length()} bits is not allowed")
    elif value is not None and type(value) is not bool:
        raise FileError(f"{where}: a {type(value).__name__} is not allowed; use numbers, text, lists and dicts")
    return value


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Inside, an OSError of writing becomes a FileError that names `path`, which the libraries' own do not."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from error


def yaml_text(value: Any) -> str:
    """YAML that read_yaml accepts: no aliases, keys in their order."""
    import yaml

    class PlainDumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(value, Dumper=PlainDumper, sort_keys=False, allow_unicode=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text`, atomically and fsynced."""
    with atomic_write(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace a file by indented JSON, atomically and fsynced."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary stream whose content replaces `path` when the block ends without an exception; else nothing changes.

    The content is fsynced before the rename and the folder after it. A link at `path` is replaced, not followed.
    Raises OSError if the disk refuses.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(tmp, "xb") as stream:  # "x" neither follows a link nor opens an existing file
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)  # after an error: half a file would only keep the disk full
    fsync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new empty folder whose content replaces the folder `path` when the block ends without an exception.

    All its files are fsynced before the rename. Raises OSError if the disk refuses.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.partial")
    remove(tmp)
    tmp.mkdir()
    try:
        yield tmp
        fsync_tree(tmp)
        remove(path)
        tmp.rename(path)
    finally:
        remove(tmp)
    fsync_folder(path.parent)


def fsync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and itself."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as stream:
                os.fsync(stream.fileno())
        fsync_folder(Path(root))


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file, a folder with all in it, or a link but not what it points to; nothing if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# Names of what a killed process left half-written: of atomic_write, atomic_folder, and writers that need a path.
UNFINISHED = re.compile(r"\..*(\.partial(\.\w+)?|\.[0-9a-f]{8}\.tmp)")


def remove_unfinished(folder: Path) -> None:
    """Delete half-written files and folders of a killed process; nothing if the folder is not there."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if UNFINISHED.fullmatch(path.name):
            remove(path)


RUN_SUBFOLDERS = (".hydra", "checkpoints", "exports", "tensorboard")  # of a training run's folder, which it writes


def check_run_folder(folder: Path) -> None:
    """Raises FileError if a run's folder, or one of RUN_SUBFOLDERS, holds a symbolic link, a pipe or a device: a run
    writes nothing outside of its folder. The folder itself may be a link."""
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root, name)
            if path.is_symlink():
                raise FileError(
                    f"{path}: is a symbolic link to {os.readlink(path)}, and a run writes inside its own folder only; "
                    f"delete it (a link in place of {folder} itself is allowed)"
                )
            if not path.is_file() and not path.is_dir():
                raise FileError(f"{path}: is a pipe or a device; delete it")
        if Path(root) == Path(folder):
            folders[:] = [name for name in folders if name in RUN_SUBFOLDERS]


def open_nofollow(path: Path, mode: str = "a") -> IO[Any]:
    """open(path, mode) that refuses a symbolic link as the last part of the path.

    Raises FileError for a link, OSError as open does.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    if path.is_symlink():
        raise FileError(f"{path}: is a symbolic link to {os.readlink(path)}; delete it")
    return open(path, mode, opener=opener)
