"""Show what a video autoencoder does to a video: vae3d try my.mp4 [CHECKPOINT]. Flags: vae3d.commands.flags."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vae3d import api
from vae3d.commands.console import show
from vae3d.commands.fetch_weights import provide
from vae3d.data.decoding.readers import media_info
from vae3d.data.media import MediaInfo, Size
from vae3d.errors import UserError
from vae3d.evaluation.page import page_metrics
from vae3d.inference.pictures import ERROR_LABEL, error_maps, side_by_side
from vae3d.inference.video import write_image, write_video
from vae3d.io import FileError, atomic_write, is_same_file, naming
from vae3d.loading import require_file_channels
from vae3d.metrics import MetricSet, Score, build_metrics
from vae3d.metrics.base import Better, frame_curves, frame_pairs
from vae3d.models.interface import VideoAutoencoder
from vae3d.pixels import displayable, to_uint8
from vae3d.precision import as_device
from vae3d.pretrained import weights
from vae3d.pretrained.weights import FILES
from vae3d.report import number, text_table
from vae3d.report.page import Chapter, Report, Video, check_replaceable, encode_clip, write_clip, write_page
from vae3d.text import plural

DEFAULT = ("taef2_encoder.pth", "taef2_decoder.pth")
METRICS = ("psnr", "ssim", "lpips", "flicker")
ARROWS = {True: " ↑", False: " ↓"}
CLIP = "video"  # its id on the page
HINTS = (
    "psnr: below 25 dB a video looks blurred, above 35 the difference is hard to see. ssim: 1 if equal. lpips: 0 if "
    "equal, below 0.05 is good. flicker: the excess is what the autoencoder adds."
)


def main(args: Namespace) -> int:
    device = as_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    info = media_info(args.video)
    checkpoint = args.checkpoint or default_checkpoint()
    model = api.from_pretrained(checkpoint).to(device)
    require_file_channels(model, checkpoint)
    model.set_tiles(args.tile, args.tile_overlap)
    video = read(args.video, info, args.frames, args.height, alpha=model.pixel_channels == 4)
    out = make_folder(args.out or default_folder(args.video, args.checkpoint))
    names = file_names(still=not info.fps, alpha=model.pixel_channels == 4)
    if any(is_same_file(args.video, out / name) for name in names):
        raise FileError(f"{args.video} would be overwritten; choose another folder with --out")
    facts = describe(model, video, info)
    for name, value in facts.items():
        show(f"{name}: {value}")
    start = time.perf_counter()
    rec = api.reconstruct(model, video, progress=sys.stderr.isatty())
    speed = video.shape[2] / (time.perf_counter() - start)
    facts["speed"] = f"{speed:.1f} frames per second, encoding and decoding ({device})"
    original, result = to_uint8(video[0]), to_uint8(rec[0])
    scores, columns, skipped = score(default_metrics(device), original, result, device)

    write_files(out, names, original, result, info.fps)
    title = f"{Path(args.video).name} through {args.checkpoint or 'TAEF2'}"
    clip = encode_clip([displayable(original)], {"reconstruction": [displayable(result)]}, info.fps)
    write_clip(out, CLIP, clip, {"reconstruction": frame_curves(scores)})
    panorama = original.shape[2] == 2 * original.shape[1]
    report = make_report(out, names, title, Path(args.video), scores, columns, facts, skipped, panorama, args.command)
    write_page(out, report)
    rows = [
        [f"{name}{ARROWS.get(columns[name], '')}", number(score.value)]
        for name, score in scores.items()
        if score.value is not None  # changes between frames, of an image
    ]
    print(f"speed: {facts['speed']}\n\n{text_table(['score', 'mean'], rows)}")
    for name, reason in skipped.items():
        show(f"without {name}: {reason}", file=sys.stderr)
    print(f"\n{out / 'index.html'} shows it; beside it: {', '.join(names)}")
    return 0


def default_folder(video: str, checkpoint: str | None) -> Path:
    """A name without spaces: try_VIDEO, or try_VIDEO_CHECKPOINT."""
    parts = ["try", Path(video).stem, *([Path(checkpoint).name] if checkpoint else [])]
    return Path("_".join(re.sub(r"[^\w.-]+", "-", part).strip("-_") for part in parts))


def make_folder(out: Path) -> Path:
    """Make the folder, before the work that takes time. Raises FileError if no page can be written there."""
    with naming(out):
        out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise FileError(f"{out}: cannot be written; choose another folder with --out")
    check_replaceable(out)
    return out


def read(path: str, info: MediaInfo, frames: int, height: int, alpha: bool = False) -> torch.Tensor:
    """The first frames, [1, 3, T, H, W], or RGBA, with even sides, at most `height` high."""
    size = reduced_size(info, height)
    count = min(frames, info.num_frames)
    return api.read_video(path, num_frames=count, height=size[0], width=size[1], alpha=alpha).frames


def reduced_size(info: MediaInfo, height: int) -> Size:
    """Even sides, at most `height` high. Where frames are resized, their pixels become square: to keep the sides of
    others would crop them."""

    def fit(size: Size) -> Size:
        scale = min(1.0, height / size[0])
        rows, columns = (max(2, round(side * scale) // 2 * 2) for side in size)
        return rows, columns

    return fit(info.size_to_scale(fit((info.height, info.width))))


def default_checkpoint() -> Path:
    """TAEF2's encoder, beside its decoder, downloaded where they are missing. Raises UserError if that fails."""
    folder = weights.search_path()[0]
    for name in DEFAULT:
        try:
            weights.find(name)
        except weights.WeightsMissing:
            print(f"{name} is not on this machine; downloading it to {folder} ...", file=sys.stderr)
            try:
                provide(FILES[name], folder, mirror=None, slim=False)
            except (OSError, HTTPException) as error:
                raise UserError(no_weights(folder, error)) from error
    return weights.find(DEFAULT[0])


