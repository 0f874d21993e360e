"""Find the weight file at a path: a file, a downloaded folder, an export or a run. Imports no torch."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from shlex import quote

from vae3d.io import FileError

log = logging.getLogger("vae3d")

EXPORT_CONFIG = "model.yaml"
DIFFUSION_CONFIG = "diffusion.yaml"  # of the export of a diffusion model
SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt")
# Names of weight files in exports and in folders of diffusers, transformers and Open-Sora, in order of preference.
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
# The same in another precision: diffusion_pytorch_model.fp16.safetensors, ....safetensors.index.fp16.json
VARIANTS = re.compile(
    r"(model|diffusion_pytorch_model|pytorch_model)"
    r"(\.\w+\.(safetensors|bin)(\.index\.json)?|\.(safetensors|bin)\.index\.\w+\.json)"
)
# In these repositories, the VAEs lie beside a diffusion model under the names above, so they are preferred.
OFFICIAL_VAES = {"Wan2.1_VAE.pth": "Wan-AI/Wan2.1-T2V-1.3B", "Wan2.2_VAE.pth": "Wan-AI/Wan2.2-TI2V-5B"}
# An encoder and a decoder in two files, as of TAESD: taef2_encoder.pth, taef2_decoder.pth
HALVES = re.compile(r"(.*)(encoder|decoder)(\.\w+)")
LOCAL_FOLDERS = ("runs", "weights", "out")  # no owners of the Hugging Face hub, although runs/NAME looks like one
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
STEP = re.compile(r"step-(\d+)")
PART = "::"  # separates a file and a part of it: weights.ckpt::ema_model


class CheckpointError(FileError):
    """A checkpoint that is missing, unreadable, unknown, or does not fit the model."""


def split_part(path: str | Path) -> tuple[Path, str | None]:
    """`weights.ckpt::ema_model` -> (weights.ckpt, ema_model); other paths -> (path, None)."""
    file, separator, part = str(path).partition(PART)
    return (Path(file), part) if separator and not os.path.exists(path) else (Path(path), None)


def exists(path: str | Path) -> bool:
    return os.path.exists(split_part(path)[0])  # Path.exists raises an error for a name that is too long


def hub_hint(path: str | Path) -> str:
    """Hint for a missing `path` that may be a model on the Hugging Face hub; empty if it cannot be one."""
    text, name, folder = str(path), Path(path).name, str(Path(path).parent)
    if name in OFFICIAL_VAES:
        return f"; hf download {OFFICIAL_VAES[name]} {name} --local-dir {quote(folder)}"
    if folder in LOCAL_FOLDERS or not HUB_NAME.fullmatch(text) or os.path.exists(folder) or text.endswith(SUFFIXES):
        return ""
    only = "" if "vae" in name.lower() else ' --include "*vae*" "*VAE*"'  # of a whole pipeline only the VAE
    return (
        f"; if it is a model on the Hugging Face hub: hf download {text}{only} --local-dir {name}, then give {name}; "
        f"in Python, vae3d.from_pretrained({text!r}) does both"
    )


def cached_repository(path: str | Path, revision: str | None = None) -> Path | None:
    """The folder of `owner/name` in the Hugging Face hub's cache, which may hold only some of its files; None if it is
    not there, or no such name. revision: a branch, tag or commit; None: main."""
    text = str(path)
    if not HUB_NAME.fullmatch(text) or os.path.lexists(text):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        # Newer versions refuse the folder of a repository that was downloaded in part, such as its VAE alone.
        partial = getattr(error, "snapshot_path", None)
        return None if partial is None else Path(partial)


def absolute_path(path: str) -> str:
    """`path` for a program in another working directory; owner/name of the Hugging Face hub stays as it is."""
    return os.path.abspath(path) if exists(path) else path


def find_weights(path: Path) -> Path:
    """The weight file at `path`: the file itself, or that of an export, a published folder, its `vae` folder, or a run.

    owner/name is a repository in the hub's cache, unless there is such a path.

    Raises CheckpointError if there is none, or several without a standard name.
    """
    if os.path.isfile(path):
        return path
    path = cached_repository(path) or path
    if os.path.lexists(path) and not os.path.isdir(path):
        raise CheckpointError(f"{path}: is neither a file nor a folder, but a device, a pipe or a broken link")
    if not os.path.isdir(path):
        raise CheckpointError(f"{path}: no such file or folder{hub_hint(path)}")
    folders = [path / "vae", path] if (path / "model_index.json").is_file() else [path, path / "vae"]
    for folder in folders:
        if found := _standard_weights(folder):
            return found
    if (path / "latest").is_file() or (path / "zero_to_fp32.py").is_file():
        raise CheckpointError(
            f"{path}: is a checkpoint in DeepSpeed's own format, whose files hold code; extract its weights with "
            f"python -m deepspeed.utils.zero_to_fp32 {path} OUT --safe_serialization and give OUT/model.safetensors"
        )
    if exports := step_folders(path / "exports", "model.safetensors"):
        warn_if_older(path, exports[-1])
        return exports[-1] / "model.safetensors"
    others = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(others) == 1 or (others and tuple(others) == halves(others[0])):
        return others[0]
    if others:
        names = list_some(file.name for file in others)
        raise CheckpointError(f"{path}: holds several weight files; give one of them: {names}")
    raise CheckpointError(
        f"{path}: holds no weights ({', '.join(SUFFIXES)}), no vae/ folder and no exports/ of a run; "
        f"found {list_some(sorted(p.name for p in path.iterdir())) or 'nothing'}"
    )


def step_of(folder: Path) -> int:
    """1000 for .../step-0001000."""
    return int(folder.name.removeprefix("step-"))


def step_folders(root: Path, file: str = "") -> list[Path]:
    """The folders step-N in `root`, in the order of N; with `file`, those that hold it."""
    found = [folder for folder in root.glob("step-*") if STEP.fullmatch(folder.name) and (folder / file).exists()]
    return sorted(found, key=step_of)


def halves(path: Path) -> tuple[Path, ...]:
    """The files of the decoder and the encoder, if `path` is named as one of them; else ()."""
    match = HALVES.fullmatch(path.name)
    return tuple(path.with_name(f"{match[1]}{part}{match[3]}") for part in ("decoder", "encoder")) if match else ()


def warn_if_older(run: Path, export: Path) -> None:
    """Warn if a run's newest export is older than its newest checkpoint, which a kill or a full disk can cause."""
    checkpoints = step_folders(run / "checkpoints", "run.json")
    if checkpoints and step_of(checkpoints[-1]) > step_of(export):
        log.warning(
            f"{export.name} is the newest export of {run}, but its newest checkpoint is {checkpoints[-1].name}; run "
            "the training command again to write the missing export"
        )


def _standard_weights(folder: Path) -> Path | None:
    """The weight file with a standard name. Raises CheckpointError if there are several equal ones."""
    if not folder.is_dir():
        return None
    official = [folder / name for name in OFFICIAL_VAES if (folder / name).is_file()]
    standard = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    variants = sorted(file for file in folder.iterdir() if VARIANTS.fullmatch(file.name) and file.is_file())
    found = official or standard[:1] or variants
    if len(found) > 1:
        raise CheckpointError(f"{folder}: holds several; give one of them: {list_some(file.name for file in found)}")
    return found[0] if found else None


def list_some(names: Iterable[str], count: int = 6) -> str:
    """The first `count` names, and how many there are in all."""
    names = list(names)
    return ", ".join(names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "")
