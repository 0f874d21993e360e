"""Score reconstructed videos against their originals: SSIM, PSNR, LPIPS.

    python eval/eval_common_metric.py --batch_size 2 --real_video_dir OUT_ori --generated_video_dir OUT_rec \\
        --device cuda --sample_fps 24 --crop_size 256 --resolution 256 --num_frames 17 --sample_rate 1 \\
        --metric ssim psnr lpips

Videos are paired by name. A video's score is the mean of its frames, the set's the mean of its videos; frames are
scored by the definitions of Open-Sora 1.2's eval/vae. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from vae3d.data.readers import MediaError
from vae3d.errors import UserError
from vae3d.evaluation.pairs import PairError, Protocol, find_pairs
from vae3d.evaluation.score import VideoScore, score_pair, summarize, table
from vae3d.metrics import METRICS, MetricError, build_metrics
from vae3d.precision import as_device, without_tf32


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of 1 or more")
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--real_video_dir", type=Path, required=True, help="folder of originals, such as OUT_ori")
    add("--generated_video_dir", type=Path, required=True, help="folder of reconstructions, such as OUT_rec")
    add("--metric", nargs="+", default=["ssim", "psnr"], metavar="NAME", help=f"any of {' '.join(METRICS)}")
    add("--device", default="cuda", help="cuda or cpu; without a GPU the CPU computes the same numbers")
    add("--num_frames", type=positive, help="compare the first n frames; default all")
    add("--sample_rate", type=positive, default=1, help="take every n-th frame")
    add("--resolution", type=positive, help="scale the short side to this; default as the files are")
    add("--crop_size", type=positive, help="centre-crop to this square after scaling; default no crop")
    add(
        "--batch_size",
        type=positive,
        default=1,
        help="accepted for the original's command line; scores do not depend on it",
    )
    add("--sample_fps", type=float, help="accepted for the original's command line, which did not use it either")
    add("--output", type=Path, help="JSON report; default GENERATED_VIDEO_DIR with _eval.json behind")
    add("--allow_unmatched", action="store_true", help="score the files that have a partner")
    add("--ignore_fps", action="store_true", help="compare frame by frame although frame rates differ")
    add("--to_8bit", action="store_true", help="score files of more than 8 bits as 8 bits")
    add("--on_error", choices=("stop", "skip"), default="stop", help="what to do with a pair that cannot be scored")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return evaluate(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def evaluate(args: argparse.Namespace) -> int:
    device = args.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here: scoring on the CPU", file=sys.stderr)
        device = "cpu"
    device = as_device(device)
    without_tf32()
    metrics = build_metrics(args.metric, device)  # before any file is opened: it names all missing weights
    protocol = Protocol(
        args.num_frames, args.sample_rate, args.resolution, args.crop_size, args.ignore_fps, args.to_8bit
    )
    pairs, unmatched = find_pairs(args.real_video_dir, args.generated_video_dir, args.allow_unmatched)

    folder = args.generated_video_dir.resolve()
    output = args.output or folder.with_name(folder.name + "_eval.json")
    if not output.parent.is_dir():
        raise PairError(f"--output {output}: {output.parent} is no folder")

    scores: list[VideoScore] = []
    failed: list[str] = []
    for pair in tqdm(pairs, unit="video", disable=None):
        try:
            scores.append(score_pair(pair, metrics, protocol, device))
        except (PairError, MediaError, MetricError) as error:
            if args.on_error == "stop":
                raise
            failed.append(str(error))
    if not scores:
        raise PairError("no pair could be scored:\n" + "\n".join(f"  {reason}" for reason in failed))

    summary = summarize(scores, metrics, protocol) | {
        "real_video_dir": str(args.real_video_dir),
        "generated_video_dir": str(args.generated_video_dir),
        "device": str(device),
        "unmatched": unmatched,
        "failed": failed,
    }
    print(table(summary))
    for warning in [*(w for video in scores for w in video.info.warnings), *unmatched, *failed]:
        print(f"warning: {warning}", file=sys.stderr)
    if summary["lossy_input"]:
        print("warning: files are stored lossily, so codecs are scored too; infer.py codec=lossless", file=sys.stderr)
    if summary["identical_videos"] == len(scores):
        print("warning: all pairs are identical; is the original scored against itself?", file=sys.stderr)
    output.write_text(json.dumps(summary, indent=2, default=str) + "\n")
    print(f"wrote {os.path.relpath(output)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
