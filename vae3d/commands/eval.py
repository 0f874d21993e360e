"""Score reconstructed videos against their originals; see docs/score.md.

    python eval/eval_common_metric.py --base OUT --metric ssim psnr lpips   # OUT_ori, OUT_rec and OUT_spatial
    python eval/eval_common_metric.py --batch_size 2 --real_video_dir OUT_ori --generated_video_dir OUT_rec \\
        --device cuda --sample_fps 24 --crop_size 256 --resolution 256 --num_frames 17 --sample_rate 1 \\
        --metric ssim psnr lpips flolpips                                   # Open-Sora's own protocol
    python eval/eval_common_metric.py --ref OUT_ori --compare A_rec B_rec   # which is better, with confidence intervals
    torchrun --nproc_per_node=8 eval/eval_common_metric.py ...              # the same, shared among processes

Videos are paired by name and decoded once for all metrics. The same command resumes after a kill. Nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import os
import sys
from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from vae3d.argparse_types import positive_float, positive_int
from vae3d.distributed import init_inference, process_group_scope
from vae3d.evaluation.html import write_html
from vae3d.evaluation.pairs import PairError, Protocol, find_pairs
from vae3d.evaluation.score import Job, collect, plan, score_jobs
from vae3d.evaluation.store import Store, VideoScore
from vae3d.evaluation.summary import compare, summarize
from vae3d.evaluation.tables import comparison_table, set_table, side_by_side, write_per_frame, write_per_video
from vae3d.io import hold_lock, remove_unfinished, write_json
from vae3d.metrics import METRICS, PRESETS, MetricSet, build_metrics
from vae3d.metrics.presets import require_shapes
from vae3d.progress import progress


def size(text: str) -> str | tuple[int, int]:
    sides = text.split("x")
    if text == "ref":
        return text
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text} is neither ref nor HEIGHTxWIDTH, such as 256x448")
    return int(sides[0]), int(sides[1])


def parse(argv: list[str] | None) -> Namespace:
    listing = "\n".join(f"  {name:20} {entry.summary}" for name, entry in METRICS.items())
    panorama = " ".join(PRESETS["panorama"].metrics)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"metrics:\n{listing}\n  {'lpips':20} lpips_alex, or what the preset uses",
    )
    add = parser.add_argument_group("what is compared").add_argument
    add("--real_video_dir", "--ref", type=Path, metavar="DIR", help="folder of originals, such as OUT_ori")
    add("--generated_video_dir", "--rec", type=Path, metavar="DIR", help="folder of reconstructions, such as OUT_rec")
    add("--base", metavar="OUT", help="prefix of what infer.py wrote: OUT_ori, OUT_rec, OUT_spatial (the ceiling)")
    add("--compare", nargs="+", type=Path, metavar="DIR", help="several reconstructions of the same originals")
    add("--pair_by", choices=("stem", "index_csv", "sorted"), default="stem", help="default: equal names")
    add("--allow_unmatched", action="store_true", help="score only files with a counterpart")
    add = parser.add_argument_group("frames and sizes").add_argument
    add("--num_frames", type=positive_int, help="compare the first n frames; default all")
    add("--sample_rate", dest="stride", type=positive_int, default=1, help="take every n-th frame")
    add("--strict_frames", action="store_true", help="error for videos with fewer than --num_frames")
    add("--frames", choices=("equal", "common"), default="equal", help="common: only the frames that both videos have")
    add("--cut", choices=("center", "topleft"), help="crop originals to the size of smaller reconstructions")
    add("--resize", type=size, metavar="ref|HxW", help="scale reconstructions to the original's, or both to HxW")
    add(
        "--resolution",
        type=positive_int,
        help="scale the short side to this, as Open-Sora does; warns where that enlarges",
    )
    add("--crop_size", dest="crop", type=positive_int, help="centre-crop to this square after scaling; default no crop")
    add("--ignore_fps", action="store_true", help="compare frame by frame although frame rates differ")
    add("--to_8bit", action="store_true", help="score files of more than 8 bits as 8 bits")
    add = parser.add_argument_group("metrics").add_argument
    default = f"default ssim psnr, or with --preset panorama {panorama}"
    add("--metric", nargs="+", metavar="NAME", help=f"see below; {default}")
    add("--preset", choices=PRESETS, default="default", help="formulas of a published evaluation; default %(default)s")
    add("--batch_size", type=positive_int, default=1, help="for presets that average over batches")
    add("--rfid_stride", type=positive_int, default=1, help="rfid takes every n-th frame")
    add("--rfvd_frames", type=positive_int, default=16, help="rfvd takes the first n frames; default %(default)s")
    add(
        "--pwc_warp",
        choices=("flolpips", "exact"),
        default="flolpips",
        help="exact: without the published warp's offset",
    )
    add("--on_missing", choices=("stop", "skip"), default="stop", help="skip: leave out metrics without their weights")
    add = parser.add_argument_group("run and report").add_argument
    add("--device", default="cuda", help="cuda or cpu; without a GPU the CPU computes the same numbers")
    add("--output", type=Path, metavar="DIR", help="default: RECONSTRUCTIONS_eval")
    add("--fresh", action="store_true", help="discard the scores of earlier runs")
    add("--per_frame", action="store_true", help="also write per_frame.csv")
    add("--no_html", action="store_true", help="no report.html")
    add("--on_error", choices=("stop", "skip"), default="stop", help="what to do with a pair that cannot be scored")
    add("--sample_fps", type=positive_float, help="ignored, as by Open-Sora's script")
    args = parser.parse_args(argv)
    args.metric = args.metric or PRESETS[args.preset].metrics
    args.ref, args.recs = folders(parser, args)
    return args


def folders(parser: argparse.ArgumentParser, args: Namespace) -> tuple[Path, dict[str, Path]]:
    """The folder of originals, and the folders of reconstructions by their name in the report."""
    if args.base is not None:
        if args.real_video_dir or args.generated_video_dir or args.compare:
            parser.error("--base names all folders; leave out --ref, --rec and --compare")
        spatial = Path(f"{args.base}_spatial")
        recs = {"rec": Path(f"{args.base}_rec")} | ({"spatial": spatial} if spatial.is_dir() else {})
        return Path(f"{args.base}_ori"), recs
    if args.real_video_dir is None or (args.generated_video_dir is None) == (args.compare is None):
        parser.error("give --ref and --rec, --ref and --compare, or --base")
    if args.compare is None:
        return args.real_video_dir, {"rec": args.generated_video_dir}
    names = [str(path) for path in args.compare]
    if len(names) < 2 or len(set(names)) < len(names):
        parser.error("--compare needs two or more different folders")
    return args.real_video_dir, dict(zip(names, args.compare, strict=True))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with process_group_scope():
        return evaluate(args)


def join_ranks(device: str) -> tuple[PartialState, torch.device]:
    """The processes that share the work, and this one's device: with `cuda`, the GPU of its local rank."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        if int(os.environ.get("RANK", 0)) == 0:
            print("no CUDA device here: scoring on the CPU", file=sys.stderr)
        device = "cpu"
    return init_inference(None if device == "cuda" else device)


