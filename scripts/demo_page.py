"""What both parts of the demo report share: videos in, pictures and tables out."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import av
import numpy as np
from PIL import Image

ERROR_GAIN = 4  # error maps show |original - reconstruction| times this


def read_video(path: Path) -> np.ndarray:
    """All frames, [T, H, W, 3] uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def error_map(original: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Their absolute difference, amplified, uint8."""
    return (np.abs(original.astype(int) - other) * ERROR_GAIN).clip(0, 255).astype(np.uint8)


def enlarged(frame: np.ndarray, times: int) -> Image.Image:
    image = Image.fromarray(frame)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def image_tag(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def as_text(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_html(rows: list[list[str]]) -> str:
    def line(row: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    return "<table>" + line(rows[0], "th") + "".join(line(row, "td") for row in rows[1:]) + "</table>"
