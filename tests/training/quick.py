"""Trainers of the smallest model whose configuration is checked once and then changed, since checks take the time."""

from __future__ import annotations

import errno
import os
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from vae3d.commands import train
from vae3d.config.schema import TrainConfig
from vae3d.training.vae_trainer import VaeTrainer


@cache
def checked(videos: Path) -> TrainConfig:
    frames = ["data.frames.min=1", "data.frames.max=1"]
    return tiny.training("spatial", videos, "stage=finetune", "stage.init_from=random", "loss=recon_kl", *frames)


def trainer(videos: Path | TrainConfig, folder: Path, **changes: Any) -> VaeTrainer:
    """videos: a table, or what `checked` made of it. changes: settings, as in **{"optim.proximal": 0.1}."""
    config = deepcopy(videos if isinstance(videos, TrainConfig) else checked(videos))
    for key, value in changes.items():
        *path, name = key.split(".")
        node = config
        for part in path:
            node = getattr(node, part)
        assert hasattr(node, name), key
        setattr(node, name, value)
    return train.build_trainer(config, folder)


def fill_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let every file with `name` in its name fail as on a full disk, when it is fsynced."""
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if name in Path(os.readlink(f"/proc/self/fd/{descriptor}")).name:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