@dataclass
class Evaluation:
    """A folder of reconstructions, paired with the originals. failed: pairs that could not be scored, and why."""

    name: str
    rec: Path
    output: Path
    jobs: list[Job]
    unmatched: list[str]
    failed: list[str]


def evaluate(args: Namespace) -> int:
    """Score every reconstruction; returns the exit status, 1 if a pair could not be scored."""
    ranks, device = join_ranks(args.device)
    settings = {"rfid": {"stride": args.rfid_stride}, "rfvd": {"frames": args.rfvd_frames}}
    metrics = build_metrics(  # first, since it names all missing weights
        args.metric, device, preset=args.preset, on_missing=args.on_missing, pwc_warp=args.pwc_warp, settings=settings
    )
    protocol = Protocol(**{field.name: getattr(args, field.name) for field in fields(Protocol)})
    evaluations = []
    for name, rec in args.recs.items():
        pairs, unmatched = find_pairs(args.ref, rec, args.pair_by, args.allow_unmatched)
        jobs, failed = plan(pairs, protocol, metrics, args.on_error)
        shapes = [(job.info.frames, job.info.height, job.info.width) for job in jobs]
        require_shapes(PRESETS[args.preset], shapes, args.batch_size)
        evaluations.append(Evaluation(name, rec, output_folder(args, rec), jobs, unmatched, failed))
    results, summaries = {}, {}
    for evaluation in evaluations:
        folder = evaluation.output
        folder.mkdir(parents=True, exist_ok=True)
        in_use = PairError(f"{folder} is in use by another evaluation; choose another --output")
        with hold_lock(folder / f".rank{ranks.process_index}.lock", in_use):
            videos = score(evaluation, metrics, ranks, device, args)
            if ranks.is_main_process:
                results[evaluation.name] = videos
                summaries[evaluation.name] = report(evaluation, videos, metrics, protocol, args)
    if ranks.is_main_process and len(evaluations) > 1:
        differences = compare(results, metrics.columns)
        print(f"\n{side_by_side(summaries)}\n\n{comparison_table(differences)}")
        file = evaluations[0].output / "comparison.json"
        write_json(file, {"reconstructions": {e.name: str(e.rec) for e in evaluations}, "differences": differences})
        print(f"wrote {os.path.relpath(file)}")
    return 1 if any(summary["failed"] for summary in summaries.values()) else 0


