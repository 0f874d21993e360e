"""Read the tensors of weight files: safetensors, and torch.save's formats of today and before torch 1.6.

Files may be hostile. This is why reading them is safe:
- The format is recognised by content, not by name.
- A pickle is interpreted here as data. The interpreter builds dicts, lists, tuples and plain values, and notes which
  bytes of the file each tensor is. It imports no class and calls no function of the file. Other objects (Lightning
  callbacks, numpy scalars, Namespace, OmegaConf) become a placeholder, so checkpoints with them open too.
- Every tensor must lie within its storage, and every storage within the file, before anything is read.
- Limits on operations, tensors, names and sizes bound the time and memory that a small file can take.

Tensors stay in the file until they are read, and those of torch.save and safetensors are then pages of the file in
memory, which the kernel may drop, not a copy: copy them into a module at once, since a file that is cut short meanwhile
would end the process. A file that is replaced by another of its name does no harm.

torch and safetensors are imported only where they are needed, because scripts/fetch_weights.py runs without packages.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae3d.io import FileError, parse_json
from vae3d.text import plural

if TYPE_CHECKING:
    from torch import Tensor

MAX_INDEX_BYTES = 2**26
MAX_INDEX_FILES = 4096  # that an index names
MAX_PICKLE_BYTES = 2**26  # tensors are outside the pickle
MAX_OPERATIONS = 1_000_000  # of a pickle, about a second, and one more per BYTES_PER_OPERATION of its file:
BYTES_PER_OPERATION = 4  # a tensor takes about 40 operations, and at least 200 bytes of the file
MAX_TENSORS = 2**16  # of a safetensors file
MAX_SHARED = 8  # elements of all tensors per byte of the file, since tensors may share bytes
MAX_EXPANDED = 2**16  # elements of a tensor that repeats those of a smaller storage
MAX_NAME = 4096  # characters of a tensor's name; nested keys in a pickle of some MB can join to names of TB
MAX_NAMES = 2**24  # characters of the names of all tensors
MAX_NESTED = 64  # containers in each other, where a tree is read whole
MAX_IDENTIFIER = 256  # characters of the name of a class, module or storage
MAX_DIMS = 64  # of a tensor
DOWNLOAD = "download it again"
FP32 = 4  # bytes
ALIGNMENT = 16  # bytes, of the largest element of a tensor

# Files without weights: first bytes, description, what to do.
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

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4,
    "uint16": 2, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16,
}  # fmt: skip
STORAGES = {  # class in a pickle -> dtype; quantised ones are left out
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8", "_UntypedStorage": "uint8",
}  # fmt: skip


Buffer = bytearray | memoryview


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor that is still in its file. read() loads it to the CPU; raises FileError if its bytes are damaged."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class SavedTensor:
    """A LazyTensor in a file of torch.save. stride, offset: in elements. storage: reads the bytes that it is in."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: str
    storage: Callable[[], Buffer]

    def read(self) -> Tensor:
        import torch

        content, dtype = self.storage(), getattr(torch, self.dtype)
        count = len(content) // dtype.itemsize
        # torch.frombuffer refuses an empty buffer.
        elements = torch.frombuffer(content, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
        tensor = elements.as_strided(self.shape, self.stride, self.offset)
        # A copy of a part, so that the rest of the storage can be freed.
        return tensor if tensor.numel() == count else tensor.clone()

    @property
    def is_contiguous(self) -> bool:
        steps = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        return all(n == 1 or a == b for n, a, b in zip(self.shape, self.stride, steps, strict=True))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file on the CPU, by name; see open_tensors. Raises FileError."""
    return {name: tensor.read() for name, tensor in open_tensors(path).items()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file; {} for other files."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def open_tensors(path: str | Path) -> dict[str, LazyTensor | SavedTensor]:
    """All tensors of a weight file, or of all files of an index, by name; see named_tensors.

    Raises FileError, naming the kind of the file, if it is missing, damaged or no weight file.
    """
    return named_tensors(open_tree(path), path)


def open_tree(path: str | Path) -> Any:
    """The nested containers of a weight file, with LazyTensors in place of its tensors. Raises FileError."""
    try:
        return _open(Path(path), _open_index)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_tree(path: str | Path, *, lazy: bool) -> Any:
    """The nested dicts, lists, tuples and plain values of a weight file, with its tensors on the CPU.

    A container that occurs several times is copied as often, so that whoever walks through the result meets no more
    than was counted here. lazy: leave the tensors in the file, as LazyTensors or SavedTensors.
    Raises FileError, also for a file that holds any other object.
    """
    tree = open_tree(path)
    remaining = _max_operations(os.path.getsize(path))
    tensors: dict[int, Tensor] = {}  # each is read once

    def read(node: Any, keys: _KeyPath, depth: int) -> Any:
        nonlocal remaining
        remaining -= 1
        if depth > MAX_NESTED or remaining < 0:
            raise FileError(f"{path}: is nested more than {MAX_NESTED} levels deep, or without end")
        if isinstance(node, LazyTensor | SavedTensor):
            if lazy:
                return node
            if id(node) not in tensors:
                tensors[id(node)] = node.read()
            return tensors[id(node)]
        if isinstance(node, dict):
            return {key: read(inner, (keys, key), depth + 1) for key, inner in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(read(inner, (keys, key), depth + 1) for key, inner in enumerate(node))
        if node is OPAQUE or isinstance(node, _Global | _Storage):
            raise FileError(f"{path}: {_join_keys(keys, path)} is neither a tensor nor a plain value")
        return node

    return read(tree, None, 0)


def _open(path: Path, open_json: Callable[[Path], Any]) -> Any:
    with path.open("rb") as stream:
        start = stream.read(4096)
    size = path.stat().st_size
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not size:
        raise FileError(f"{path}: is empty; {DOWNLOAD}")
    if start[8:9] == b"{":
        return _open_safetensors(path, start, size)
    if start.startswith(b"PK\x03\x04"):
        return _check_size(path, _open_zip(path, size), size)
    if LEGACY in start[:32]:  # after the protocol and, since protocol 4, a frame
        return _check_size(path, _open_legacy(path, size), size)
    for magic, kind, hint in OTHER_KINDS:
        if text.startswith(magic) or start.startswith(magic):
            raise FileError(f"{path}: is {kind}; {hint}")
    if text.startswith((b"{", b"[")):
        return open_json(path)
    if start[257:262] == b"ustar":
        raise FileError(f"{path}: is a tar archive; unpack it")
    if start.startswith(b"\x80"):
        raise FileError(f"{path}: is a pickle that torch.save did not write; save the state dict by torch.save")
    raise FileError(f"{path}: is no weight file (safetensors or torch.save's): it begins with {start[:16]!r}")


def _check_size(path: Path, tree: Any, size: int) -> Any:
    """Return the tree. Raises FileError if tensors that share bytes would make a small file fill the memory."""
    elements = sum(math.prod(tensor.shape) for tensor in named_tensors(tree, path).values())
    if elements > MAX_SHARED * max(size, 2**20):
        raise FileError(f"{path}: has {size:,} bytes, but its tensors have {elements:,} elements; save copies of them")
    return tree


def _open_safetensors(path: Path, start: bytes, size: int) -> dict[str, LazyTensor]:
    from safetensors import SafetensorError, safe_open

    end = 8 + int.from_bytes(start[:8], "little")
    if end > size:
        raise FileError(
            f"{path}: is a safetensors file cut short: it has {size:,} bytes, its header alone {end:,}; {DOWNLOAD}"
        )

    def read(name: str) -> Tensor:
        try:
            tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise FileError(f"{path}: {name} cannot be read ({error})") from error
        except AttributeError as error:  # as of torch.float4_e2m1fn_x2 before torch 2.8
            raise FileError(f"{path}: {name} is of a type that needs a newer torch ({error})") from error
        if tensor.shape != shapes[name]:
            raise FileError(f"{path}: {name} is {tensor.dtype}, which packs numbers; save it in another type")
        return tensor

    try:
        file = safe_open(path, "pt")
        if len(file.keys()) > MAX_TENSORS:
            raise FileError(f"{path}: has {len(file.keys()):,} tensors; the maximum is {MAX_TENSORS:,}")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except MemoryError as error:
        raise FileError(f"{path}: has {size:,} bytes, more than the free memory") from error
    except SafetensorError as error:
        raise FileError(f"{path}: is a damaged or incomplete safetensors file ({error}); {DOWNLOAD}") from error
    for name, shape in shapes.items():
        if len(shape) > MAX_DIMS or any(n >= 2**63 for n in shape):
            raise FileError(f"{path}: {name[:MAX_NAME]} has a shape that no tensor has; {DOWNLOAD}")
    return {name: LazyTensor(shape, partial(read, name)) for name, shape in shapes.items()}


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> file name, of an index of weight files. Raises FileError."""
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise FileError(f"{path}: is a JSON text of more than {MAX_INDEX_BYTES} bytes, not weights")
    index = parse_json(path.read_bytes().decode("utf-8-sig", "replace"), str(path))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise FileError(f"{path}: is a JSON text, not weights, and no index of weight files (it has no weight_map)")
    return weight_map


def _open_index(path: Path) -> dict[str, LazyTensor | SavedTensor]:
    """The tensors of all files that an index names. These must be in its folder."""
    weight_map = read_index(path)
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_INDEX_FILES:
        raise FileError(f"{path}: names {len(names)} files; the maximum is {MAX_INDEX_FILES}")
    files = {name: _shard(path, name) for name in names}
    if missing := [name for name, file in files.items() if not file.is_file()]:
        raise FileError(f"{path}: {len(missing)} of its {len(files)} files are missing: {', '.join(missing[:6])}")
    tensors: dict[str, LazyTensor | SavedTensor] = {}
    for file in files.values():
        shard = named_tensors(_open(file, _reject_json), file)
        if duplicates := tensors.keys() & shard.keys():
            raise FileError(f"{path}: {min(duplicates)} is in two of its files")
        tensors |= shard
    if missing := [key for key in weight_map if key not in tensors]:
        raise FileError(f"{path}: {plural(len(missing), 'tensor')} in none of its files: {', '.join(missing[:6])}")
    return tensors


def _reject_json(path: Path) -> None:
    raise FileError(f"{path}: is a JSON text and not weights, but an index names it")


def _shard(index: Path, name: str) -> Path:
    """The path of a file that an index names. It must be in the folder of the index.

    Links are allowed as in the Hugging Face cache: both may link into one other folder.
    """
    plain = name and name.isprintable() and Path(name).name == name and "\\" not in name
    file = index.with_name(name) if plain else None
    if file is None or name in (".", "..", index.name):
        raise FileError(f"{index}: names the file {name!r}; only names of other files in the same folder are allowed")
    if file.is_symlink() and not file.exists():
        raise FileError(f"{index}: {name} is a link to nothing; copy the file here")
    if file.resolve().parent not in (index.parent.resolve(), index.resolve().parent):
        raise FileError(f"{index}: {name} is a link out of the folder, to {file.resolve()}; copy the file here")
    return file


def named_tensors(tree: Any, path: str | Path) -> dict[str, LazyTensor | SavedTensor]:
    """The tensors in nested containers. Keys are joined by dots: `state_dict.encoder.weight`, `0.encoder.weight`.

    A container that occurs several times, also inside itself, counts once. path: for errors.
    """
    found: dict[str, LazyTensor | SavedTensor] = {}
    length = 0
    seen: set[int] = set()
    pending: list[tuple[_KeyPath, Any]] = [(None, tree)]
    while pending:
        keys, node = pending.pop()
        if isinstance(node, LazyTensor | SavedTensor):
            if (name := _join_keys(keys, path)) in found:
                raise FileError(f"{path}: two tensors are called {name}")
            if (length := length + len(name)) > MAX_NAMES:
                raise FileError(f"{path}: the names of its tensors have more than {MAX_NAMES:,} characters")
            found[name] = node
        elif isinstance(node, (dict, list, tuple)) and id(node) not in seen:
            seen.add(id(node))  # unique, because the tree keeps all containers alive
            items = node.items() if isinstance(node, dict) else enumerate(node)
            pending += [((keys, key), inner) for key, inner in reversed([*items])]
    return found


_KeyPath = tuple["_KeyPath", Any] | None  # (key path of the container, key in it)


def _join_keys(keys: _KeyPath, path: str | Path) -> str:
    """The dotted name of a node. Raises FileError if it is too long, without building it."""
    words: list[str] = []
    length = 0
    while keys is not None:
        keys, key = keys
        words.append(str(key))
        length += len(words[-1]) + 1
        if length > MAX_NAME:
            raise FileError(f"{path}: the name of a tensor has more than {MAX_NAME} characters")
    return ".".join(reversed(words))


# ---- torch.save


@dataclass(frozen=True)
class _Storage:
    """A storage as a pickle describes it. numel: number of elements; of bytes for an untyped storage."""

    key: str
    dtype: str
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]


