"""Finding the pretrained networks that losses and metrics measure with. Never downloads; imports only the stdlib."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vae3d.errors import UserError
from vae3d.hashing import file_hash
from vae3d.io import read_json

UNVERIFIED = "VAE3D_ALLOW_UNVERIFIED"
MANIFEST = "manifest.json"

log = logging.getLogger("vae3d")


@dataclass(frozen=True)
class WeightFile:
    """A published file. It has a sha256, or else a git_blob: the SHA-1 under which git stores it.

    used_for: metrics and losses. size: bytes, None if not published. certain: False if only one source states the
    hash, so that another hash is only warned of. aliases: names under which other programs keep the file.
    hugging_face: a repository that holds it. slim: how the tensors that are used are called, where the others are most
    of the file. alternative_to: the file that does the same and is the first choice.
    """

    name: str
    url: str
    licence: str
    used_for: tuple[str, ...]
    size: int | None = None
    sha256: str | None = None
    git_blob: str | None = None
    certain: bool = True
    aliases: tuple[str, ...] = ()
    hugging_face: str | None = None
    slim: str | None = None
    alternative_to: str | None = None

    @property
    def slim_name(self) -> str:
        """Of the file with the used tensors alone, if there is such a one."""
        return f"{Path(self.name).stem}.features.safetensors"

    @property
    def names(self) -> tuple[str, ...]:
        """All that a folder may hold the file as."""
        return (self.name, *self.aliases, *([self.slim_name] if self.slim else []))


def _torchvision(name: str, used_for: tuple[str, ...], size: int, sha256: str, slim: str | None = None) -> WeightFile:
    url = f"https://download.pytorch.org/models/{name}"
    return WeightFile(name, url, "BSD-3-Clause (torchvision)", used_for, size, sha256, slim=slim)


FILES = {
    file.name: file
    for file in (
        _torchvision(
            "vgg16-397923af.pth",
            ("lpips_vgg", "lpips_loss"),
            553_433_881,
            "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            slim="features.",
        ),
        _torchvision(
            "alexnet-owt-7be5be79.pth",
            ("lpips", "lpips_alex", "tlp", "cube_lpips", "flolpips", "flolpips_raft_large", "flolpips_raft_small"),
            244_408_911,
            "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
            slim="features.",
        ),
        _torchvision(
            "raft_large_C_T_SKHT_V2-ff5fadd5.pth",
            ("flolpips_raft_large", "warping_error"),
            21_106_607,
            "ff5fadd56d26b40647388883af1547351ea17868b765c05b27231e72dd16a322",
        ),
        _torchvision(
            "raft_small_C_T_V2-01064c6d.pth",
            ("flolpips_raft_small",),
            4_006_189,
            "01064c6dba73b0fc9fc8edf772248560a00a3acfd62ac6677e9eeebad9680e27",
        ),
        WeightFile(
            "network-default.pytorch",
            "http://content.sniklaus.com/github/pytorch-pwc/network-default.pytorch",
            "CC BY-NC-SA 4.0, non-commercial (NVIDIA's PWC-Net)",
            ("flolpips",),
            sha256="ad2dc62b63b9d10ad42a6969179b3f996d4115e2ec6421bf532f99cf278ffcd2",
            certain=False,
            aliases=("pwc-default", "pwc-network-default.pytorch"),
        ),
        WeightFile(
            "pwc_net.pth.tar",
            "https://github.com/NVlabs/PWC-Net/raw/master/PyTorch/pwc_net.pth.tar",
            "CC BY-NC-SA 4.0, non-commercial (NVIDIA's PWC-Net)",
            ("flolpips",),
            git_blob="27da4cc96929c0474f8083364712df3a1c50c52e",
            alternative_to="network-default.pytorch",
        ),
        WeightFile(
            "weights-inception-2015-12-05-6726825d.pth",
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
            "Apache-2.0 (TensorFlow's Inception, converted by torch-fidelity)",
            ("rfid",),
            95_628_359,
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        ),
        WeightFile(
            "i3d_torchscript.pt",
            "https://huggingface.co/flateon/FVD-I3D-torchscript/resolve/1c2d61711c52571ad617a1063e6fa691b212e184/i3d_torchscript.pt",
            "Apache-2.0 (DeepMind's I3D, converted by StyleGAN-V)",
            ("rfvd",),
            51_235_320,
            "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
            hugging_face="flateon/FVD-I3D-torchscript",
        ),
        WeightFile(
            "i3d_pretrained_400.pt",
            "https://github.com/JunyaoHu/common_metrics_on_video_quality/raw/main/fvd/videogpt/i3d_pretrained_400.pt",
            "Apache-2.0 (DeepMind's I3D, converted by VideoGPT)",
            ("rfvd",),
            git_blob="a867b87ac3a9097d200598b1d48a1b890d8ec744",
            alternative_to="i3d_torchscript.pt",
        ),
    )
}


class WeightsMissing(UserError):
    """A pretrained network is not on this machine, or is not the one it claims to be."""


def search_path() -> list[Path]:
    """Folders that are searched, in order, before the Hugging Face cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    torch_home = Path(os.environ.get("TORCH_HOME", home / "torch")).expanduser()
    own = os.environ.get("VAE3D_WEIGHTS")
    return [*([Path(own)] if own else []), torch_home / "hub" / "checkpoints"]


