"""Loggers of scalars, images and videos, in addition to metrics.jsonl."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class Logger:
    def open(self, folder: Path, step: int) -> None:
        """Start writing in the run's folder; training starts or resumes at `step`."""

    def scalars(self, values: dict[str, float], step: int) -> None: ...

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """picture: [H, W, 3] uint8."""

    def video(self, name: str, frames: np.ndarray, fps: float, step: int) -> None:
        """frames: [T, H, W, 3] uint8."""

    def close(self) -> None: ...


class NoLogger(Logger):
    """Writes nothing."""


class TensorBoard(Logger):
    """Scalars, images and animated images for `tensorboard --logdir runs`."""

    def open(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides entries that a killed run wrote after its last checkpoint.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        self._add(name, [picture], step, format="PNG")

    def video(self, name: str, frames: np.ndarray, fps: float, step: int) -> None:
        # SummaryWriter.add_video makes the same GIF, but needs moviepy.
        self._add(name, frames, step, format="GIF", duration=round(1000 / (fps or 8)), loop=0)

    def _add(self, name: str, frames: Sequence[np.ndarray], step: int, **options: Any) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        first, *others = [Image.fromarray(frame) for frame in frames]
        stream = io.BytesIO()
        first.save(stream, save_all=bool(others), append_images=others, **options)
        encoded = Summary.Image(
            height=first.height, width=first.width, colorspace=3, encoded_image_string=stream.getvalue()
        )
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=encoded)]), step)

    def close(self) -> None:
        self.writer.close()
