"""Score reconstructed videos against their originals; see docs/score.md. Flags: vae3d.commands.flags."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from vae3d.commands.flags import parse_eval
from vae3d.distributed import init_inference, process_group_scope
from vae3d.evaluation.page import limit_clips, make_report, make_rows, short_names, write_clips
from vae3d.evaluation.pairs import PairError, Protocol, find_pairs
from vae3d.evaluation.score import ScoringJob, collect, plan, score_jobs
from vae3d.evaluation.store import Store, VideoScore
from vae3d.evaluation.summary import compare, summarize, unequal_sets
from vae3d.evaluation.tables import comparison_table, means_table, set_table, write_per_frame, write_per_video
from vae3d.io import hold_lock, remove_unfinished, write_json
from vae3d.metrics import PRESETS, MetricSet, build_metrics
from vae3d.metrics.presets import require_shapes
from vae3d.progress import progress
from vae3d.report.page import PAGE, VIDEOS, remove_page, unpack_page, write_page

COMPARISON = "comparison.json"


def main(argv: list[str] | None = None) -> int:
    args = parse_eval(argv)
    command = shlex.join(["vae3d", "eval", *(sys.argv[1:] if argv is None else argv)])
    with process_group_scope():
        return evaluate(args, command)


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
    jobs: list[ScoringJob]
    unmatched: list[str]
    failed: list[str]


def evaluate(args: Namespace, command: str = "") -> int:
    """Score every reconstruction; returns the exit status, 1 if a pair could not be scored. command: for the page."""
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
        with in_use(evaluation.output, ranks):
            results[evaluation.name] = score(evaluation, metrics, ranks, device, args)
            if ranks.is_main_process:
                videos = results[evaluation.name]
                summaries[evaluation.name] = report(evaluation, videos, metrics, protocol, args)
    differences = []
    if len(evaluations) > 1:
        differences = compare(results, metrics.columns)
        if ranks.is_main_process:
            print(f"\n{means_table(summaries)}\n\n{comparison_table(differences)}")
            for warning in unequal_sets({name: [v.name for v in videos] for name, videos in results.items()}):
                print(f"warning: {warning}", file=sys.stderr)
            file = common_folder(args, evaluations) / COMPARISON
            write_json(file, {"reconstructions": {e.name: str(e.rec) for e in evaluations}, "differences": differences})
            print(f"wrote {os.path.relpath(file)}")
    if not args.no_page:
        with in_use(common_folder(args, evaluations), ranks):
            make_page(evaluations, results, summaries, differences, metrics, ranks, args, command)
    return 1 if any(evaluation.failed for evaluation in evaluations) else 0


def in_use(folder: Path, ranks: PartialState) -> AbstractContextManager[None]:
    """Create a folder and hold its lock, of this rank."""
    folder.mkdir(parents=True, exist_ok=True)
    error = PairError(f"{folder} is in use by another evaluation; choose another --output")
    return hold_lock(folder / f".rank{ranks.process_index}.lock", error)


def make_page(
    evaluations: list[Evaluation],
    results: Mapping[str, list[VideoScore]],
    summaries: Mapping[str, dict[str, Any]],
    differences: list[dict[str, Any]],
    metrics: MetricSet,
    ranks: PartialState,
    args: Namespace,
    command: str,
) -> None:
    """Write the page of all reconstructions. The ranks share its clips."""
    folder, main = common_folder(args, evaluations), ranks.is_main_process
    names = short_names(results)
    rows = make_rows({names[e.name]: e.jobs for e in evaluations}, {names[n]: videos for n, videos in results.items()})
    limit_clips(rows, metrics.columns, args.page_videos)
    if main:
        remove_unfinished(folder / VIDEOS)
        if args.fresh:
            remove_page(folder)
        unpack_page(folder)
    ranks.wait_for_everyone()
    mine = [row for row in rows if not row.why][ranks.process_index :: ranks.num_processes]
    shown = progress(mine, unit="video", desc="page", hidden=not main)
    errors = dict(gather_object(write_clips(folder, shown, args.on_error)))
    if not main:
        return
    for row in rows:
        row.why = errors.get(row.id, row.why)
    files = {}
    for evaluation in evaluations:
        prefix = f"{names[evaluation.name]}: " if len(evaluations) > 1 else ""
        written = [evaluation.output / name for name in ("summary.json", "per_video.csv", "per_frame.csv")]
        files |= {prefix + file.name: file for file in written if file.is_file()}
    files |= {COMPARISON: folder / COMPARISON} if differences else {}
    renamed = [row | {key: names[row[key]] for key in ("name", "against")} for row in differences]
    by_name = {names[name]: summary for name, summary in summaries.items()}
    write_page(folder, make_report(folder, rows, by_name, metrics, renamed, command, files))
    print(f"wrote {os.path.relpath(folder / PAGE)}")


def common_folder(args: Namespace, evaluations: list[Evaluation]) -> Path:
    """Of the page and the differences: --output, or where the first reconstruction's scores are."""
    return args.output or evaluations[0].output


def output_folder(args: Namespace, rec: Path) -> Path:
    rec = rec.resolve()
    if args.output is None:
        return rec.with_name(f"{rec.name}_eval")
    if args.output.is_file() or not args.output.resolve().parent.is_dir():
        raise PairError(f"--output {args.output} must be a folder, or the name of a new one in an existing folder")
    if [path.resolve().name for path in args.recs.values()].count(rec.name) > 1:
        raise PairError(
            f"several reconstructions are named {rec.name}, so --output {args.output} cannot hold a folder of each; "
            "rename one, or leave --output out: scores then go beside each"
        )
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
    failed = [f"not scored: {reason}" for reason in evaluation.failed]
    for warning in [*summary["warnings"], *evaluation.unmatched, *failed, *absent]:
        print(f"warning: {warning}", file=sys.stderr)
    folder = evaluation.output
    write_json(folder / "summary.json", summary)
    write_per_video(folder / "per_video.csv", videos)
    if args.per_frame:
        write_per_frame(folder / "per_frame.csv", videos)
    print(f"wrote {os.path.relpath(folder)}")
    return summary
