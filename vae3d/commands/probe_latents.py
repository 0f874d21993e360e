"""Compare autoencoders by their latents: how easy to diffuse, and how robust the decoders. See docs/latents.md.

Flags: vae3d.commands.flags.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vae3d
from vae3d.checkpoints.location import exists
from vae3d.commands.console import show
from vae3d.data.sources.open_source import open_source
from vae3d.errors import UserError
from vae3d.latents import probe_run
from vae3d.latents.probe_report import console_table, write_report
from vae3d.latents.probe_run import ProbeError, ProbeSettings
from vae3d.latents.scale import unscalable_reason
from vae3d.layout import place
from vae3d.loading import require_file_channels
from vae3d.metrics.frame import Lpips
from vae3d.precision import as_device
from vae3d.pretrained.lpips import LPIPSNet
from vae3d.pretrained.weights import WeightsMissing
from vae3d.report.page import PAGE, check_replaceable
from vae3d.text import plural


def main(args: Namespace) -> None:
    report, pictures = probe(args)
    write_report(args.out, report, pictures, args.command)
    print(console_table(report))
    for line in report["warnings"] + report["notes"]:
        show(line, file=sys.stderr)
    print(f"{args.out / PAGE}, {args.out / 'probes.json'}")


def probe(args: Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report, and pictures of every model. Every UserError is raised before the first probe."""
    settings = ProbeSettings(**{field.name: getattr(args, field.name) for field in fields(ProbeSettings)})
    device = as_device(args.device)
    paths = named(args.models)
    source = open_source(args.source)
    table = source.table()
    models = {name: vae3d.load(path) for name, path in paths.items()}
    for name, model in models.items():
        require_file_channels(model, paths[name], channels=(3,))
    probe_run.check_sizes(models, settings)
    notes = [*getattr(source, "notes", ())]
    notes += [] if settings.tile is None else tile_notes(models, settings)
    lpips = perceptual(settings, device, notes)

    def clips():
        return probe_run.clips(table, settings)

    pixels = probe_run.probe_pixels(clips, settings, {model.spec.space_stride for model in models.values()})
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProbeError(f"--out {args.out}: {error.strerror}; name another folder") from error
    check_replaceable(args.out)
    found, pictures = {}, {}
    for name, model in models.items():
        show(f"{name}: {plural(pixels['clips'], 'clip')}", file=sys.stderr)
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
        "warnings": [
            line
            for name, probes in found.items()
            for line in probe_run.warnings_of(name, probes, unscalable_reason(models[name]))
        ],
        "notes": notes,
        "pixels": pixels,
        "models": found,
    }, pictures


def named(models: list[str]) -> dict[str, Path]:
    """{name: path} of `[NAME=]PATH` arguments; PATH may have a `=`. Raises ProbeError if two have the same name."""
    paths: dict[str, Path] = {}
    for argument in models:
        name, equals, path = argument.partition("=")
        if not equals or "/" in name or exists(argument):
            path = argument
            name = Path(path).name if Path(path).is_dir() else Path(path).stem
        if name in paths:
            raise ProbeError(f"two models are called {name}; give them names: a={paths[name]} b={path}")
        paths[name] = Path(path)
    return paths


def tile_notes(models: dict[str, nn.Module], settings: ProbeSettings) -> list[str]:
    """Which tiles each model is coded in, or why not. Raises UserError for tiles that fit none of the models."""
    tried = {name: probe_run.try_tiles(model, settings) for name, model in models.items()}
    if not any(fits for fits, _ in tried.values()):
        raise UserError("\n  ".join(dict.fromkeys(text for _, text in tried.values())))
    return [f"{name}: {'coded in ' if fits else ''}{text}" for name, (fits, text) in tried.items()]


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
