"""Convert a checkpoint to the layout of another program; see docs/checkpoints.md. Flags: vae3d.commands.flags."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from dataclasses import replace

from vae3d.checkpoints.export import WRITERS, check_target
from vae3d.checkpoints.formats import Checkpoint, CheckpointError, read_checkpoint
from vae3d.commands.console import show
from vae3d.io import atomic_files, naming


def main(args: Namespace) -> None:
    if os.path.lexists(args.target):
        raise CheckpointError(f"{args.target} already exists")
    check_target(args.target, args.to)
    checkpoint = read_checkpoint(args.source, args.variant)
    if args.variant is not None and (own := checkpoint.config.get("variant")) != args.variant:
        what = f"of variant {own}" if own else f"a {checkpoint.config['_target_']}"
        raise CheckpointError(f"{checkpoint.path} ({checkpoint.layout}) is {what}; leave out --variant")
    if args.part:
        checkpoint = half(checkpoint, args.part)
    factors = {name: getattr(args, name) for name in ("scaling_factor", "shift_factor")}
    if given := {name: value for name, value in factors.items() if value is not None}:
        checkpoint = with_factors(checkpoint, given)
    with naming(args.target), atomic_files(args.target) as tmp:
        WRITERS[args.to](checkpoint, tmp / args.target.name)
        for file in tmp.iterdir():  # the target, and what a layout puts beside it
            if os.path.lexists(args.target.with_name(file.name)):
                raise CheckpointError(f"{args.target.with_name(file.name)} already exists")
    for note in checkpoint.notes:
        show(f"note: {note}", file=sys.stderr)
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
