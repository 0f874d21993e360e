"""Score linear codes of every four 2D latents on held-out clips: what a temporal VAE on top of TAEF2 can win.

    python scripts/benchmarks/score_temporal_codes.py taef2_encoder.pth clips.csv runs/temporal_taef2 ...

clips.csv: as for training, with a column `split`; the codes are fitted to its `train` rows and scored on its `val` rows
(the middle 17 frames of each, centre crop). Runs and exports are scored on the same clips.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pandas as pd
import torch
from torch import Tensor

import vae3d
from vae3d.argparse_types import positive_int
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.batches.held_out import validation_clips
from vae3d.data.loader import read_tables
from vae3d.data.sources.open_source import open_source
from vae3d.latents.scale import spread_clips
from vae3d.loading import initialize
from vae3d.training.linear_code import fit_shortcut

FRAMES, METRICS = 17, ("psnr", "ssim", "sharpness", "lpips")


def repeat_first_of_four(latent: Tensor) -> Tensor:
    """The first frame by itself, then groups of four frames, each shown as its first."""
    index = torch.arange(latent.shape[2])
    return latent[:, :, torch.where(index == 0, 0, 1 + (index - 1) // 4 * 4)]


def hold(latent: Tensor) -> Tensor:
    return latent[:, :, :1].expand_as(latent)


def colour_shift(video: Tensor, reconstruction: Tensor) -> float:
    """The mean error of the colour that is off most, in levels of 255."""
    return (reconstruction - video).mean((0, 2, 3, 4)).abs().max().item() * 127.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spatial", help="weights of TAEF2")
    parser.add_argument("clips", help="table of videos with a column split")
    parser.add_argument("runs", nargs="*", type=Path, help="runs and exports to score on the same clips")
    parser.add_argument("--channels", nargs="*", type=positive_int, default=[32, 48, 64, 96])
    parser.add_argument("--size", type=positive_int, default=96, help="of the square crops (96)")
    parser.add_argument("--short-side", type=positive_int, default=144, help="before the crop (144)")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    settings = ClipSettings(args.size, args.size, short_side=args.short_side)
    tables = read_tables(open_source(args.clips), settings, num_val_files=0, max_broken=0.0)
    held_out, _ = validation_clips(tables.val, settings, FRAMES, len(tables.val))
    videos = [clip.to("cpu").video for clip in held_out]
    rows = []

    def add(name: str, channels: int | None, code: Callable[[Tensor], Tensor]) -> None:
        pairs = [(video, code(video)) for video in videos]
        scores = [vae3d.score(*pair, metrics=METRICS) | {"colour_shift": colour_shift(*pair)} for pair in pairs]
        rows.append({"code": name, "channels": channels} | {m: fmean(s[m] for s in scores) for m in scores[0]})
        print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.3f", header=len(rows) == 1), flush=True)

    print(f"{len(videos)} held-out clips of {FRAMES} x {args.size} x {args.size}")
    for channels in args.channels:
        model = vae3d.build("temporal_taef2", f"model.temporal.latent_channels={channels}", "model.temporal.channels=8")
        initialize(model, {"spatial_vae": args.spatial})
        model.eval()
        if not rows:
            add("all latents (the ceiling)", None, lambda v, m=model: m.decode_spatial(m.encode_spatial(v)))
            for code in (hold, repeat_first_of_four):
                add(code.__name__, None, lambda v, m=model, c=code: m.decode_spatial(c(m.encode_spatial(v))))
        add("DCT", channels, lambda v, m=model: m(v, sample=False).video)
        fit_shortcut(model, spread_clips(tables.train, settings, FRAMES, len(tables.train), []))
        add("fitted", channels, lambda v, m=model: m(v, sample=False).video)
    for run in args.runs:
        model = vae3d.load(run)
        add(str(run), model.spec.channels, lambda v, m=model: m(v, sample=False).video)


if __name__ == "__main__":
    main()