def output_folder(args: Namespace, rec: Path) -> Path:
    rec = rec.resolve()
    if args.output is None:
        return rec.with_name(f"{rec.name}_eval")
    if args.output.is_file() or not args.output.resolve().parent.is_dir():
        raise PairError(f"--output {args.output} must be a folder, or the name of a new one in an existing folder")
    return args.output if len(args.recs) == 1 else args.output / rec.name


def score(
    evaluation: Evaluation, metrics: MetricSet, ranks: PartialState, device: torch.device, args: Namespace
) -> list[VideoScore]:
    """Score this rank's share of the pairs. Returns the scores of all ranks; their errors go to evaluation.failed."""
    rank, main = ranks.process_index, ranks.is_main_process
    if main:
        remove_unfinished(evaluation.output)
        for file in evaluation.output.glob("rank*.jsonl") if args.fresh else ():
            file.unlink()
    ranks.wait_for_everyone()
    store = Store(evaluation.output, rank, metrics)
    store.read()
    todo = [job for job in evaluation.jobs if store.missing(job.key)]
    ranks.wait_for_everyone()  # all ranks read the store before one writes to it
    if main and len(todo) < len(evaluation.jobs):
        print(f"{len(evaluation.jobs) - len(todo)} of {len(evaluation.jobs)} pairs were scored before")
    todo.sort(key=lambda job: (-job.info.frames * job.info.height * job.info.width, job.pair.name))
    mine = todo[rank :: ranks.num_processes]  # largest first, so that all ranks finish at about the same time
    jobs = progress(mine, unit="video", desc=evaluation.name, hidden=not main)
    evaluation.failed += gather_object(score_jobs(jobs, store, device, args.on_error))
    return collect(evaluation.jobs, store)


def report(
    evaluation: Evaluation, videos: list[VideoScore], metrics: MetricSet, protocol: Protocol, args: Namespace
) -> dict[str, Any]:
    """Print the scores of one reconstruction and write them to its folder; returns the summary."""
    if not videos:
        raise PairError("no pair could be scored:\n" + "\n".join(f"  {reason}" for reason in evaluation.failed))
    summary = summarize(videos, metrics, protocol, args.preset, args.batch_size) | {
        "real_video_dir": str(args.ref),
        "generated_video_dir": str(evaluation.rec),
        "unmatched": evaluation.unmatched,
        "failed": evaluation.failed,
    }
    print(set_table(summary))
    absent = [f"{name} is skipped: {reason}" for name, reason in metrics.skipped.items()]
    for warning in [*summary["warnings"], *evaluation.unmatched, *evaluation.failed, *absent]:
        print(f"warning: {warning}", file=sys.stderr)
    folder = evaluation.output
    write_json(folder / "summary.json", summary)
    write_per_video(folder / "per_video.csv", videos)
    if args.per_frame:
        write_per_frame(folder / "per_frame.csv", videos)
    if not args.no_html:
        write_html(folder / "report.html", summary, videos, evaluation.jobs, metrics.columns)
    print(f"wrote {os.path.relpath(folder)}")
    return summary
