"""Show what a video autoencoder does to a video: vae3d try my.mp4 [CHECKPOINT]

Writes try_<name>/: the reconstruction; original, reconstruction and error side by side; a page with both and scores.
Without CHECKPOINT it takes TAEF2, a small autoencoder of single images, and downloads it once (5 MB).
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import time
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vae3d import api
from vae3d.argparse_types import positive_int
from vae3d.commands.fetch_weights import provide
from vae3d.data.readers import media_info
from vae3d.errors import UserError
from vae3d.inference.pictures import contact_sheet, error_maps, side_by_side
from vae3d.inference.video import write_video
from vae3d.io import atomic_write, naming, write_text
from vae3d.metrics import build_metrics
from vae3d.models.interface import VideoAutoencoder
from vae3d.pixels import as_unit, to_uint8
from vae3d.pretrained import weights
from vae3d.pretrained.weights import FILES
from vae3d.report import number, text_table
from vae3d.report.html import html_table, img, render

DEFAULT = ("taef2_encoder.pth", "taef2_decoder.pth")
METRICS = ("psnr", "ssim", "lpips", "flicker")
PAGE = Path(__file__).with_name("try_video.html")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", help="a video, an image or numbered images")
    parser.add_argument("checkpoint", nargs="?", help="a run, an export or published weights; default TAEF2")
    parser.add_argument("--out", type=Path, help="folder; default try_<name of the video>")
    parser.add_argument("--frames", type=positive_int, default=49, help="at most so many, default %(default)s")
    parser.add_argument("--height", type=positive_int, default=360, help="reduce larger videos, default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    out = args.out or Path(f"try_{Path(args.video).stem}")
    video, fps = read(args.video, args.frames, args.height)
    model = api.load(args.checkpoint or default_checkpoint()).to(args.device)
    start = time.perf_counter()
    rec = api.reconstruct(model, video)
    seconds = time.perf_counter() - start
    original, result = to_uint8(video[0]), to_uint8(rec[0])
    scores, skipped = score(original, result, args.device)

    panels = {"original": original, "reconstruction": result, "error": error_maps(original, result)}
    beside = np.concatenate(list(side_by_side(panels)))
    fps = fps or 1.0
    write_video(out / "reconstruction.mp4", result, fps, "h264")
    write_video(out / "side_by_side.mp4", beside, fps, "h264")
    animation = webp(beside, fps)
    with naming(out), atomic_write(out / "side_by_side.webp") as stream:
        stream.write(animation)
    facts = describe(model, video, seconds)
    rows = [[name, number(value)] for name, value in scores.items()]
    page = render(
        PAGE.read_text(),
        title=f"{Path(args.video).name} through {type(model).__name__}",
        animation=base64.b64encode(animation).decode(),
        sheet=img(
            Image.fromarray(contact_sheet({k: panels[k] for k in ("original", "reconstruction")}, "original", 5))
        ),
        scores=html_table(["score", "mean"], rows),
        facts=html_table(["", ""], facts),
        skipped=skipped,
    )
    write_text(out / "index.html", page)
    print(text_table(["score", "mean"], rows))
    print("\n".join(f"{name}: {value}" for name, value in facts))
    for name, reason in skipped.items():
        print(f"without {name}: {reason}", file=sys.stderr)
    print(f"\n{out}/index.html shows it; beside it lie reconstruction.mp4, side_by_side.mp4 and side_by_side.webp")
    return 0


def read(path: str, frames: int, height: int) -> api.Video:
    """The first frames, with even sides, at most `height` high."""
    info = media_info(path)
    scale = min(1.0, height / info.height)
    size = [max(2, round(side * scale) // 2 * 2) for side in (info.height, info.width)]
    return api.read_video(path, num_frames=min(frames, info.num_frames), height=size[0], width=size[1])


def default_checkpoint() -> Path:
    """TAEF2's encoder, beside its decoder, downloaded where it is missing. Raises UserError if that fails."""
    found = []
    for name in DEFAULT:
        try:
            found.append(weights.find(name))
        except weights.WeightsMissing as missing:
            print(f"{name} is not on this machine; downloading it ...", file=sys.stderr)
            try:
                provide(FILES[name], weights.search_path()[0], mirror=None, slim=False)
            except (OSError, HTTPException) as error:
                raise UserError(
                    f"{name} cannot be downloaded ({error}); give a checkpoint of yours, vae3d try VIDEO CHECKPOINT, "
                    f"or on a connected machine: python scripts/fetch_weights.py {' '.join(DEFAULT)}\n{missing}"
                ) from error
            found.append(weights.find(name))
    return found[0]


def score(original: np.ndarray, result: np.ndarray, device: str) -> tuple[dict[str, float | None], dict[str, str]]:
    """Scores of [T, H, W, 3] uint8, and why some are missing."""
    metrics = build_metrics(METRICS, device, on_missing="skip")
    frames, height, width = original.shape[:3]
    fitting = [m.name for m in metrics if m.why_unsupported(frames, height, width) is None]
    chosen = metrics.subset(fitting)
    for first in range(0, frames, 16):
        part = slice(first, first + 16)
        chosen.update(as_unit(original[part], device), as_unit(result[part], device))
    scores = {name: value.value for name, value in chosen.result().scores.items()}
    return scores, metrics.skipped


def describe(model: VideoAutoencoder, video: torch.Tensor, seconds: float) -> list[list[str]]:
    frames, height, width = video.shape[2:]
    channels, t, h, w = model.latent_shape(frames, height, width)
    ratio = 3 * frames * height * width / (channels * t * h * w)
    return [
        ["video", f"{frames} frames of {width} x {height}"],
        ["latents", f"{channels} x {t} x {h} x {w}, {ratio:.1f} times fewer numbers"],
        ["model", f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"],
        ["speed", f"{frames / seconds:.1f} frames per second, encoding and decoding"],
    ]


def webp(frames: np.ndarray, fps: float) -> bytes:
    """[T, H, W, 3] uint8 as a WebP image that moves, or stands if there is one frame."""
    first, *others = map(Image.fromarray, frames)
    moving = {"save_all": True, "append_images": others, "duration": round(1000 / fps), "loop": 0} if others else {}
    file = io.BytesIO()
    first.save(file, "WEBP", quality=80, method=6, **moving)
    return file.getvalue()
