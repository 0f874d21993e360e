"""The evaluation script, called as from the command line, and folders of pairs for it."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests import tiny
from vae3d.inference.video import write_video


def degrade(clip: np.ndarray, amount: float = 8.0, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, amount, clip.shape)
    return np.clip(clip + noise, 0, 255).round().astype(np.uint8)


def original(i: int) -> np.ndarray:
    """The i-th clip of `make_pairs`, of 5 + i frames."""
    return tiny.frames(5 + i, 40, 48, seed=i)


def make_pairs(folder: Path, count: int = 3, *, kind: str = "rec", amount: float = 4.0) -> tuple[Path, Path]:
    """x_ori and x_<kind> with videos v0, v1, ...; the i-th has noise of (i + 1) * amount."""
    ori, rec = folder / "x_ori", folder / f"x_{kind}"
    for i in range(count):
        write_video(ori / f"v{i}.mp4", original(i), 24)
        write_video(rec / f"v{i}.mp4", degrade(original(i), amount * (i + 1)), 24)
    return ori, rec


def one_pair(
    folder: Path, ori: np.ndarray, rec: np.ndarray, fps: float = 24, codec: str = "lossless"
) -> tuple[Path, Path]:
    write_video(folder / "o/v.mp4", ori, 24, codec)
    write_video(folder / "r/v.mp4", rec, fps, codec)
    return folder / "o", folder / "r"


def evaluate(ori: Path, rec: Path, *more: str) -> int:
    """Exit status. Without index.html, which takes time, unless asked for."""
    words = [w for w in more if w != "--page"]
    quick = [] if "--page" in more else ["--no_page"]
    return tiny.status("eval", "--ref", ori, "--rec", rec, "--device", "cpu", *quick, *words)


def report(rec: Path) -> dict:
    return json.loads((rec.with_name(f"{rec.name}_eval") / "summary.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], ori: Path, rec: Path, *more: str) -> str:
    """The error's text; nothing else is printed."""
    capsys.readouterr()
    assert evaluate(ori, rec, *more) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "mean over videos" not in captured.out
    return captured.err


def write_two_sizes(path: Path) -> None:
    """An MPEG-TS of four frames of 48x64 and four of 32x32."""
    packets = []
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"bf": "0", "qp": "20"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        other = av.CodecContext.create("libx264", "w")
        other.width, other.height, other.pix_fmt, other.time_base = 32, 32, "yuv420p", Fraction(1, 24)
        other.options = {"bf": "0", "qp": "20"}
        for encoder, clip, first in ((stream, tiny.frames(4, 48, 64), 0), (other, tiny.frames(4, 32, 32), 4)):
            for i, array in enumerate(clip):
                frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format="yuv420p")
                frame.pts, frame.time_base = first + i, Fraction(1, 24)
                packets += encoder.encode(frame)
            packets += encoder.encode(None)
        for packet in packets:
            packet.stream = stream
            container.mux(packet)
