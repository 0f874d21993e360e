"""Finding the pretrained networks that losses and metrics measure with. Never downloads; imports only the stdlib."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vae3d.errors import UserError

UNVERIFIED = "VAE3D_ALLOW_UNVERIFIED"


@dataclass(frozen=True)
class WeightFile:
    name: str
    size: int  # bytes
    sha256: str
    url: str
    licence: str
    used_for: str


FILES = {
    file.name: file
    for file in (
        WeightFile(
            "vgg16-397923af.pth",
            553_433_881,
            "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            "BSD-3-Clause (torchvision)",
            "LPIPS with the VGG trunk: the training loss",
        ),
        WeightFile(
            "alexnet-owt-7be5be79.pth",
            244_408_911,
            "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            "BSD-3-Clause (torchvision)",
            "LPIPS with the AlexNet trunk: metric lpips",
        ),
    )
}


class WeightsMissing(UserError):
    """A pretrained network is not on this machine, or is not the one it claims to be."""


def search_path() -> list[Path]:
    """Folders that are searched, in order."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    torch_home = Path(os.environ.get("TORCH_HOME", home / "torch"))
    own = os.environ.get("VAE3D_WEIGHTS")
    return [*([Path(own)] if own else []), torch_home / "hub" / "checkpoints"]


def find(name: str, path: str | Path | None = None) -> Path:
    """The file `name`, or the one at `path` if that is given.

    A file found by its name must have the published hash, unless VAE3D_ALLOW_UNVERIFIED=1; a path is believed.
    Raises WeightsMissing with size, hash, the places searched and the command that fetches it.
    """
    if path is not None:
        if not Path(path).is_file():
            raise WeightsMissing(f"{path}: no such file; expected {_describe(FILES[name])}")
        return Path(path)
    for folder in search_path():
        if (folder / name).is_file():
            verify(folder / name, FILES[name])
            return folder / name
    raise WeightsMissing(
        f"{_describe(FILES[name])} is not on this machine\n"
        f"  searched {', '.join(map(str, search_path()))}\n"
        f"  fetch it on a connected machine: python scripts/fetch_weights.py {name} --dest {search_path()[0]}\n"
        f"  or name its folder: export VAE3D_WEIGHTS=/path"
    )


def verify(path: Path, file: WeightFile) -> None:
    """Raises WeightsMissing if the file's hash is not the published one."""
    if os.environ.get(UNVERIFIED) == "1":
        return
    found = sha256(path)
    if found != file.sha256:
        raise WeightsMissing(
            f"{path} is not {_describe(file)}: it has {path.stat().st_size:,} bytes and sha256 {found}; "
            f"fetch it again, or set {UNVERIFIED}=1 if you mean to use it"
        )


def sha256(path: Path) -> str:
    """Hash of a file, remembered while the file does not change."""
    stat = path.stat()
    return _sha256(str(path), stat.st_size, stat.st_mtime_ns)


def _describe(file: WeightFile) -> str:
    return f"{file.name} ({file.size:,} bytes, sha256 {file.sha256}; {file.used_for})"


@lru_cache
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
