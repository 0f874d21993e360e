"""What each loss does to flicker and sharpness: fine-tune one decoder for a few steps with each, from the same weights.

    python scripts/benchmarks/compare_losses.py taef2_encoder.pth clips.csv l1 difference=TemporalDifference:1

clips.csv: as for training, with a column `split`; one clip of each `train` row trains, and one of each `val` row is
scored (the middle of each file, centre crop). Each loss is NAME=TERM:WEIGHT[:ARGUMENT=VALUE,...], terms joined by `+`,
beside L1 of weight 1; TERM is a class of vae3d/losses. `l1` alone is L1 by itself. The encoder stays as it is, and
every run sees the same clips in the same order.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from copy import deepcopy
from statistics import fmean

import torch

import vae3d
from vae3d.argparse_types import positive_float, positive_int
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.batches.held_out import validation_clips
from vae3d.data.loader import read_tables
from vae3d.data.sources.open_source import open_source
from vae3d.errors import UserError
from vae3d.latents.scale import spread_clips
from vae3d.losses.gram import Gram
from vae3d.losses.objective import Objective, WeightedTerm
from vae3d.losses.perceptual import LPIPS
from vae3d.losses.pixel import L1
from vae3d.losses.temporal import FlowLoss, TemporalDifference, WarpedConsistency, WindowConsistency
from vae3d.metrics import build_metrics
from vae3d.models.interface import attach_decoder
from vae3d.pixels import as_unit, to_uint8
from vae3d.training.freeze import train_parts
from vae3d.types import ClipBatch

TERMS = {
    term.__name__: term for term in (Gram, LPIPS, TemporalDifference, WarpedConsistency, FlowLoss, WindowConsistency)
}
METRICS = ("psnr", "ssim", "lpips", "flicker", "tpsnr", "sharpness")
COLUMNS = ("psnr", "ssim", "lpips_alex", "flicker_rec", "flicker_excess", "tpsnr", "sharpness")


def parse(text: str) -> tuple[str, Objective]:
    """A loss of the command line: its name, and the objective."""
    name, _, rest = text.partition("=")
    terms = {"l1": WeightedTerm(L1(), 1.0)}
    for part in rest.split("+") if rest else []:
        kind, weight, given = (*part.split(":", 2), "")[:3]
        if kind not in TERMS:
            raise UserError(f"{text}: {kind} is no term; use one of {', '.join(TERMS)}")
        pairs = (pair.split("=", 1) for pair in given.split(",") if pair)
        arguments = {key: int(value) if value.isdigit() else value for key, value in pairs}
        terms[kind] = WeightedTerm(TERMS[kind](**arguments), float(weight))
    return name, Objective(terms, "mean")


def score(model: torch.nn.Module, clips: list[ClipBatch]) -> dict[str, float]:
    metrics, scores = build_metrics(METRICS, "cpu"), []
    for clip in clips:
        with torch.no_grad():
            rec = model(clip.video, sample=False).video
        metrics.update(*(as_unit(to_uint8(video[0])) for video in (clip.video, rec)))
        scores.append({column: score.value for column, score in metrics.result().scores.items()})
    return {column: fmean(score[column] for score in scores) for column in (*COLUMNS, "flicker_ori")}


def row(name: str, scores: dict[str, float]) -> str:
    return " | ".join([f"| {name}", *(f"{scores[column]:.4f}" for column in COLUMNS)]) + " |"


def batches(
    clips: list[ClipBatch], latents: list[torch.Tensor], steps: int
) -> Iterator[tuple[ClipBatch, torch.Tensor]]:
    order = torch.randint(len(clips), (steps,), generator=torch.Generator().manual_seed(0))
    yield from ((clips[i], latents[i]) for i in order.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the autoencoder whose decoder trains")
    parser.add_argument("clips", help="table of videos with a column split")
    parser.add_argument("losses", nargs="+", type=parse)
    parser.add_argument("--steps", type=positive_int, default=100, help="of one clip each (100)")
    parser.add_argument("--lr", type=positive_float, default=2e-5, help="of AdamW (2e-5)")
    parser.add_argument("--size", type=positive_int, default=64, help="of the square crops (64)")
    parser.add_argument("--short-side", type=positive_int, default=144, help="before the crop (144)")
    parser.add_argument("--frames", type=positive_int, default=5, help="of a clip that trains (5)")
    parser.add_argument("--val-frames", type=positive_int, default=9, help="of a clip that is scored (9)")
    args = parser.parse_args()
    settings = ClipSettings(args.size, args.size, short_side=args.short_side)
    tables = read_tables(open_source(args.clips), settings, num_val_files=0, max_broken=0.0)
    held_out, errors = validation_clips(tables.val, settings, args.val_frames, len(tables.val))
    train = spread_clips(tables.train, settings, args.frames, len(tables.train), errors)
    clips = [clip.to("cpu") for clip in train]
    for path, reason in errors:
        raise UserError(f"{path}: {reason}")
    held_out = [clip.to("cpu") for clip in held_out]
    model = vae3d.load(args.checkpoint)
    with torch.no_grad():
        latents = [model.encode(clip.video).mean for clip in clips]
    start = score(model, held_out)
    print(f"{len(clips)} clips train, {len(held_out)} are scored; the originals' flicker is {start['flicker_ori']:.4f}")
    print("| " + " | ".join(["loss", *COLUMNS]) + " |", "|---" * (len(COLUMNS) + 1) + "|", sep="\n")
    print(row("no step", start), flush=True)
    for name, objective in args.losses:
        student = deepcopy(model)
        optimizer = torch.optim.AdamW(train_parts(student, {"decoder": 1.0}), args.lr)
        objective.load("cpu")
        for step, (clip, z) in enumerate(batches(clips, latents, args.steps)):
            out = attach_decoder(student(clip.video, latents=z), student)
            loss, _ = objective(clip, out, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(row(name, score(student, held_out)), flush=True)


if __name__ == "__main__":
    main()
