"""Score reconstructed videos against their originals; see docs/score.md.

    python eval/eval_common_metric.py --base OUT --metric ssim psnr lpips   # OUT_ori, OUT_rec and OUT_spatial
    python eval/eval_common_metric.py --batch_size 2 --real_video_dir OUT_ori --generated_video_dir OUT_rec \\
        --device cuda --sample_fps 24 --crop_size 256 --resolution 256 --num_frames 17 --sample_rate 1 \\
        --metric ssim psnr lpips flolpips                                   # Open-Sora's own protocol
    python eval/eval_common_metric.py --ref OUT_ori --compare A_rec B_rec   # which is better, and how surely
    torchrun --nproc_per_node=8 eval/eval_common_metric.py ...              # the same, shared among processes

Videos are paired by name and decoded once for all metrics. Scores are stored as they are made: the same command goes
on where a killed one stopped. Nothing is downloaded.
"""

from __future__ import annotations

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
import argparse
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from vae3d.argparse_types import positive_float
from vae3d.commands.launch import tell
from vae3d.distributed import process_group_scope
from vae3d.errors import UserError
from vae3d.evaluation.html import write_html
from vae3d.evaluation.pairs import PairError, Protocol, find_pairs
from vae3d.evaluation.score import Job, collect, plan, read_errors, score_jobs, share, write_errors
from vae3d.evaluation.store import Store, VideoScore
from vae3d.evaluation.summary import compare, summarize
from vae3d.evaluation.tables import (
    comparison_table,
    set_table,
    side_by_side,
    write_json,
    write_per_frame,
    write_per_video,
)
from vae3d.inference.folder import remove_unfinished
from vae3d.metrics import METRICS, PRESETS, MetricSet, build_metrics
from vae3d.metrics.presets import require_shapes
from vae3d.precision import as_device


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of 1 or more")
    return int(text)


def size(text: str) -> str | tuple[int, int]:
    sides = text.split("x")
    if text == "ref":
        return text
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text} is neither ref nor HEIGHTxWIDTH, such as 256x448")
    return int(sides[0]), int(sides[1])


def parse(argv: list[str] | None) -> argparse.Namespace:
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
    add("--allow_unmatched", action="store_true", help="score the files that have a partner")
    add = parser.add_argument_group("frames and sizes").add_argument
    add("--num_frames", type=positive, help="compare the first n frames; default all")
    add("--sample_rate", type=positive, default=1, help="take every n-th frame")
    add("--strict_frames", action="store_true", help="refuse videos with fewer than --num_frames")
    add("--frames", choices=("equal", "common"), default="equal", help="common: compare the frames that both have")
    add("--cut", choices=("center", "topleft"), help="cut originals to the size of smaller reconstructions")
    add("--resize", type=size, metavar="ref|HxW", help="scale reconstructions to the original's, or both to HxW")
    add("--resolution", type=positive, help="scale the short side to this, as Open-Sora does; enlarging is warned of")
    add("--crop_size", type=positive, help="centre-crop to this square after scaling; default no crop")
    add("--ignore_fps", action="store_true", help="compare frame by frame although frame rates differ")
    add("--to_8bit", action="store_true", help="score files of more than 8 bits as 8 bits")
    add = parser.add_argument_group("metrics").add_argument
    add(
        "--metric",
        nargs="+",
        metavar="NAME",
        help=f"see below; default ssim psnr, or with --preset panorama {panorama}",
    )
    add("--preset", choices=PRESETS, default="default", help="whose formulas; default %(default)s")
    add("--batch_size", type=positive, default=1, help="only presets that average over batches depend on it")
    add("--rfid_stride", type=positive, default=1, help="rfid takes every n-th frame")
    add("--rfvd_frames", type=positive, default=16, help="rfvd takes the first n frames; default %(default)s")
    add(
        "--pwc_warp",
        choices=("flolpips", "exact"),
        default="flolpips",
        help="exact: warp without the published offset",
    )
    add(
        "--on_missing",
        choices=("stop", "skip"),
        default="stop",
        help="skip: leave out metrics whose weights are missing",
    )
    add = parser.add_argument_group("run and report").add_argument
    add("--device", default="cuda", help="cuda or cpu; without a GPU the CPU computes the same numbers")
    add("--output", type=Path, metavar="DIR", help="default: the reconstruction's folder with _eval behind")
    add("--fresh", action="store_true", help="score again what earlier runs scored")
    add("--per_frame", action="store_true", help="also write per_frame.csv")
    add("--no_html", action="store_true", help="no report.html")
    add("--on_error", choices=("stop", "skip"), default="stop", help="what to do with a pair that cannot be scored")
    add(
        "--sample_fps",
        type=positive_float,
        help="accepted for the original's command line, which did not use it either",
    )
    args = parser.parse_args(argv)
    args.metric = args.metric or PRESETS[args.preset].metrics
    args.ref, args.recs = folders(parser, args)
    return args


