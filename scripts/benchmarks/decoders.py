"""Compare decoders of one latent space: speed, operations, memory, PSNR, SSIM, LPIPS; and draw the front.

    python scripts/benchmarks/decoders.py taef2_encoder.pth runs/a runs/b --source runs/a/held_out.csv

The first one is the teacher: its encoder codes every file, each decoder decodes the same latents, and the scores are
those against the original and against the teacher's decoder. A name may stand in front: `30 %=runs/small_30`.
Writes decoders.json and decoders.svg to --out. Frames per second are the median of --repeats passes over one clip;
memory is what decoding takes at most above what was held before: of a process of its own, or of the GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vae3d
from vae3d.argparse_types import positive_int
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.batches.held_out import validation_clips
from vae3d.data.loader import read_tables
from vae3d.data.sources.open_source import open_source
from vae3d.errors import UserError
from vae3d.inference.cost import timed
from vae3d.metrics.frame import decibel
from vae3d.models.interface import VideoAutoencoder, convert_latents, share_frames
from vae3d.report.html import subplots, svg

METRICS = ("psnr", "ssim", "lpips")


def named(text: str) -> tuple[str, str]:
    """(name, checkpoint) of NAME=CHECKPOINT or CHECKPOINT."""
    name, _, path = text.rpartition("=")
    return name or Path(path).name, path


def decode_cost(model: VideoAutoencoder, z: Tensor, frames: int, repeats: int) -> dict[str, float]:
    """Multiply-adds per pixel, and frames per second. z: latents of one clip of this many frames."""
    with FlopCounterMode(display=False) as counter:
        video = model.decode(z, frames)
    pixels = video.shape[2] * video.shape[3] * video.shape[4]
    seconds, _ = timed(lambda: model.decode(z, frames), z.device, repeats)
    return {
        "parameters": sum(p.numel() for p in decoder_of(model).parameters()),
        "macs_per_pixel": counter.get_total_flops() / 2 / pixels,
        "frames_per_second": frames / seconds,
    }


def decoder_of(model: VideoAutoencoder) -> torch.nn.ModuleList:
    return torch.nn.ModuleList(model.trainable_parts()["decoder"])


def memory_mib(path: str, shape: Sequence[int], frames: int, device: str) -> float | None:
    """MiB that decoding takes above what the process held before, in a process of its own; see inference.cost."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure_memory, path, tuple(shape), frames, device).result()


@torch.no_grad()
def measure_memory(path: str, shape: tuple[int, ...], frames: int, device: str) -> float | None:
    model = vae3d.load(path).to(device)
    z = torch.zeros(shape, device=device)
    _, gib = timed(lambda: model.decode(z, frames), z.device)
    return None if gib is None else gib * 2**10


@torch.no_grad()
def compare(
    decoders: Sequence[tuple[str, str]], videos: Sequence[Tensor], args: argparse.Namespace
) -> list[dict[str, Any]]:
    models = [vae3d.load(path).to(args.device) for _, path in decoders]
    teacher = models[0]
    frames, height, width = args.frames, args.height, args.width
    for (name, _), model in zip(decoders, models, strict=True):
        if not share_frames(model, teacher, frames, height, width):
            raise UserError(f"{name} and {decoders[0][0]} do not share latents of {frames} frames of {height}x{width}")
    rows = []
    latents = [teacher.encode(video).mode() for video in videos]
    expected = [teacher.decode(z, video.shape[2]) for z, video in zip(latents, videos, strict=True)]
    big = torch.zeros(teacher.latent_shape(args.frames, args.speed_size, args.speed_size), device=args.device)[None]
    for (name, path), model in zip(decoders, models, strict=True):
        scores, near = [], []
        for video, z, target in zip(videos, latents, expected, strict=True):
            size = video.shape[-2:]
            rec = model.decode(convert_latents(z, teacher, model), video.shape[2])[..., : size[0], : size[1]].clamp(
                -1, 1
            )
            scores.append(vae3d.score(video, rec, metrics=METRICS))
            target = target[..., : size[0], : size[1]].clamp(-1, 1)
            near.append(decibel((rec - target).square().mean().item() / 4))  # of pixels in [0, 1]
        row = {"name": name, **decode_cost(model, big, args.frames, args.repeats)}
        row["memory_mib"] = memory_mib(path, big.shape, args.frames, args.device)
        row |= {metric: fmean(score[metric] for score in scores) for metric in scores[0]}
        row["psnr_to_teacher"] = None if model is teacher else fmean(near)
        rows.append(row)
        row["macs_share"] = row["macs_per_pixel"] / rows[0]["macs_per_pixel"]
        print(line(row), flush=True)
    return rows


