"""Where scalars and videos of a run go, besides metrics.jsonl which is always written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image


class Logger(Protocol):
    def open(self, folder: Path, step: int) -> None:
        """Begin writing under the run's folder; `step` is where training (re)starts."""

    def scalars(self, values: dict[str, float], step: int) -> None: ...

    def video(self, name: str, frames: np.ndarray, fps: float, step: int) -> None:
        """frames: [T, H, W, 3] uint8."""

    def close(self) -> None: ...


class NoLogger:
    def open(self, folder: Path, step: int) -> None:
        pass

    def scalars(self, values: dict[str, float], step: int) -> None:
        pass

    def video(self, name: str, frames: np.ndarray, fps: float, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard:
    """Scalars and animated images for `tensorboard --logdir runs`."""

    def open(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what a killed run wrote after its last checkpoint.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def video(self, name: str, frames: np.ndarray, fps: float, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # SummaryWriter.add_video makes the same GIF, but through the moviepy package.
        pictures = [Image.fromarray(frame) for frame in frames]
        stream = io.BytesIO()
        pictures[0].save(
            stream, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / (fps or 8)), loop=0
        )
        height, width = frames.shape[1:3]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=stream.getvalue())
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        self.writer.close()