def no_weights(folder: Path, error: Exception) -> str:
    """What to download, how large it is, and where to put it."""
    lines = [f"TAEF2 is not on this machine and cannot be downloaded: {error}", "Either download these two files:"]
    lines += [f"  {FILES[name].url}  ({FILES[name].size:,} bytes)" for name in DEFAULT]
    lines += [
        f"on a connected machine, as vae3d fetch-weights {' '.join(DEFAULT)} --dest DIR does, and copy them into",
        f"{folder} (or set VAE3D_WEIGHTS to their folder); or give another autoencoder: vae3d try VIDEO CHECKPOINT",
    ]
    return "\n".join(lines)


def default_metrics(device: torch.device) -> MetricSet:
    return build_metrics(METRICS, device, on_missing="skip")


def score(
    metrics: MetricSet, original: np.ndarray, result: np.ndarray, device: torch.device
) -> tuple[dict[str, Score], dict[str, Better], dict[str, str]]:
    """Scores of [T, H, W, 3] uint8, their columns, and why some metrics are left out."""
    unsupported = metrics.reasons(*original.shape)
    chosen = metrics.subset([m.name for m in metrics if m.name not in unsupported])
    scores = chosen.score(frame_pairs(original, result, device)).scores
    missing = {
        name: f"{reason.partition(' (')[0]} is not on this machine: vae3d fetch-weights --metrics {name} gets it"
        if reason.endswith("is not on this machine")
        else reason
        for name, reason in metrics.skipped.items()
    }
    return scores, chosen.columns, missing | unsupported


def describe(model: VideoAutoencoder, video: torch.Tensor, info: MediaInfo) -> dict[str, str]:
    frames, height, width = video.shape[2:]
    channels, t, h, w = model.latent_shape(frames, height, width)
    ratio = video.shape[1] * frames * height * width / (channels * t * h * w)
    size = f"{width} x {height}"
    if (height, width) != (info.height, info.width):
        size += f", reduced from {info.width} x {info.height}"
    part = plural(frames, "frame")
    if frames != info.num_frames:
        part = f"the first {frames} of {info.num_frames} frames"
    return {
        **({"video": f"{part} of {size}"} if info.fps else {"image": size}),
        "model": f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters",
        "latents": f"{plural(channels, 'channel')}, {t} x {h} x {w}: "
        f"{ratio:.1f} times fewer numbers than the frames have",
        **({"coded in": str(tiling)} if (tiling := model.tiling) and max(height, width) > tiling.tile else {}),
    }


def file_names(*, still: bool, alpha: bool) -> list[str]:
    """The reconstruction and the comparisons: of an image as .png, of a video as .mp4 and .webp, and .mkv with alpha,
    which .mp4 cannot hold."""
    if still:
        return ["reconstruction.png", "side_by_side.png"]
    return [f"reconstruction.{'mkv' if alpha else 'mp4'}", "side_by_side.mp4", "side_by_side.webp"]


def write_files(out: Path, names: Sequence[str], original: np.ndarray, result: np.ndarray, fps: float) -> None:
    """Write the files of file_names. Comparisons show RGBA over a checkerboard."""
    shown = {"original": displayable(original), "reconstruction": displayable(result)}
    beside = np.concatenate(list(side_by_side({**shown, ERROR_LABEL: error_maps(*shown.values())})))
    for name in names:
        frames, file = result if name.startswith("reconstruction") else beside, out / name
        if file.suffix == ".png":
            write_image(file, frames[0])
        elif file.suffix == ".webp":
            with naming(out), atomic_write(file) as stream:
                stream.write(webp(frames, fps))
        else:
            write_video(file, frames, fps, "h264" if file.suffix == ".mp4" else "lossless")


def make_report(
    out: Path,
    names: Sequence[str],
    title: str,
    source: Path,
    scores: Mapping[str, Score],
    columns: Mapping[str, Better],
    facts: Mapping[str, str],
    skipped: Mapping[str, str],
    panorama: bool,
    command: str,
) -> Report:
    """The page for the folder `out`, which has the files `names`. skipped: metrics that were left out, and why."""
    values = {column: score.value for column, score in scores.items() if score.value is not None}
    links = {"original": os.path.relpath(source, out)} if source.is_file() else {}  # numbered images have no one file
    video = Video(CLIP, source.name, {"reconstruction": values}, links=links, panorama=panorama)
    metrics = page_metrics({column: columns[column] for column in values})
    chapter = Chapter("Video", HINTS, ["reconstruction"], metrics, [video])
    warnings = [f"without {name}: {reason}" for name, reason in skipped.items()]
    files = {name: name for name in names}
    return Report(title, [chapter], facts=facts, commands=command, links=files, warnings=warnings)


def webp(frames: np.ndarray, fps: float) -> bytes:
    """[T, H, W, 3] uint8 as a WebP image that moves."""
    first, *others = map(Image.fromarray, frames)
    file = io.BytesIO()
    moving = {"save_all": True, "append_images": others, "duration": round(1000 / fps), "loop": 0}
    first.save(file, "WEBP", quality=80, method=4, **moving)
    return file.getvalue()
