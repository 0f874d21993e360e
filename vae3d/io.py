"""Read untrusted JSON and YAML safely; write files and folders atomically and durably; locks.

Readers return plain values (dict, list, str, int, float, bool, None) in bounded time, and raise FileError for anything
else. Writers never follow a symbolic link, and leave a file either complete or as it was.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from vae3d.errors import UserError

MAX_BYTES = 2**20  # of a JSON file; a larger one takes seconds to parse
MAX_YAML_BYTES = 2**18
MAX_BITS = 64  # of an integer
LONG_NUMBER = re.compile(r"[-+0-9a-fxob_:.eE]{200,}")  # PyYAML takes minutes for 1:1:1:..., a number in base 60
MAX_DEPTH = 32  # of nested lists and dicts


class FileError(UserError):
    """A file cannot be used. The message names the file, the error, and where in the file it is."""


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file without byte-order mark. Raises FileError if it is missing, too large, or not text."""
    check_regular(path)
    try:
        with open(path, "rb") as stream:
            content = stream.read(max_bytes + 1)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise FileError(f"{path}: has more than {max_bytes} bytes, the maximum for such a file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def check_regular(path: str | Path) -> None:
    """Raises FileError for a pipe or a device, which may never end. A missing file passes."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise FileError(f"{path}: is not a regular file")


def read_json(path: str | Path, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a JSON file. Raises FileError."""
    return parse_json(read_text(path, max_bytes), str(path))


def parse_json(text: str, source: str) -> Any:
    """The value of a JSON text. source: its name in errors. Raises FileError."""
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
    """The value of a YAML text. source: its name in errors. Raises FileError."""
    import yaml  # here, because scripts/fetch_weights.py runs without packages

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    try:
        # Check the events first: building values, aliases may explode and deep nesting may exhaust the stack.
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
    """Return `value` if it has only finite numbers, text without `${`, booleans, None, lists and dicts with text keys.

    Raises FileError naming the key.
    """
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


# What a full, failing or vanished disk raises, or a folder whose permissions changed.
DISK_ERRORS = frozenset({
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENODEV, errno.ENOENT,
    errno.ENOLCK, errno.ENOSPC, errno.ENOTCONN, errno.ENOTDIR, errno.ENXIO, errno.EPERM, errno.EREMOTEIO, errno.EROFS,
    errno.ESTALE, errno.ETIMEDOUT,
})  # fmt: skip


def is_disk_error(error: BaseException) -> bool:
    """Whether writing failed because of the disk. torch and safetensors raise types of their own for that."""
    if isinstance(error, OSError):
        return error.errno in DISK_ERRORS
    text = str(error)
    if type(error).__name__ == "SafetensorError":  # by name, because scripts/fetch_weights.py runs without packages
        return "I/O error" in text or "IoError" in text
    return isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text)


class naming:
    """Context manager: turns an error of writing into a FileError that names `path`."""

    def __init__(self, path: Path | str) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, OSError):
            raise FileError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        if error is not None and is_disk_error(error):
            raise FileError(f"{self.path}: cannot be written, as on a full disk: {error}") from error


def yaml_text(value: Any) -> str:
    """YAML without aliases, with keys in their order. Raises FileError for other than plain values."""
    import yaml

    class PlainDumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    try:
        return yaml.dump(value, Dumper=PlainDumper, sort_keys=False, allow_unicode=True)
    except yaml.representer.RepresenterError as error:
        raise FileError(f"{error.args[-1]!r} cannot be written; use numbers, text, lists and dicts") from error


# ---- atomic writing: under the temporary name `.NAME.tmp` or `.NAME.<8 hex digits>.tmp`, then renamed

TMP_NAME = re.compile(r"\..*\.tmp|\.tmp[A-Za-z0-9]{6}")  # the latter: of safetensors