HEADER = (
    "| decoder | parameters | MACs per pixel | frames/s | memory, MiB | PSNR, dB | SSIM | LPIPS (AlexNet) | "
    "PSNR to the first |\n|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict[str, Any]) -> str:
    near = "" if row["psnr_to_teacher"] is None else f"{row['psnr_to_teacher']:.2f}"
    memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}"
    lpips = next(value for key, value in row.items() if key.startswith("lpips"))
    return (
        f"| {row['name']} | {row['parameters']:,} | {row['macs_per_pixel']:,.0f} ({row['macs_share']:.0%}) | "
        f"{row['frames_per_second']:.1f} | {memory} | {row['psnr']:.2f} | {row['ssim']:.3f} | "
        f"{lpips:.3f} | {near} |"
    )


def front(rows: Sequence[dict[str, Any]], key: str, better: int) -> list[dict[str, Any]]:
    """The decoders that no cheaper one reaches, by operations. better: 1 if higher scores are better, else -1."""
    ordered = sorted(rows, key=lambda row: row["macs_per_pixel"])
    return [r for i, r in enumerate(ordered) if all(better * r[key] > better * o[key] for o in ordered[:i])]


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """PSNR and LPIPS over operations; the line joins the decoders that no cheaper one reaches."""
    figure, axes = subplots(2, 2, 4.5, 3.6)
    lpips = next(key for key in rows[0] if key.startswith("lpips"))
    plots = (("psnr", 1, "PSNR, dB"), (lpips, -1, "LPIPS (AlexNet), lower is better"))
    for axis, (key, better, label) in zip(axes, plots, strict=True):
        best = front(rows, key, better)
        axis.plot([r["macs_share"] * 100 for r in best], [r[key] for r in best], color="0.6", linewidth=1, zorder=1)
        axis.scatter([r["macs_share"] * 100 for r in rows], [r[key] for r in rows], zorder=2)
        for row in rows:
            axis.annotate(
                row["name"],
                (row["macs_share"] * 100, row[key]),
                textcoords="offset points",
                xytext=(5, -11),
                fontsize=8,
            )
        axis.set_xlabel("operations, % of the first decoder's")
        axis.set_ylabel(label)
        axis.set_xlim(left=0, right=112)
        axis.margins(y=0.15)
    file.write_text(svg(figure))


def read_videos(args: argparse.Namespace) -> list[Tensor]:
    """The middle of every file, [1, 3, T, H, W] in [-1, 1]. `split` is not read: held_out.csv is `val` throughout."""
    settings = ClipSettings(args.height, args.width)
    rows = open_source(args.source).table().assign(split=None)
    table = read_tables(SimpleNamespace(table=lambda: rows), settings, num_val_files=0, max_broken=0.0).train
    clips, errors = validation_clips(table, settings, args.frames, len(table))
    if errors:
        raise UserError("; ".join(f"{path}: {reason}" for path, reason in errors))
    return [clip.to(args.device).video for clip in clips]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("decoders", nargs="+", help="checkpoints, the teacher first; NAME=CHECKPOINT names one")
    parser.add_argument("--source", required=True, help="a table, a folder or one file of videos and images; every row")
    parser.add_argument("--out", type=Path, default=Path("decoders"), help="folder for decoders.json and .svg")
    parser.add_argument("--frames", type=positive_int, default=1, help="of every clip (1)")
    parser.add_argument("--height", type=positive_int, default=256, help="of the centre crop (256)")
    parser.add_argument("--width", type=positive_int, default=256, help="of the centre crop (256)")
    parser.add_argument("--speed-size", type=positive_int, default=256, help="sides of the clip that is timed (256)")
    parser.add_argument("--repeats", type=positive_int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    videos = read_videos(args)
    decoders = [named(text) for text in args.decoders]
    print(
        f"{len(videos)} clips of {args.frames} x {args.height} x {args.width}; speed and memory at {args.speed_size} x "
        f"{args.speed_size}"
    )
    print(HEADER)
    rows = compare(decoders, videos, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "decoders.json").write_text(json.dumps(rows, indent=2) + "\n")
    draw(rows, args.out / "decoders.svg")
    print(f"wrote {args.out / 'decoders.json'} and {args.out / 'decoders.svg'}")


if __name__ == "__main__":
    main()
