"""Convert a checkpoint to the layout of another program; see docs/checkpoints.md.

    python scripts/convert_checkpoint.py runs/opensora_stage3 opensora_folder --to opensora
    python scripts/convert_checkpoint.py sd_vae.safetensors sd_vae_folder --to diffusers --scaling_factor 0.18215
    python scripts/convert_checkpoint.py sd_vae_folder sd_vae.safetensors --to ldm
    python scripts/convert_checkpoint.py runs/opensora_stage3 sdxl_vae --part spatial --to diffusers
    python scripts/convert_checkpoint.py runs/wan_finetune wan_vae.pth --to wan
    python scripts/convert_checkpoint.py lightning.ckpt::ema_model vae --to export --scaling_factor 0.18215

Reads every checkpoint that vae3d.load reads. If the target layout has no place for the latents' mean and standard
deviation, they are folded into the weights where that is exact; otherwise the command fails.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from vae3d.argparse_types import finite_float, positive_float
from vae3d.checkpoints.export import WRITERS
from vae3d.checkpoints.formats import Checkpoint, CheckpointError, read_checkpoint
from vae3d.io import atomic_files, naming


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="file, folder, export or run")
    parser.add_argument("target", type=Path, help="folder to write; for ldm, wan, videox_fun and taehv a file")
    parser.add_argument("--to", required=True, choices=WRITERS)
    parser.add_argument("--part", choices=("spatial", "temporal"), help="only this half of an Open-Sora VAE")
    parser.add_argument("--variant", help="TAEHV variant, if the file does not name it")
    parser.add_argument(
        "--scaling_factor", type=positive_float, help="of an image VAE's latents, if the file does not contain it"
    )
    parser.add_argument("--shift_factor", type=finite_float, help="of an image VAE's latents, likewise")
    args = parser.parse_args(argv)
    if args.target.exists():
        raise CheckpointError(f"{args.target} already exists")
    checkpoint = read_checkpoint(args.source, args.variant)
    if args.part:
        checkpoint = half(checkpoint, args.part)
    factors = {name: getattr(args, name) for name in ("scaling_factor", "shift_factor")}
    if given := {name: value for name, value in factors.items() if value is not None}:
        checkpoint = with_factors(checkpoint, given)
    with naming(args.target), atomic_files(args.target) as tmp:
        WRITERS[args.to](checkpoint, tmp / args.target.name)
    for note in checkpoint.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{checkpoint.path} ({checkpoint.layout}) -> {args.target} ({args.to})")


def half(checkpoint: Checkpoint, part: str) -> Checkpoint:
    """The spatial or temporal VAE of an Open-Sora VAE, as a checkpoint of its own."""
    if part not in checkpoint.config:
        raise CheckpointError(f"{checkpoint.path} is a {checkpoint.config['_target_']}, which has no {part} half")
    return replace(checkpoint, config=checkpoint.config[part], state=checkpoint.part(f"{part}_vae"))


def with_factors(checkpoint: Checkpoint, factors: dict[str, float]) -> Checkpoint:
    """The checkpoint of an image VAE with another scaling_factor or shift_factor."""
    if not checkpoint.config["_target_"].endswith(".SpatialVAE"):
        raise CheckpointError(f"{checkpoint.path} is a {checkpoint.config['_target_']}, which has no scaling_factor")
    notes = [note for note in checkpoint.notes if "scaling factor" not in note]
    return replace(checkpoint, config=checkpoint.config | factors, notes=notes)
