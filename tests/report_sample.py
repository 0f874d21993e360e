"""A page of made videos, with everything that a page can hold: python -m tests.report_sample FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
from markupsafe import Markup

from vae3d.report.page import (
    Chapter,
    Chart,
    Difference,
    Metric,
    Picture,
    Report,
    Table,
    Video,
    encode_clip,
    write_clip,
    write_page,
)

HOSTILE = {
    "markup": "<img src=x onerror=\"document.title='hacked'\">.mp4",
    "quotes": "a\"b'c`d${1}&amp;.mp4",
    "script": "</script><script>document.title='hacked'</script>.mp4",
    "lines": "line\u2028separator\u2029\n.mp4",
    "long": "very_long_name_" * 30 + ".mp4",
}
METRICS = {
    "psnr": Metric("PSNR", "higher", "Peak signal-to-noise ratio.", "dB"),
    "lpips": Metric("LPIPS", "lower", "Distance of features that follow human judgement."),
    "seam_ratio": Metric("Seam ratio", 1.0, "Steps across the seam of a panorama, relative to those elsewhere."),
}
HEIGHT, WIDTH, FRAMES, FPS = 48, 96, 12, 12.0


def video(height: int = HEIGHT, width: int = WIDTH, frames: int = FRAMES) -> np.ndarray:
    """[T, H, W, 3] uint8, smooth, so that 4:2:0 keeps it. The brightness of each frame says its number."""
    y, x = np.mgrid[0:height, 0:width]
    slope = np.stack([x / width, y / height, 1 - x / width], -1) * 60
    return np.stack([slope + 20 + 12 * t for t in range(frames)]).round().astype(np.uint8)


def reconstructions(original: np.ndarray) -> dict[str, np.ndarray]:
    """One that is darker in its left half, more with each frame, and one that blurs a square."""
    frames, _, width, _ = original.shape
    darker = original.astype(float)
    darker[:, :, : width // 2] -= np.linspace(0, 20, frames)[:, None, None, None]
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 4) for frame in original])
    return {"base": darker.clip(0, 255).round().astype(np.uint8), "fine": blurred}


def curves(original: np.ndarray, rec: np.ndarray) -> dict[str, list[float]]:
    error = ((original.astype(float) - rec) ** 2).mean((1, 2, 3)) / 255**2
    return {"psnr": [*(-10 * np.log10(error + 1e-5))], "lpips": [*np.sqrt(error)]}


def write_sample(folder: Path) -> None:
    """A chapter of hostile names with a panorama, a missing and a damaged clip, and one of tables and charts."""
    folder.mkdir(parents=True, exist_ok=True)
    original = video()
    recs = reconstructions(original)
    clip = encode_clip([original], {name: [rec] for name, rec in recs.items()}, FPS)
    lines = {name: curves(original, rec) for name, rec in recs.items()}
    names = {
        "panorama": "panorama.mp4",
        **HOSTILE,
        "damaged": "damaged.mp4",
        "missing": "missing.mp4",
        "two": "two.mp4",
    }
    videos = []
    for index, (id, name) in enumerate(names.items()):
        scores = {
            rec: {
                "psnr": 20 + index + 3 * number,
                "lpips": 0.5 / (index + 1) - 0.05 * number,
                "seam_ratio": 0.8 + index / 10,
            }
            for number, rec in enumerate(recs)
        }
        write_clip(folder, id, clip, lines)
        links = {"original": f"ori/{name}", "rec": f"rec/{name}"}
        videos.append(Video(id, name, scores, {"codec": "h264"}, links, panorama=id == "panorama"))
    videos.append(Video("none", "none.mp4", clip=False, why="The reconstruction has another size."))
    photo = encode_clip([original[:1]], {name: [rec[:1]] for name, rec in recs.items()}, 0)
    write_clip(folder, "photo", photo, {name: {"psnr": [30.0]} for name in recs})
    square = '<svg width="60" height="60"><rect width="60" height="60" fill="teal"/></svg>'
    report = Report(
        "Sample <b>report</b>",
        [
            Chapter(
                "Videos",
                "Text with <b>escaped</b> markup.",
                [*recs],
                METRICS,
                videos,
                "psnr",
                differences=[
                    Difference("fine", "base", "psnr", 3.0, 2.1, 3.9, 9, 9),
                    Difference("fine", "base", "lpips", -0.05, -0.06, 0.01, 6, 9),
                ],
                warnings=["A warning of the chapter."],
            ),
            Chapter(
                "Pictures and training",
                Markup("<em>Marked up</em> text."),
                ["base", "fine"],
                {"psnr": METRICS["psnr"]},
                [Video("photo", "photo.png", {"base": {"psnr": 30.0}, "fine": {"psnr": 31.0}})],
                tables=[
                    Table(
                        "Set",
                        ["", "FVD", "rFID"],
                        [["base", "12.1", "3.2"], ["fine", "9.8", "2.9"]],
                        "Lower is better.",
                    )
                ],
                charts=[
                    Chart(
                        "Loss",
                        "step",
                        {"base": [(s, 1 / s) for s in range(1, 60)], "fine": [(s, 0.8 / s) for s in range(1, 60, 3)]},
                        "loss",
                        log=True,
                    )
                ],
                pictures=[Picture("Codes", Markup(square), "A picture.")],
                commands="vae3d infer ckpt=model.pt",
            ),
        ],
        "Made for tests.",
        {"preset": "tiny", "sha256": "ab" * 32},
        "python -m tests.report_sample out",
        {"scores": "scores.json"},
        [f"Warning {index} of the page." for index in range(4)],
    )
    write_page(folder, report)


if __name__ == "__main__":
    write_sample(Path(sys.argv[1]))