def folders(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[Path, dict[str, Path]]:
    """The originals, and the reconstructions by the names that a report calls them."""
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
    try:
        with process_group_scope():
            return evaluate(args)
    except UserError as error:
        tell(error)
    except OSError as error:  # a full disk, a folder that cannot be made
        tell(UserError(f"{error.filename or args.output or 'the output folder'}: {error.strerror or error}"))
    return 2


@dataclass
class Ranks:
    """The processes that share the work."""

    rank: int
    world_size: int
    device: torch.device
    wait: Callable[[], Any]


def join_ranks(device: str) -> Ranks:
    if device.startswith("cuda") and not torch.cuda.is_available():
        if int(os.environ.get("RANK", 0)) == 0:
            print("no CUDA device here: scoring on the CPU", file=sys.stderr)
        device = "cpu"
    chosen = as_device(device)
    if "RANK" not in os.environ:
        return Ranks(0, 1, chosen, lambda: None)
    from accelerate import PartialState  # starts process groups

    state = PartialState(cpu=chosen.type == "cpu", timeout=timedelta(days=7))
    shared = state.device if chosen.type != "cpu" else chosen
    return Ranks(state.process_index, state.num_processes, shared, state.wait_for_everyone)


@dataclass
class Evaluation:
    """One reconstruction."""

    name: str
    rec: Path
    output: Path
    jobs: list[Job]
    unmatched: list[str]
    errors: list[str]


def evaluate(args: argparse.Namespace) -> int:
    ranks = join_ranks(args.device)
    settings = {"rfid": {"stride": args.rfid_stride}, "rfvd": {"frames": args.rfvd_frames}}
    metrics = build_metrics(  # before any file is opened: it names all missing weights
        args.metric,
        ranks.device,
        preset=args.preset,
        on_missing=args.on_missing,
        pwc_warp=args.pwc_warp,
        settings=settings,
    )
    protocol = Protocol(
        num_frames=args.num_frames,
        stride=args.sample_rate,
        frames=args.frames,
        strict_frames=args.strict_frames,
        cut=args.cut,
        resize=args.resize,
        resolution=args.resolution,
        crop=args.crop_size,
        ignore_fps=args.ignore_fps,
        to_8bit=args.to_8bit,
    )
    evaluations = []
    for name, rec in args.recs.items():
        pairs, unmatched = find_pairs(args.ref, rec, args.pair_by, args.allow_unmatched)
        jobs, errors = plan(pairs, protocol, metrics, args.on_error)
        shapes = [(job.info.frames, job.info.height, job.info.width) for job in jobs]
        require_shapes(PRESETS[args.preset], shapes, args.batch_size)
        evaluations.append(Evaluation(name, rec, output_folder(args, name, rec), jobs, unmatched, errors))
    results, summaries = {}, {}
    for evaluation in evaluations:
        with lock(evaluation.output, ranks.rank):
            videos, errors = score(evaluation, metrics, protocol, ranks, args)
            if ranks.rank == 0:
                results[evaluation.name] = videos
                summaries[evaluation.name] = report(evaluation, videos, errors, metrics, protocol, args)
    if ranks.rank == 0 and len(evaluations) > 1:
        differences = compare(results, metrics.columns)
        print(f"\n{side_by_side(summaries)}\n\n{comparison_table(differences)}")
        file = evaluations[0].output / "comparison.json"
        write_json(file, {"reconstructions": {e.name: str(e.rec) for e in evaluations}, "differences": differences})
        print(f"wrote {os.path.relpath(file)}")
    return 1 if any(summary["failed"] for summary in summaries.values()) else 0


def output_folder(args: argparse.Namespace, name: str, rec: Path) -> Path:
    rec = rec.resolve()
    if args.output is None:
        return rec.with_name(f"{rec.name}_eval")
    if args.output.is_file() or not args.output.resolve().parent.is_dir():
        raise PairError(f"--output {args.output} must be a folder, or the name of a new one in an existing folder")
    return args.output if len(args.recs) == 1 else args.output / rec.name


def lock(folder: Path, rank: int) -> AbstractContextManager[object]:
    """Hold the lock of an output folder until the block ends. Raises PairError if another evaluation holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / f".rank{rank}.lock").acquire(timeout=0)
    except Timeout:
        raise PairError(f"{folder} is in use by another evaluation; choose another --output") from None


def score(
    evaluation: Evaluation, metrics: MetricSet, protocol: Protocol, ranks: Ranks, args: argparse.Namespace
) -> tuple[list[VideoScore], list[str]]:
    """Score this process's share; process 0 returns everything."""
    if ranks.rank == 0:
        remove_unfinished(evaluation.output)
    if args.fresh and ranks.rank == 0:
        for file in evaluation.output.glob("rank*.jsonl"):
            file.unlink()
    ranks.wait()
    store = Store(evaluation.output, ranks.rank, metrics)
    known_pairs = store.read()
    todo = [job for job in evaluation.jobs if store.missing(job.key, known_pairs)]
    ranks.wait()  # all have seen the same before anybody adds to it
    if ranks.rank == 0 and len(todo) < len(evaluation.jobs):
        print(f"{len(evaluation.jobs) - len(todo)} of {len(evaluation.jobs)} pairs were scored before")
    mine = share(todo, ranks.rank, ranks.world_size)
    hidden = True if ranks.rank else None  # None: shown on terminals
    with tqdm(total=len(mine), unit="video", desc=evaluation.name, disable=hidden) as bar:
        errors = score_jobs(mine, protocol, store, ranks.device, on_error=args.on_error, finished=bar.update)
    write_errors(store, errors)
    ranks.wait()
    if ranks.rank:
        return [], []
    return collect(evaluation.jobs, store), read_errors(evaluation.output, ranks.world_size)


def report(
    evaluation: Evaluation,
    videos: list[VideoScore],
    errors: list[str],
    metrics: MetricSet,
    protocol: Protocol,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Print and write everything about one reconstruction."""
    failed = [*evaluation.errors, *errors]
    if not videos:
        raise PairError("no pair could be scored:\n" + "\n".join(f"  {reason}" for reason in failed))
    summary = summarize(videos, metrics, protocol, args.preset, args.batch_size) | {
        "real_video_dir": str(args.ref),
        "generated_video_dir": str(evaluation.rec),
        "unmatched": evaluation.unmatched,
        "failed": failed,
    }
    print(set_table(summary))
    absent = [f"{name} is left out: {reason}" for name, reason in metrics.skipped.items()]
    for warning in [*summary["warnings"], *evaluation.unmatched, *failed, *absent]:
        print(f"warning: {warning}", file=sys.stderr)
    folder = evaluation.output
    write_json(folder / "summary.json", summary)
    write_per_video(folder / "per_video.csv", videos)
    if args.per_frame:
        write_per_frame(folder / "per_frame.csv", videos)
    if not args.no_html:
        pairs = {job.pair.name: job.pair for job in evaluation.jobs}
        write_html(folder / "report.html", summary, videos, pairs, protocol, metrics.columns)
    print(f"wrote {os.path.relpath(folder)}")
    return summary


if __name__ == "__main__":
    sys.exit(main())
