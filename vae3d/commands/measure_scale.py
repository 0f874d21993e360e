"""Measure mean and standard deviation of an autoencoder's latents, and write them into its export.

Flags: vae3d.commands.flags.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from vae3d.checkpoints import formats
from vae3d.checkpoints.export import check_target, write_export
from vae3d.checkpoints.formats import Checkpoint, CheckpointError
from vae3d.commands.console import show
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.loader import read_tables
from vae3d.data.sources.open_source import open_source
from vae3d.io import atomic_dir, atomic_files, naming
from vae3d.latents.scale import LatentStats, ScaleError, measure, rescaled, spread_clips, unscalable_reason
from vae3d.loading import build_from_checkpoint, require_file_channels
from vae3d.precision import as_device
from vae3d.text import plural


def main(args: Namespace) -> None:
    checkpoint, model = load_unscaled(args.checkpoint, args.out)
    measured = measure_source(model, args)
    rescale(checkpoint, model, measured, args.out, shift=args.shift, per_channel=args.per_channel)


def load_unscaled(path: Path, out: Path | None) -> tuple[Checkpoint, nn.Module]:
    """The checkpoint that is rescaled, and its model. Raises UserError if its scale cannot be changed or written."""
    checkpoint = formats.read_checkpoint(path)
    if out is None and checkpoint.layout != "export":
        raise CheckpointError(f"{checkpoint.path} ({checkpoint.layout}) is not an export; use --out FOLDER")
    if out is not None:
        if out.exists():
            raise CheckpointError(f"--out {out} already exists")
        check_target(out, "export")
    model = build_from_checkpoint(checkpoint)
    require_file_channels(model, path)
    if why := unscalable_reason(model):
        raise ScaleError(f"{checkpoint.path}: {why}")
    formats.load_weights(model, checkpoint.state, str(checkpoint.path))
    return checkpoint, model.eval()


def measure_source(model: nn.Module, args: Namespace) -> LatentStats:
    settings = ClipSettings(args.height, args.width, channels=model.pixel_channels)
    source = open_source(args.source)
    table = read_tables(source, settings, num_val_files=0, max_broken=1.0).train
    for note in getattr(source, "notes", ()):
        show(note, file=sys.stderr)
    errors: list[tuple[str, str]] = []
    clips = spread_clips(table, settings, args.frames, args.count, errors)
    try:
        return measure(
            model.to(as_device(args.device)), clips, args.seed, by_pixels=args.by_pixels, of_means=args.of_means
        )
    finally:
        for path, reason in errors:
            show(f"skipped: {path}: {reason}", file=sys.stderr)


def rescale(
    checkpoint: Checkpoint,
    model: nn.Module,
    measured: LatentStats,
    out: Path | None,
    *,
    shift: bool,
    per_channel: bool,
) -> Path:
    """Write the measured scale into `out`, or else into the export itself; returns that folder. See rescaled."""
    new = rescaled(checkpoint, model, measured, shift=shift, per_channel=per_channel)
    print_scale(checkpoint, new, measured)
    target = out or checkpoint.path.parent
    metadata = export_metadata(checkpoint) | {"latents": measured.facts()}
    with naming(target), atomic_files(target / formats.EXPORT_CONFIG) if target.exists() else atomic_dir(target) as tmp:
        write_export(new, tmp, **metadata)
    print(f"written to {target}")
    return target


def export_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """The entries of an export's model.yaml beside the model itself, such as run and step."""
    if checkpoint.layout != "export":
        return {}
    config = formats.read_export_config(checkpoint.path.with_name(formats.EXPORT_CONFIG))
    return {key: value for key, value in config.items() if key not in ("vae3d", "model")}


def print_scale(old: Checkpoint, new: Checkpoint, measured: LatentStats) -> None:
    size = "several sizes" if measured.size is None else " x ".join(map(str, measured.size))
    print(f"{plural(measured.clips, 'clip')} of {size}")
    print(pd.DataFrame({"mean": measured.mean, "std": measured.std}).to_string(float_format="%.5f", col_space=10))
    mean, std = measured.over_channels()
    print(f"all: mean {mean:.5f}, std {std:.5f}, 1 / std {1 / std:.5f}")
    for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        if new.config.get(name) != old.config.get(name):
            print(f"{name}: {_short(old.config.get(name))} -> {_short(new.config[name])}")


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(f'{number:.4f}' for number in value)}]"
    return "none" if value is None else f"{value:.5f}"
