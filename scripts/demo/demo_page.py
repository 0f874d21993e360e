"""Shared by the parts of the demo report: reads results, draws pictures and tables."""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from vae3d.errors import UserError
from vae3d.report import text_table
from vae3d.report.html import html_table
from vae3d.report.html import img as image_tag  # noqa: F401
from vae3d.report.html import png as figure_tag  # noqa: F401


def exit_on_user_error(run: Callable[[], None]) -> None:
    """Call run(). On a UserError print its message and exit with status 2."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def draw_part(doc: str | None, report: Callable[[Path, Path], None]) -> None:
    """Command line of one part of the report: the demo's folder and the picture to write."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    exit_on_user_error(lambda: report(args.folder, args.picture))


def existing(path: Path) -> Path:
    """The path. Raises UserError if there is no file."""
    if not path.is_file():
        raise UserError(f"{path} is missing; run scripts/demo.sh, which writes it")
    return path


def read_json(path: Path) -> Any:
    return json.loads(existing(path).read_text())


def history(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in existing(run / "metrics.jsonl").read_text().splitlines()]


def read_video(path: Path) -> np.ndarray:
    """All frames, [T, H, W, 3] uint8."""
    with av.open(str(existing(path))) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def enlarged(frame: np.ndarray, times: int) -> Image.Image:
    image = Image.fromarray(frame)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def animation_tag(name: str, frames: np.ndarray, times: int, *, duration: int, quality: int) -> str:
    """An endless WebP of frames [T, H, W, 3] uint8, enlarged. duration: of a frame, in ms."""
    images = [enlarged(frame, times) for frame in frames]
    file = io.BytesIO()
    images[0].save(
        file, format="WEBP", save_all=True, append_images=images[1:], duration=duration, loop=0, quality=quality
    )
    return f'<img alt="{html.escape(name)}" src="data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}">'


def as_text(rows: list[list[str]]) -> str:
    """A plain-text table. The first row is the header."""
    return text_table(rows[0], rows[1:])


def as_html(rows: list[list[str]]) -> str:
    return html_table(rows[0], rows[1:])