def find(*names: str, path: str | Path | None = None) -> Path:
    """The first of these files, any of which will do, that a searched place holds; or the one at `path` if given.

    A place may hold a file under an alias, or slim: its used tensors alone, written by scripts/fetch_weights.py.
    A file found by its name must have the published hash, unless VAE3D_ALLOW_UNVERIFIED=1; a path is believed.
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
    raise WeightsMissing(_not_found(files))


def verify(path: Path, file: WeightFile, *, always: bool = False) -> bool:
    """Whether the file's hash was found to be the published one.

    Raises WeightsMissing if it is another; only warns if the published one is not certain. Does not look if
    VAE3D_ALLOW_UNVERIFIED=1, unless `always`.
    """
    if not always and os.environ.get(UNVERIFIED) == "1":
        return False
    found = error(path, file)
    if found is not None and file.certain:
        raise WeightsMissing(f"{found}; remove it and fetch it again, or set {UNVERIFIED}=1 if you mean to use it")
    if found is not None:
        _warn_once(f"{found}; only one source states the expected hash, so the file is used")
    return found is None


def error(path: Path, file: WeightFile) -> str | None:
    """What shows that this is not the published file, with both hashes; None if it is that file."""
    if path.name == file.slim_name:
        return _slim_error(path, file)
    if file.sha256 is not None:
        kind, expected, actual = "sha256", file.sha256, sha256(path)
    else:
        kind, expected, actual = "git blob", file.git_blob, git_blob(path)
    if actual == expected:
        return None
    return f"{path} is not {_describe(file)}: it has {path.stat().st_size:,} bytes and {kind} {actual}"


def sha256(path: Path) -> str:
    """Hash of a file, remembered while the file does not change."""
    return _hash(path, "sha256")


def git_blob(path: Path) -> str:
    """SHA-1 under which git stores a file's content, remembered likewise."""
    return _hash(path, "sha1", b"blob %d\0" % path.stat().st_size)


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


def _not_found(files: list[WeightFile]) -> str:
    first = files[0]
    places = [
        *map(str, search_path()),
        *(f"the Hugging Face cache of {f.hugging_face}" for f in files if f.hugging_face),
    ]
    other_names = [name for file in files for name in file.names[1:]]
    lines = [
        f"{' or '.join(map(_describe, files))} is not on this machine",
        *([f"  which may also be called {', '.join(other_names)}"] if other_names else []),
        f"  searched {', '.join(places)}",
        f"  fetch it on a connected machine: python scripts/fetch_weights.py {first.name} --dest {search_path()[0]}",
        "  or name its folder: export VAE3D_WEIGHTS=/path",
    ]
    return "\n".join(lines)


def _slim_error(path: Path, file: WeightFile) -> str | None:
    """The manifest that was written with a slim file vouches for it and for what it was made from."""
    manifest = path.with_name(MANIFEST)
    if not manifest.is_file():
        return f"{path} cannot be verified: no {manifest} names it"
    try:
        entry = read_json(manifest)[path.name]
        source, own = entry["source_sha256"], entry["sha256"]
    except (ValueError, LookupError, TypeError) as error:
        return f"{path} cannot be verified: {manifest} does not name it with its hashes ({type(error).__name__})"
    if source != file.sha256:
        return f"{path} was made from a file of sha256 {source}, not from {_describe(file)}"
    if own != sha256(path):
        return f"{path} is not the file that {manifest} names, of sha256 {own}: it has {sha256(path)}"
    return None


def _describe(file: WeightFile) -> str:
    size = f"{file.size:,} bytes, " if file.size else ""
    digest = f"sha256 {file.sha256}" if file.sha256 else f"git blob {file.git_blob}"
    return f"{file.name} ({size}{digest}; for {', '.join(file.used_for)})"


def _hash(path: Path, algorithm: str, start: bytes = b"") -> str:
    stat = path.stat()
    return _remembered_hash(str(path), stat.st_size, stat.st_mtime_ns, algorithm, start)


@lru_cache
def _warn_once(message: str) -> None:
    log.warning(message)


@lru_cache
def _remembered_hash(path: str, size: int, mtime_ns: int, algorithm: str, start: bytes) -> str:
    return file_hash(path, algorithm, start)
