"""Measure mean and standard deviation of an autoencoder's latents, and write them into its export.

See docs/latents.md. scripts/latent_stats.py does the same from a latent cache.

    python scripts/measure_scale.py runs/sd_vae_gan photos
    python scripts/measure_scale.py runs/wan_finetune videos.csv --frames 17 --height 480 --width 832 --count 200
    python scripts/measure_scale.py sd_vae_folder photos --out sd_vae_measured

Encodes the centre clip of COUNT files, evenly spread over the source, in fp32, and samples from the posteriors. An
image VAE gets one scaling_factor, 1 / standard deviation of all values, as Stable Diffusion has it (--shift: also
shift_factor, the mean; --per-channel: both for each channel). Other models get latents_mean and
latents_std for each channel. `normalize` then returns latents of unit variance, also in files that
scripts/convert_checkpoint.py writes from the export. Without --out the export is rewritten; of a run, the newest.

--by-pixels sets the deviation of each channel so that equal errors of normalised latents change the decoded pixels
equally, for losses on latents (stages 1 and 2 of a temporal VAE on top). An image VAE also needs --per-channel.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from vae3d.argparse_types import non_negative_int, positive_int
from vae3d.checkpoints import formats
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint, CheckpointError
from vae3d.data.clips import ClipSettings
from vae3d.data.loader import read_tables
from vae3d.data.sources import open_source
from vae3d.inference.scale import LatentStats, ScaleError, measure, rescaled, spread_clips, unscalable_reason
from vae3d.io import atomic_dir, atomic_files, naming
from vae3d.loading import build_from_checkpoint
from vae3d.precision import as_device
from vae3d.text import plural


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="run, export, or published weights")
    parser.add_argument("source", help="a CSV, parquet or JSON file, a folder, or one file")
    parser.add_argument("--count", type=positive_int, default=1000, help="use at most this many files (1000)")
    parser.add_argument("--frames", type=positive_int, default=1, help="per clip (1)")
    parser.add_argument("--height", type=positive_int, default=256, help="of the centre crop (256)")
    parser.add_argument("--width", type=positive_int, default=256)
    add_export_arguments(parser)
    parser.add_argument("--by-pixels", action="store_true", help="scale each channel by its effect on the pixels")
    parser.add_argument("--seed", type=non_negative_int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    checkpoint, model = load_unscaled(args.checkpoint, args.out)
    rescale(checkpoint, model, measure_source(model, args), args)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--shift", action="store_true", help="image VAE: also write the mean")
    how.add_argument("--per-channel", action="store_true", help="image VAE: write mean and deviation per channel")
    parser.add_argument("--out", type=Path, help="write another export instead")


def load_unscaled(path: Path, out: Path | None) -> tuple[Checkpoint, nn.Module]:
    """The checkpoint that is rescaled, and its model. Raises UserError if its scale cannot be changed or written."""
    checkpoint = formats.read_checkpoint(path)
    if out is None and checkpoint.layout != "export":
        raise CheckpointError(f"{checkpoint.path} ({checkpoint.layout}) is not an export; use --out FOLDER")
    if out is not None and out.exists():
        raise CheckpointError(f"--out {out} already exists")
    model = build_from_checkpoint(checkpoint)
    if why := unscalable_reason(model):
        raise ScaleError(f"{checkpoint.path}: {why}")
    formats.load_weights(model, checkpoint.state, str(checkpoint.path))
    return checkpoint, model.eval()


def measure_source(model: nn.Module, args: argparse.Namespace) -> LatentStats:
    settings = ClipSettings(args.height, args.width, channels=model.pixel_channels)
    table = read_tables(open_source(args.source), settings, num_val_files=0, max_broken=1.0).train
    errors: list[tuple[str, str]] = []
    clips = spread_clips(table, settings, args.frames, args.count, errors)
    measured = measure(model.to(as_device(args.device)), clips, args.seed, by_pixels=args.by_pixels)
    for path, reason in errors:
        print(f"skipped: {path}: {reason}", file=sys.stderr)
    return measured


def rescale(checkpoint: Checkpoint, model: nn.Module, measured: LatentStats, args: argparse.Namespace) -> Path:
    """Write the measured scale into args.out, or else into the export itself; returns that folder."""
    new = rescaled(checkpoint, model, measured, shift=args.shift, per_channel=args.per_channel)
    print_scale(checkpoint, new, measured)
    target = args.out or checkpoint.path.parent
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
