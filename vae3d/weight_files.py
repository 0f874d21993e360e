"""Tensors of weight files: safetensors, and what torch.save writes today and wrote before torch 1.6.

The kind is recognised by content, never by name. A pickle is read as data by the interpreter below: it builds
dicts, lists and tuples and notes which bytes of the file each tensor is; no class of the file is imported and nothing
of it is called. So checkpoints that hold Lightning callbacks, numpy scalars, Namespace or OmegaConf objects open, and
those objects are skipped. Tensors stay in the file until they are read.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vae3d.io import FileError, parse_json

INDEX = ".index"  # in the name of an index of weights in several files: *.safetensors.index.json, *.bin.index.fp16.json
MAX_INDEX_BYTES = 2**26
MAX_INDEX_FILES = 4096  # that an index names
MAX_PICKLE_BYTES = 2**26  # tensors lie outside of the pickle
MAX_OPERATIONS = 1_000_000  # of a pickle: about a second; a tensor takes about 40
MAX_TENSORS = 2**16  # of a safetensors file
MAX_SHARED = 8  # elements of all tensors together, per byte of the file: tensors may share their bytes
MAX_EXPANDED = 2**16  # elements of a tensor that repeats those of a smaller storage
MAX_NAME = 4096  # characters of a tensor's name; a pickle of some MB can spell names of TB
MAX_WORD = 256  # characters of the name of a class, a module or a storage
MAX_SIDES = 64  # of a tensor
DOWNLOAD = "download it again"

# What a file is that holds no weights, by its first bytes, and what to do.
OTHER_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull` in its repository"),
    (b"<", "a web page", "download the file itself, whose link on Hugging Face has /resolve/ and not /blob/"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"\xfd7zXZ", "an xz archive", "unpack it"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it"),
    (b"BZh", "a bzip2 archive", "unpack it"),
    (b"GGUF", "a GGUF file of quantised weights", "use the .safetensors or .pth that it was made from"),
    (b"\x89HDF", "an HDF5 file", "use the weights for PyTorch"),
    (b"\x93NUMPY", "a numpy array", "save the tensors as .safetensors"),
    (b"\0" * 16, "a file of zero bytes, as an interrupted download leaves it", DOWNLOAD),
)
LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number that torch.save wrote first before 1.6

DTYPES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
        "Untyped": torch.uint8, "_Untyped": torch.uint8,
    }.items()
}  # fmt: skip
DTYPES |= {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32",
        "uint64", "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
        "float8_e5m2fnuz",
    )
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor that is still in its file. read: copies it to the CPU, as it was saved; raises FileError if its bytes
    are damaged."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file on the CPU, by name, without running anything of it; see open_tensors. Raises FileError."""
    return {name: tensor.read() for name, tensor in open_tensors(path).items()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """What the header of a safetensors file holds beside its tensors; empty for files of other kinds."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def open_tensors(path: str | Path, tree: Any = None) -> dict[str, LazyTensor]:
    """All tensors of a weight file, or of all files of an index, by name.

    Names of nested dicts and lists are joined by dots: `state_dict.encoder.weight`, `0.encoder.weight`. A container
    that occurs again, also inside itself, counts once. tree: of this file, if it is open already.
    Raises FileError if the file is missing, damaged or something else, and says what it is.
    """
    return _flat(open_tree(path) if tree is None else tree, Path(path))


def open_tree(path: str | Path) -> Any:
    """The nested containers of a weight file, with LazyTensors in place of its tensors. Raises FileError."""
    path = Path(path)
    try:
        with path.open("rb") as stream:
            start = stream.read(4096)
        return _open(path, start, path.stat().st_size)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error


def _open(path: Path, start: bytes, size: int) -> Any:
    """Nested containers with LazyTensors among other things."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not size:
        raise FileError(f"{path}: is empty; {DOWNLOAD}")
    if start[8:9] == b"{":
        return _open_safetensors(path, start, size)
    if start.startswith(b"PK\x03\x04"):
        return _bounded(path, _open_zip(path, size), size)
    if LEGACY in start[:32]:  # behind the protocol and, since protocol 4, a frame
        return _bounded(path, _open_legacy(path, size), size)
    for magic, kind, hint in OTHER_KINDS:
        if text.startswith(magic) or start.startswith(magic):
            raise FileError(f"{path}: is {kind}; {hint}")
    if text.startswith((b"{", b"[")):
        return _open_index(path)
    if start[257:262] == b"ustar":
        raise FileError(f"{path}: is a tar archive; unpack it")
    if start.startswith(b"\x80"):
        raise FileError(f"{path}: is a pickle that torch.save did not write; save the state dict by torch.save")
    raise FileError(f"{path}: is no weight file (safetensors, or of torch.save): it begins with {start[:16]!r}")


def _bounded(path: Path, tree: Any, size: int) -> Any:
    """The same tree. Raises FileError if a small file repeats its bytes to tensors that fill the memory."""
    elements = sum(math.prod(tensor.shape) for tensor in _flat(tree, path).values())
    if elements > MAX_SHARED * max(size, 2**20):
        raise FileError(f"{path}: has {size:,} bytes, but its tensors {elements:,} elements; save copies of them")
    return tree


def _open_safetensors(path: Path, start: bytes, size: int) -> dict[str, LazyTensor]:
    end = 8 + int.from_bytes(start[:8], "little")
    if end > size:
        raise FileError(
            f"{path}: is a safetensors file cut short: its header has {end:,} bytes, it {size:,}; {DOWNLOAD}"
        )
    try:
        file = safe_open(path, "pt")
        if len(file.keys()) > MAX_TENSORS:
            raise FileError(f"{path}: has {len(file.keys()):,} tensors; the maximum is {MAX_TENSORS:,}")
        return {name: _of_safetensors(path, file, name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except MemoryError as error:
        raise FileError(f"{path}: has {size:,} bytes, for which the memory does not suffice") from error
    except SafetensorError as error:
        raise FileError(f"{path}: is a damaged or incomplete safetensors file ({error}); {DOWNLOAD}") from error


def _of_safetensors(path: Path, file: Any, name: str) -> LazyTensor:
    def read() -> Tensor:
        try:
            return file.get_tensor(name)
        except SafetensorError as error:
            raise FileError(f"{path}: {name} cannot be read ({error})") from error

    return LazyTensor(tuple(file.get_slice(name).get_shape()), read)


def _open_index(path: Path) -> dict[str, LazyTensor]:
    """The tensors of the files that an index names, which must lie beside it."""
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise FileError(f"{path}: is a JSON text of more than {MAX_INDEX_BYTES} bytes, not weights")
    index = parse_json(path.read_bytes().decode("utf-8-sig", "replace"), str(path))
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise FileError(f"{path}: is a JSON text, not weights, and no index of weight files (it has no weight_map)")
    names = sorted(set(places.values()))
    if len(names) > MAX_INDEX_FILES:
        raise FileError(f"{path}: names {len(names)} files; the maximum is {MAX_INDEX_FILES}")
    files = {name: _shard(path, name) for name in names}
    if missing := [name for name, file in files.items() if not file.is_file()]:
        raise FileError(f"{path}: of its {len(files)} files {', '.join(missing[:6])} are not there")
    tensors: dict[str, LazyTensor] = {}
    for name, file in files.items():
        with file.open("rb") as stream:
            start = stream.read(4096)
        if start.lstrip().startswith(b"{"):
            raise FileError(f"{path}: names {name}, which is a JSON text itself and not weights")
        shard = _flat(_open(file, start, file.stat().st_size), file)
        if twice := tensors.keys() & shard.keys():
            raise FileError(f"{path}: {min(twice)} is in two of its files")
        tensors |= shard
    if lost := [key for key in places if key not in tensors]:
        raise FileError(f"{path}: {len(lost)} tensors are in none of its files: {', '.join(lost[:6])}")
    return tensors


def _shard(index: Path, name: str) -> Path:
    """A file of an index: beside it and, where that is a link, where the index itself really lies, as in the
    Hugging Face cache."""
    plain = name and name.isprintable() and Path(name).name == name and "\\" not in name
    file = index.with_name(name) if plain else None
    if file is None or name in (".", "..", index.name):
        raise FileError(f"{index}: names the file {name!r}; only names of other files in the same folder are allowed")
    if file.is_symlink() and not file.exists():
        raise FileError(f"{index}: {name} is a link to nothing; copy the file here")
    if file.resolve().parent not in (index.parent.resolve(), index.resolve().parent):
        raise FileError(f"{index}: {name} is a link that leaves the folder, to {file.resolve()}; copy the file here")
    return file


def _flat(tree: Any, path: Path) -> dict[str, LazyTensor]:
    """All tensors of nested containers, by dotted names."""
    found: dict[str, LazyTensor] = {}
    seen: set[int] = set()
    pending: list[tuple[_Place, Any]] = [(None, tree)]
    while pending:
        place, node = pending.pop()
        if isinstance(node, LazyTensor):
            if (name := _name(place, path)) in found:
                raise FileError(f"{path}: two tensors are called {name}")
            found[name] = node
        elif isinstance(node, (dict, list, tuple)) and id(node) not in seen:
            seen.add(id(node))  # of a checkpoint, whose containers all live as long as this loop
            items = node.items() if isinstance(node, dict) else enumerate(node)
            pending += [((place, key), inner) for key, inner in reversed([*items])]
    return found


_Place = tuple["_Place", Any] | None  # of a node: that of its container, and its key there


def _name(place: _Place, path: Path) -> str:
    """The keys that lead to a node, joined. Raises FileError if that is long, before it is spelled out."""
    words: list[str] = []
    left = MAX_NAME
    while place is not None:
        place, key = place
        words.append(str(key))
        left -= len(words[-1]) + 1
        if left < 0:
            raise FileError(f"{path}: the name of a tensor has more than {MAX_NAME} characters")
    return ".".join(reversed(words))


# torch.save


@dataclass(frozen=True)
class _Storage:
    """What a pickle says of a storage: its key, its type, and its number of elements (of bytes, if untyped)."""

    key: str
    dtype: torch.dtype
    numel: int


class _Name(str):
    """`module.name` of a class or function, which is never looked up."""


class _Inert:
    """Stands for every object that is neither a tensor nor a plain container or value."""


INERT = _Inert()
Place = Callable[[_Storage], Callable[[], Tensor]]  # checks a storage against the file; what it gives reads the bytes


def _open_zip(path: Path, size: int) -> Any:
    """What torch.save writes since 1.6: a zip archive, not compressed, of data.pkl and a file for every storage."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, OverflowError) as error:
        raise FileError(f"{path}: is a damaged or incomplete file of torch.save ({error}); {DOWNLOAD}") from error
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        held = ", ".join([*entries][:3])
        raise FileError(f"{path}: is a zip archive of other things ({held}), not of torch.save; unpack it")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise FileError(f"{path}: is a TorchScript program, not a state dict; save the model's state_dict()")
    if f"{root}byteorder" in entries and _entry(path, entries[f"{root}byteorder"], size).read() != b"little":
        raise FileError(f"{path}: was saved on a big-endian machine; save it again on another")

    @lru_cache(maxsize=1)  # tensors that share a storage follow each other
    def load(name: str) -> Tensor:
        return _entry(path, entries[name], size).tensor()

    def place(storage: _Storage) -> Callable[[], Tensor]:
        name = f"{root}data/{storage.key}"
        if name not in entries or entries[name].file_size < storage.numel * storage.dtype.itemsize:
            raise ValueError(f"storage {storage.key!r} is not in it, or too short")
        return partial(load, name)

    content = _entry(path, entries[pickles[0]], size)
    if content.size > MAX_PICKLE_BYTES:
        raise FileError(f"{path}: its pickle has {content.size:,} bytes; save the state dict alone")
    return _unpickled(path, io.BytesIO(content.read()), place)


@dataclass(frozen=True)
class _Bytes:
    """Bytes of a file, and their CRC-32 if it is known."""

    path: Path
    start: int
    size: int
    crc: int | None

    def read(self) -> bytes:
        return self.tensor().numpy().tobytes()

    def tensor(self) -> Tensor:
        """As uint8. Raises FileError if they are not what was written."""
        if not self.size:
            return torch.empty(0, dtype=torch.uint8)  # of numpy's, torch takes no view as another type
        try:
            content = torch.from_numpy(np.empty(self.size, np.uint8))  # torch raises no MemoryError
        except MemoryError as error:
            raise FileError(f"{self.path}: has a part of {self.size:,} bytes, more than the memory holds") from error
        with self.path.open("rb") as stream:
            stream.seek(self.start)
            count = stream.readinto(content.numpy())
        if count != self.size or (self.crc is not None and zlib.crc32(content.numpy()) != self.crc):
            raise FileError(f"{self.path}: is damaged (bytes {self.start} to {self.start + self.size}); {DOWNLOAD}")
        return content


def _entry(path: Path, entry: zipfile.ZipInfo, size: int) -> _Bytes:
    """Where a file of an archive lies. Raises FileError if it is compressed or not inside of the archive."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
        raise FileError(f"{path}: {entry.filename} is compressed, which torch.save never does; save it again by it")
    with path.open("rb") as stream:
        stream.seek(entry.header_offset)
        header = stream.read(30)
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise FileError(f"{path}: is damaged: {entry.filename} has no header; {DOWNLOAD}")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + entry.file_size > size:
        raise FileError(f"{path}: is cut short: {entry.filename} ends at byte {start + entry.file_size}; {DOWNLOAD}")
    return _Bytes(path, start, entry.file_size, entry.CRC or None)  # 0: set_crc32_options(False)


def _open_legacy(path: Path, size: int) -> Any:
    """What torch.save wrote before 1.6: five pickles, then every storage behind its number of elements."""
    with path.open("rb") as stream:
        content = io.BytesIO(stream.read(MAX_PICKLE_BYTES))
    used: dict[str, _Storage] = {}
    places: dict[str, _Bytes] = {}

    @lru_cache(maxsize=1)
    def load(key: str) -> Tensor:
        return places[key].tensor()

    def place(storage: _Storage) -> Callable[[], Tensor]:
        if used.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {storage.key!r} has two types or sizes")
        return partial(load, storage.key)

    for _ in range(3):  # the magic number, the version, the machine
        _unpickled(path, content, place)
    tree, keys = _unpickled(path, content, place), _unpickled(path, content, place)
    if not isinstance(keys, list) or not used.keys() <= {key for key in keys if isinstance(key, str)}:
        raise FileError(f"{path}: is damaged: its list of storages is not complete; {DOWNLOAD}")
    position = content.tell()
    with path.open("rb") as stream:
        for key in keys:
            stream.seek(position)
            storage, head = used.get(key) if isinstance(key, str) else None, stream.read(8)
            if storage is None or int.from_bytes(head, "little") != storage.numel:
                raise FileError(f"{path}: is damaged or cut short at byte {position}; {DOWNLOAD}")
            places[key] = _Bytes(path, position + 8, storage.numel * storage.dtype.itemsize, None)
            position += 8 + places[key].size
    if position > size:
        raise FileError(f"{path}: is cut short: it has {size:,} bytes of {position:,}; {DOWNLOAD}")
    return tree


def _unpickled(path: Path, stream: io.BytesIO, place: Place) -> Any:
    try:
        return _interpret(stream, place)
    except FileError:
        raise
    except (LookupError, ValueError, OverflowError, TypeError) as error:
        # LookupError: an empty stack or memo; ValueError: pickletools'; TypeError: an operand of another kind.
        raise FileError(f"{path}: is damaged, or not written by torch.save ({error}); {DOWNLOAD}") from error


def _interpret(stream: io.BytesIO, place: Place) -> Any:
    """The value of a pickle, with _Inert in place of every object of a class. Executes nothing: see
    https://github.com/python/cpython/blob/main/Lib/pickletools.py for what each operation means.

    Raises LookupError, ValueError, OverflowError or TypeError if it is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_OPERATIONS:
            raise ValueError(f"its pickle has more than {MAX_OPERATIONS} operations")
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "POP":
                since_mark() if marks and marks[-1] == len(stack) else stack.pop()
            case "POP_MARK":
                since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[operation.name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "LIST" | "FROZENSET":
                stack.append(since_mark())
            case "DICT":
                stack.append(_fill({}, since_mark()))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple([stack.pop() for _ in range(int(operation.name[-1]))][::-1]))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [stack.pop()] if operation.name == "APPEND" else since_mark()
                if isinstance(stack[-1], list):
                    stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(), stack.pop()][::-1] if operation.name == "SETITEM" else since_mark()
                _fill(stack[-1], items)
            case "GLOBAL":
                stack.append(_Name(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_Name(f"{module}.{name}") if _is_word(module) and _is_word(name) else INERT)
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_called(function, arguments, place))
            case "NEWOBJ_EX":
                del stack[-3:]
                stack.append(INERT)
            case "INST" | "OBJ":
                since_mark()
                stack.append(INERT)
            case "BUILD":
                stack.pop()
            case "PERSID" | "BINPERSID":
                stack.append(_storage(stack.pop()) if operation.name == "BINPERSID" else INERT)
            case "EXT1" | "EXT2" | "EXT4" | "NEXT_BUFFER":
                stack.append(INERT)
            case "READONLY_BUFFER":
                pass
            case _:  # numbers, text and bytes
                stack.append(argument)
    raise ValueError("its pickle has no end")


def _fill(target: Any, items: list[Any]) -> Any:
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str) or (isinstance(key, int) and key.bit_length() <= 64):
                target[key] = value
    return target


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_WORD


def _storage(identity: Any) -> Any:
    """Of ("storage", type, key, device, number of elements) with None behind it in files of before 1.6."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        return INERT
    _, kind, key, _, numel, *view = identity
    if any(view):
        raise ValueError("it holds views of storages, of torch before 0.4; save it again by a newer torch")
    dtype = DTYPES.get(kind.rpartition(".")[2]) if isinstance(kind, _Name) else None
    if dtype is None:  # quantised numbers
        return INERT
    if not _is_word(key) or type(numel) is not int or not 0 <= numel < 2**63:
        raise ValueError("a storage has no name or no number of elements")
    return _Storage(key, dtype, numel)


def _called(function: Any, arguments: Any, place: Place) -> Any:
    """What of a call matters: a tensor or a dict.

    The time it takes must not depend on the arguments' length: a pickle may give the same long list to many calls.
    """
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        return INERT
    match function:
        case "collections.OrderedDict" | "collections.defaultdict":
            if not arguments or not isinstance(arguments[0], list):
                return {}
            pairs, arguments[0][:] = [*arguments[0]], []  # of Python 2; emptied, so that no other call takes them
            sound = (pair for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2)
            return _fill({}, [item for pair in sound for item in pair])
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
            return arguments[0]
        case "torch._tensor._rebuild_from_type_v2":
            return _called(arguments[0], arguments[2], place) if arguments[0] != function else INERT
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor_v3":
            return _tensor(arguments, place, typed=not function.endswith("v3"))
    return INERT


def _tensor(arguments: tuple[Any, ...], place: Place, *, typed: bool) -> Any:
    storage, offset, size, stride = arguments[:4]
    if not isinstance(storage, _Storage):
        return INERT
    kind = None if typed else arguments[6]
    dtype = storage.dtype if typed else DTYPES.get(kind.rpartition(".")[2]) if isinstance(kind, _Name) else None
    if dtype is None:
        return INERT
    tuples = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= MAX_SIDES
    if not tuples or not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise ValueError("a tensor has no valid size, stride and offset")
    held = storage.numel * storage.dtype.itemsize // dtype.itemsize
    numel = math.prod(size)
    end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if numel else 0
    if end > held or numel > max(held, MAX_EXPANDED) or (not numel and max(size) > MAX_EXPANDED):
        raise ValueError(f"a tensor of size {size} and stride {stride} does not fit its storage of {held} elements")
    content = place(storage)

    def read() -> Tensor:
        whole = content()[: held * dtype.itemsize].view(dtype)
        tensor = whole.as_strided(size, stride, offset)
        return tensor if numel == held else tensor.clone()

    return LazyTensor(tuple(size), read)
