"""A folder that keeps a teacher's targets, for clips that come again."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vae3d import distributed
from vae3d.hashing import json_hash
from vae3d.io import TMP_NAME, atomic_path, naming, save_tensors
from vae3d.transfer import to_device
from vae3d.types import TeacherTargets

log = logging.getLogger("vae3d")

LATENTS = "z"
FEATURE = "feature:"
STALE = 3600.0  # seconds after which a temporary file is of a killed process; writing one takes far less


class TargetCache:
    """A teacher's latents and features, one file per clip, under the hash of the clip's pixels.

    So they are the same bits as those of the teacher, whatever the order, the ranks, or where a run was killed; another
    teacher, precision, batch size or choice of features has files of its own. It pays if clips repeat: no random crop
    or start, no flip. A file is complete from when it has its name; a damaged one is computed and written again. Once a
    write fails, this rank adds no more.

    folder: shared by any number of runs. of: what the targets depend on, JSON-able. gib: GiB of files after which
    nothing is added; the ranks share equally what is left of it.
    """

    def __init__(self, folder: str, of: Mapping[str, Any], gib: float) -> None:
        self.folder = Path(folder) / json_hash(of)
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.room = (int(gib * 2**30) - _clean(self.folder)) // distributed.world_size()
        self.gib = gib
        self.hits = 0
        self.misses = 0
        self.warned = False  # that it takes no more

    @property
    def hit_rate(self) -> float:
        """Share of the clips so far whose targets were there."""
        return self.hits / max(1, self.hits + self.misses)

    def keys(self, video: Tensor) -> list[str]:
        """A key for each clip of a batch [B, 3, T, H, W]: also of B, which changes the last bits of a convolution."""
        shape = str((tuple(video.shape), str(video.dtype))).encode()
        return [hashlib.blake2b(_bytes(clip) + shape, digest_size=20).hexdigest() for clip in video]

    def read(self, keys: Sequence[str], device: torch.device) -> TeacherTargets | None:
        """Targets of a batch, or None unless all of its clips are there. Damaged files are deleted."""
        clips = []
        for key in keys:
            file = self._file(key)
            try:
                clips.append(load_file(file))
            except OSError:  # not there, or its disk fails
                break
            except SafetensorError:
                file.unlink(missing_ok=True)  # another rank may have done so
                break
        if len(clips) < len(keys):
            self.misses += len(keys)
            return None
        self.hits += len(keys)
        tensors = {name: to_device(torch.stack([clip[name] for clip in clips]), device) for name in clips[0]}
        z = tensors.pop(LATENTS)
        return TeacherTargets(z, {name.removeprefix(FEATURE): tensor for name, tensor in tensors.items()})

    def write(self, keys: Sequence[str], targets: TeacherTargets) -> None:
        for index, key in enumerate(keys):
            tensors = {LATENTS: targets.z[index]}
            tensors |= {f"{FEATURE}{name}": tensor[index] for name, tensor in targets.features.items()}
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            file = self._file(key)
            if file.exists():
                continue
            if size > self.room:
                self._warn(
                    f"{self.folder} is full (teacher.cache_gib={self.gib:g}): this rank adds no more targets. So far "
                    f"{self.hits} of {self.hits + self.misses} clips were in it"
                )
                continue
            self.room -= size
            tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            try:
                file.parent.mkdir(exist_ok=True)
                with atomic_path(file) as tmp:  # another rank may write the same clip
                    save_tensors(tensors, tmp)
            except (OSError, SafetensorError) as error:  # training goes on without it
                self._warn(f"{file} cannot be written, so this rank adds no more targets: {error}")
                self.room = 0

    def _warn(self, text: str) -> None:
        if not self.warned:
            log.warning(f"teacher.cache: {text}")
            self.warned = True

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.safetensors"


def _clean(folder: Path) -> int:
    """Delete what killed processes left half-written; returns the bytes of the files that stay.

    Other ranks and runs write there meanwhile, so their temporary files stay, and one may be gone once it is looked at.
    """
    kept = 0
    for file in folder.glob("*/*"):
        with suppress(FileNotFoundError):
            about = file.stat()
            if TMP_NAME.fullmatch(file.name) and time.time() - about.st_mtime > STALE:
                file.unlink()
            else:
                kept += about.st_size
    return kept


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