def tmp_path(path: Path) -> Path:
    """The temporary name of `path`, the same in all processes."""
    return path.with_name(f".{path.name}.tmp")


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text`, atomically and fsynced. Raises FileError."""
    with naming(path), atomic_write(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace a file by indented JSON, atomically and fsynced, numbers in full. Raises FileError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary stream that replaces the file `path` when the block ends without an exception; else nothing changes."""
    with atomic_path(path) as tmp, tmp.open("xb") as stream:
        yield stream


def save_tensors(tensors: Mapping[str, Any], file: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors.torch.save_file into a new file, with the permissions of any new file. Equal values give equal bytes.

    safetensors 0.8 lets only the owner read what it writes (safetensors/safetensors, issue 782), and orders metadata at
    random.
    """
    from safetensors.torch import save_file

    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata)
    if file.stat().st_mode != mode:
        file.chmod(mode)
    if metadata:
        with file.open("r+b") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size)) | {"__metadata__": dict(sorted(metadata.items()))}
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
            assert len(text) == size, "the order of metadata changed the length of the header"
            stream.seek(8)
            stream.write(text)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """A new folder that replaces the folder `path` when the block ends without an exception; else nothing changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as tmp:
        tmp.mkdir()
        yield tmp


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path at which the block creates a file or folder, which then replaces `path`.

    If the block raises, what it created is deleted and `path` stays as it was. Raises OSError if the disk fails.
    """
    tmp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield tmp
        replace_durably(tmp, path)
    finally:
        remove(tmp)  # after an error; also a second hard link to what `path` is already


@contextmanager
def atomic_files(target: Path) -> Iterator[Path]:
    """A new folder whose files move to the folder of `target` when the block ends without an exception.

    Each replaces the file or folder of its name; `target` moves last, so that it is there only if all others are.
    """
    tmp = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")  # other ranks may save the same
    tmp.mkdir(parents=True)
    try:
        yield tmp
        for path in sorted(tmp.iterdir(), key=lambda path: path.name == target.name):
            replace_durably(path, target.with_name(path.name))
    finally:
        remove(tmp)


def check_output_file(path: Path, flag: str) -> None:
    """Raises FileError where no file can be written, before the work whose results it is for. flag: that names it."""
    if path.is_dir():
        raise FileError(f"{flag} {path}: is a folder; name a file in it")
    if not path.resolve().parent.is_dir():
        raise FileError(f"{flag} {path}: its folder does not exist")


def is_same_file(a: str | Path, b: str | Path) -> bool:
    """Whether both exist and are one file, also by links."""
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def replace_durably(tmp: Path, path: Path) -> None:
    """fsync a file or folder, rename it to `path`, and fsync the folder of `path`.

    A link at `path` is replaced, not followed.
    """
    for path_in_tmp in (tmp, *tmp.rglob("*")):  # a file has none in it
        _fsync(path_in_tmp)
    while True:
        if tmp.is_dir() and os.path.lexists(path):  # a rename does not replace a folder with files
            aside = tmp_path(path.with_name(f"{path.name}.{secrets.token_hex(4)}"))
            with suppress(FileNotFoundError):
                os.replace(path, aside)
            remove(aside)
        try:
            os.replace(tmp, path)
            break
        except OSError as error:  # another process has put a folder there meanwhile
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file, a folder with its content, or a link (not its target), if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def remove_empty(*folders: Path) -> None:
    """Remove each of the folders that is empty, in this order."""
    for folder in folders:
        with suppress(OSError):  # it is not empty, or not there
            folder.rmdir()


def remove_unfinished(folder: Path) -> None:
    """Delete the temporary files and folders that a killed process left in `folder`, if that exists."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if TMP_NAME.fullmatch(path.name):
            remove(path)


@contextmanager
def hold_lock(file: Path, error: UserError) -> Iterator[None]:
    """Hold a lock file during the block. Raises `error` if another process holds it, FileError if the disk has no
    locks."""
    from filelock import FileLock, Timeout  # here, because scripts/fetch_weights.py runs without packages

    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise error from None
    except OSError as reason:
        raise FileError(f"{file}: cannot be locked: {reason.strerror}") from reason
    try:
        yield
    finally:
        lock.release()


RUN_SUBFOLDERS = (".hydra", "checkpoints", "exports", "tensorboard")  # that a training run writes


def check_run_folder(folder: Path) -> None:
    """Raises FileError if a run's folder or one of RUN_SUBFOLDERS holds a symbolic link, a pipe or a device.

    A run must not write outside its folder. The folder itself may be a link.
    """
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root, name)
            if path.is_symlink():
                raise FileError(
                    f"{path}: is a symbolic link to {os.readlink(path)}, and a run writes only inside its own folder; "
                    f"delete it ({folder} itself may be a link)"
                )
            if not path.is_file() and not path.is_dir():
                raise FileError(f"{path}: is a pipe or a device; delete it")
        if Path(root) == Path(folder):
            folders[:] = [name for name in folders if name in RUN_SUBFOLDERS]


def open_nofollow(path: Path, mode: str = "a") -> IO[Any]:
    """open(path, mode), but raises FileError if the last part of the path is a symbolic link."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    if path.is_symlink():
        raise FileError(f"{path}: is a symbolic link to {os.readlink(path)}; delete it")
    return open(path, mode, opener=opener)
