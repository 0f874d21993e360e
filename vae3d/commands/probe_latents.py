"""Compare autoencoders by their latents: how easy to diffuse, and how robust the decoders. See docs/latents.md.

    python scripts/probe_latents.py runs/vae_a runs/vae_b --source photos/ --height 256 --width 256 --out probes
    python scripts/probe_latents.py ours=runs/wan_finetune wan=Wan2.1_VAE.pth --source videos.csv --frames 17 \\
        --height 256 --width 256 --count 32 --out probes
    python scripts/probe_latents.py Wan2.1_VAE.pth --source room.mp4 --frames 17 --height 512 --width 512 \\
        --per_file 8 --tile 256 --tile_overlap 64 --out probes

A model is a path for vae3d.load; NAME= before it distinguishes two of the same file name. Prints a table; writes
OUT/probes.json and OUT/report.html, which explain each number.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vae3d
from vae3d.argparse_types import non_negative_int, positive_int
from vae3d.data.sources import open_source
from vae3d.latents import probe_run
from vae3d.latents.probe_report import console_table, write_report
from vae3d.latents.probe_run import ProbeError, ProbeSettings
from vae3d.layout import place
from vae3d.metrics.frame import Lpips
from vae3d.models.tiling import Tiled
from vae3d.models.wan import WanVAE
from vae3d.precision import as_device
from vae3d.pretrained.lpips import LPIPSNet
from vae3d.pretrained.weights import WeightsMissing
from vae3d.text import plural


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="[NAME=]PATH")
    parser.add_argument("--source", required=True, help="folder, table (.csv, .parquet, .json), video or image")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--height", type=positive_int, required=True, help="of a clip, cropped from a file")
    parser.add_argument("--width", type=positive_int, required=True)
    parser.add_argument("--frames", type=positive_int, default=1, help="of a clip; 1 for images (1)")
    parser.add_argument("--count", type=positive_int, default=64, help="use at most this many clips (64)")
    parser.add_argument("--decoded", type=positive_int, default=16, help="how many of them the decoder probes use (16)")
    parser.add_argument("--per_file", type=positive_int, default=1, help="clips per file, at random positions (1)")
    parser.add_argument("--short_side", type=positive_int, help="scale files to this before cropping")
    parser.add_argument("--batch", type=positive_int, default=4, help="clips per forward pass (4)")
    parser.add_argument("--seed", type=non_negative_int, default=0)
    parser.add_argument("--tile", type=positive_int, help="also probe coding in tiles of this many pixels (Wan VAEs)")
    parser.add_argument(
        "--tile_overlap", type=non_negative_int, help="blend tiles over this many pixels; default: exact tiles"
    )
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    report, pictures = probe(args)
    write_report(args.out, report, pictures)
    print(console_table(report))
    for line in report["warnings"] + report["notes"]:
        print(line, file=sys.stderr)
    print(f"{args.out / 'report.html'}, {args.out / 'probes.json'}")


def probe(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report, and pictures of every model. Every UserError is raised before the first probe."""
    settings = ProbeSettings(**{field.name: getattr(args, field.name) for field in fields(ProbeSettings)})
    device = as_device(args.device)
    paths = named(args.models)
    table = open_source(args.source).table()
    models = {name: vae3d.load(path) for name, path in paths.items()}
    probe_run.check_sizes(models, settings)
    notes = [] if settings.tile is None else tile_notes(models, settings)
    lpips = perceptual(settings, device, notes)

    def clips():
        return probe_run.clips(table, settings)

    pixels = probe_run.probe_pixels(clips, settings, {model.spec.space_stride for model in models.values()})
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProbeError(f"--out {args.out}: {error.strerror}; name another folder") from error
    found, pictures = {}, {}
    for name, model in models.items():
        print(f"{name}: {plural(pixels['clips'], 'clip')}", file=sys.stderr)
        place(model, device)
        found[name] = probe_run.probe_model(model, clips, settings, lpips)
        pictures[name] = probe_run.decoded_pictures(model, clips, settings, found[name]["statistics"]["std"])
        model.cpu()
    return {
        "source": str(args.source),
        "checkpoints": {name: str(path) for name, path in paths.items()},
        "settings": asdict(settings),
        "device": str(device),
        "versions": {"vae3d": vae3d.__version__, "torch": torch.__version__},
        "warnings": [line for name, probes in found.items() for line in probe_run.warnings_of(name, probes)],
        "notes": notes,
        "pixels": pixels,
        "models": found,
    }, pictures


def named(models: list[str]) -> dict[str, Path]:
    """{name: path} of `[NAME=]PATH` arguments. Raises ProbeError if two have the same name."""
    paths: dict[str, Path] = {}
    for argument in models:
        name, equals, path = argument.partition("=")
        if not equals:
            path = argument
            name = Path(path).name if Path(path).is_dir() else Path(path).stem
        if name in paths:
            raise ProbeError(f"two models are called {name}; give them names: a={paths[name]} b={path}")
        paths[name] = Path(path)
    return paths


def tile_notes(models: dict[str, nn.Module], settings: ProbeSettings) -> list[str]:
    """A note for each model without a tiled mode. Raises UserError if a Wan VAE does not support these tiles."""
    notes = []
    for name, model in models.items():
        if isinstance(model, WanVAE):
            Tiled(model, settings.tile, settings.tile_overlap)
        else:
            notes.append(f"{name}: a {type(model).__name__} cannot be coded in tiles")
    return notes


def perceptual(settings: ProbeSettings, device: torch.device, notes: list[str]) -> nn.Module | None:
    """LPIPS, or None and a note that says why."""
    if min(settings.height, settings.width) < Lpips.min_size:
        notes.append(f"midway LPIPS is skipped: it needs frames of at least {Lpips.min_size} pixels")
        return None
    try:
        return place(LPIPSNet("alex").load(), device)
    except WeightsMissing as error:
        notes.append(f"midway LPIPS is skipped: {error}")
        return None