class _Global(str):
    """`module.name` of a class or function, as text."""


FOREIGN = ("DUP", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "PERSID", "READONLY_BUFFER")
OPAQUE = object()  # placeholder of every object that is neither a tensor nor a plain container or value
Locate = Callable[[_Storage], Callable[[], Buffer]]  # checks a storage against the file, returns what reads its bytes


def _open_zip(path: Path, size: int) -> Any:
    """torch.save's format since 1.6: an uncompressed zip archive of data.pkl and one file per storage."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, OverflowError) as error:
        raise FileError(f"{path}: is a damaged or incomplete file of torch.save ({error}); {DOWNLOAD}") from error
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        names = ", ".join([*entries][:3])
        raise FileError(f"{path}: is a zip archive of other files ({names}), not of torch.save; unpack it")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise FileError(f"{path}: is a TorchScript program, not a state dict; save the model's state_dict()")

    mapping = _map_file(path)

    @lru_cache(maxsize=1)  # for tensors that share a storage, which usually follow each other
    def read(name: str) -> Buffer:
        return _read_entry(path, entries[name], mapping)

    if f"{root}byteorder" in entries and read(f"{root}byteorder") != b"little":
        raise FileError(f"{path}: was saved on a big-endian machine; save it again on a little-endian one")

    def locate(storage: _Storage) -> Callable[[], Buffer]:
        name = f"{root}data/{storage.key}"
        if name not in entries or entries[name].file_size < storage.nbytes:
            raise ValueError(f"storage {storage.key!r} is missing or too short")
        return lambda: memoryview(read(name))[: storage.nbytes]

    if (count := entries[pickles[0]].file_size) > MAX_PICKLE_BYTES:
        raise FileError(f"{path}: its pickle has {count:,} bytes; save the state dict alone")
    return _unpickle(path, size, io.BytesIO(read(pickles[0])), locate)


def _map_file(path: Path) -> memoryview | None:
    """The bytes of a file, mapped into memory: writable, without changing the file. None where files cannot be."""
    try:
        with path.open("rb") as stream:
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
    except (OSError, ValueError):  # of a file system that cannot, or an empty file
        return None


def _read_entry(path: Path, entry: zipfile.ZipInfo, mapping: memoryview | None) -> Buffer:
    """The bytes of an archive's entry. Raises FileError if it is compressed, damaged or not within the archive.

    mapping: of the file, to which they belong if they are aligned, as torch.save writes them.
    """
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
        raise FileError(
            f"{path}: {entry.filename} is compressed, which torch.save never does; save it again with torch.save"
        )
    header = _read_bytes(path, entry.header_offset, 30)
    if not header.startswith(b"PK\x03\x04"):
        raise FileError(f"{path}: is damaged: {entry.filename} has no header; {DOWNLOAD}")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    if mapping is None or start % ALIGNMENT or not start <= start + entry.file_size <= len(mapping):
        return _read_bytes(path, start, entry.file_size, entry.CRC)
    content = mapping[start : start + entry.file_size]
    if entry.CRC and zlib.crc32(content) != entry.CRC:
        raise FileError(_damaged(path, start, entry.file_size))
    return content


def _read_bytes(path: Path, start: int, size: int, crc: int = 0) -> bytearray:
    """A range of bytes of a file. Raises FileError if it ends outside or its CRC-32 differs.

    crc: 0 if unknown, as under torch's set_crc32_options(False).
    """
    with path.open("rb") as stream:
        if not 0 <= start <= start + size <= os.fstat(stream.fileno()).st_size:
            raise FileError(f"{path}: is cut short: a part of it ends at byte {start + size:,}; {DOWNLOAD}")
        try:
            content = bytearray(size)
        except MemoryError as error:
            raise FileError(f"{path}: has a part of {size:,} bytes, more than the free memory") from error
        stream.seek(start)
        count = stream.readinto(content)
    if count != size or (crc and zlib.crc32(content) != crc):
        raise FileError(_damaged(path, start, size))
    return content


def _damaged(path: Path, start: int, size: int) -> str:
    return f"{path}: is damaged (bytes {start} to {start + size}); {DOWNLOAD}"


def _open_legacy(path: Path, size: int) -> Any:
    """torch.save's format before 1.6: five pickles, then every storage after its number of elements."""
    content = io.BytesIO(_read_bytes(path, 0, min(size, MAX_PICKLE_BYTES)))
    used: dict[str, _Storage] = {}
    starts: dict[str, int] = {}

    @lru_cache(maxsize=1)
    def read(key: str) -> bytearray:
        return _read_bytes(path, starts[key], used[key].nbytes)

    def locate(storage: _Storage) -> Callable[[], Buffer]:
        if used.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {storage.key!r} has two types or sizes")
        return partial(read, storage.key)

    # The magic number, the version, information about the machine, the object, the keys of its storages.
    _, _, _, tree, keys = (_unpickle(path, size, content, locate) for _ in range(5))
    if not isinstance(keys, list) or not used.keys() <= {key for key in keys if isinstance(key, str)}:
        raise FileError(f"{path}: is damaged: its list of storages is not complete; {DOWNLOAD}")
    position = content.tell()
    with path.open("rb") as stream:
        for key in keys:
            stream.seek(position)
            storage = used.get(key) if isinstance(key, str) else None
            if storage is None or int.from_bytes(stream.read(8), "little") != storage.numel:
                raise FileError(f"{path}: is damaged or cut short at byte {position}; {DOWNLOAD}")
            starts[key] = position + 8
            position += 8 + storage.nbytes
    if position > size:
        raise FileError(f"{path}: is cut short: it has {size:,} bytes of {position:,}; {DOWNLOAD}")
    return tree


def _unpickle(path: Path, size: int, stream: io.BytesIO, locate: Locate) -> Any:
    """See _interpret. size: of the file. Raises FileError."""
    try:
        return _interpret(stream, locate, _max_operations(size))
    except (LookupError, ValueError, OverflowError, TypeError) as error:
        # LookupError: empty stack or memo; ValueError: from pickletools; TypeError: operand of another type.
        raise FileError(f"{path}: is damaged, or not written by torch.save ({error}); {DOWNLOAD}") from error


def _max_operations(size: int) -> int:
    """Of a pickle in a file of so many bytes."""
    return MAX_OPERATIONS + size // BYTES_PER_OPERATION


def _interpret(stream: io.BytesIO, locate: Locate, max_operations: int) -> Any:
    """The value of a pickle: plain containers and values, LazyTensors, and OPAQUE in place of other objects.

    https://github.com/python/cpython/blob/main/Lib/pickletools.py explains the operations.
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
        if count > max_operations:
            raise ValueError(f"its pickle has more than {max_operations} operations")
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
                stack.append(_Global(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_Global(f"{module}.{name}") if _is_short_text(module) and _is_short_text(name) else OPAQUE)
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments, locate))
            case "NEWOBJ_EX":
                del stack[-3:]
                stack.append(OPAQUE)
            case "INST" | "OBJ":
                since_mark()
                stack.append(OPAQUE)
            case "BUILD":
                stack.pop()
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case name if name in FOREIGN:
                raise ValueError(f"torch.save does not write the operation {name}")
            case _:  # a number, text or bytes
                stack.append(argument)
    raise ValueError("its pickle has no end")


def _fill(target: Any, items: list[Any]) -> Any:
    """Put [key, value, key, value, ...] into a dict. Keys other than text and integers are dropped."""
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str) or (isinstance(key, int) and key.bit_length() <= 64):
                target[key] = value
    return target


def _is_short_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_IDENTIFIER


def _storage(persistent_id: Any) -> Any:
    """Parse ("storage", type, key, device, number of elements), with a sixth entry None in files before 1.6."""
    if not isinstance(persistent_id, tuple) or len(persistent_id) not in (5, 6) or persistent_id[0] != "storage":
        return OPAQUE
    _, kind, key, _, numel, *view = persistent_id
    if any(view):
        raise ValueError("it holds views of storages, from torch before 0.4; save it again with a newer torch")
    dtype = STORAGES.get(kind.rpartition(".")[2]) if isinstance(kind, _Global) else None
    if dtype is None:
        return OPAQUE
    if not _is_short_text(key) or type(numel) is not int or not 0 <= numel < 2**63:
        raise ValueError("a storage has no valid key or number of elements")
    return _Storage(key, dtype, numel)


def _call(function: Any, arguments: Any, locate: Locate) -> Any:
    """The result of a call in a pickle if that is a tensor or a dict; else OPAQUE.

    Takes constant time, whatever the arguments' length: a pickle may pass the same long list to many calls.
    """
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        return OPAQUE
    match function:
        case "collections.OrderedDict" | "collections.defaultdict":
            if not arguments or not isinstance(arguments[0], list):
                return {}
            pairs = [*arguments[0]]  # from Python 2
            arguments[0].clear()  # so that other calls with the same list take no time
            valid = (pair for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2)
            return _fill({}, [item for pair in valid for item in pair])
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
            return arguments[0]
        case "torch._tensor._rebuild_from_type_v2":
            return _call(arguments[0], arguments[2], locate) if arguments[0] != function else OPAQUE
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor_v3":
            return _tensor(arguments, locate, typed=not function.endswith("v3"))
    return OPAQUE


def _tensor(arguments: tuple[Any, ...], locate: Locate, *, typed: bool) -> Any:
    """A SavedTensor from torch's _rebuild_tensor arguments. typed: it has the dtype of its storage."""
    storage, offset, size, stride = arguments[:4]
    if not isinstance(storage, _Storage):
        return OPAQUE
    dtype = storage.dtype
    if not typed:
        dtype = arguments[6].removeprefix("torch.") if isinstance(arguments[6], _Global) else ""
    if dtype not in ITEM_BYTES:
        return OPAQUE
    are_tuples = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= MAX_DIMS
    if not are_tuples or not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise ValueError("a tensor has no valid size, stride and offset")
    available = storage.nbytes // ITEM_BYTES[dtype]
    numel = math.prod(size)
    end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if numel else 0
    if end > available or numel > max(available, MAX_EXPANDED) or (not numel and max(size) > MAX_EXPANDED):
        raise ValueError(
            f"a tensor of size {size} and stride {stride} does not fit its storage of {available} elements"
        )
    return SavedTensor(size, stride, offset, dtype, locate(storage))


def safetensors_header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """The header of a safetensors file of fp32 tensors: its length, and JSON padded to eight bytes."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + FP32 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
