"""Score reconstructed videos against their originals; see docs/score.md. Flags: vae3d.commands.flags."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from vae3d.commands.console import show
from vae3d.distributed import init_inference, process_group_scope
from vae3d.evaluation.page import Row, limit_clips, make_report, make_rows, short_names, write_clips
from vae3d.evaluation.pairs import PairError, Protocol, find_pairs
from vae3d.evaluation.score import ScoringJob, collect, plan, score_jobs
from vae3d.evaluation.store import Store, VideoScore
from vae3d.evaluation.summary import compare, require_common, summarize, unequal_sets
from vae3d.evaluation.tables import comparison_table, means_table, set_table, write_per_frame, write_per_video
from vae3d.io import hold_lock, remove_unfinished, write_json
from vae3d.metrics import PRESETS, MetricSet, build_metrics
from vae3d.metrics.presets import require_shapes
from vae3d.progress import progress
from vae3d.report import text_table
from vae3d.report.page import CLIPS, PAGE, check_replaceable, remove_page, unpack_page, write_page

COMPARISON = "comparison.json"


def main(args: Namespace) -> int:
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
    """A folder of reconstructions, paired with the originals. failed: pairs that could not be scored, and why. videos:
    those that were, on every rank. summary: content of summary.json, on the first rank."""

    name: str
    rec: Path
    output: Path
    jobs: list[ScoringJob]
    unmatched: list[str]
    failed: list[str]
    videos: list[VideoScore] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


def evaluate(args: Namespace) -> int:
    """Score every reconstruction; returns the exit status, 1 if a pair could not be scored. args: of parse_eval."""
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
        output = output_folder(args.output, rec, list(args.recs.values()))
        evaluations.append(Evaluation(name, rec, output, jobs, unmatched, failed))
    require_common({evaluation.name: [job.pair.name for job in evaluation.jobs] for evaluation in evaluations})
    common = args.output or evaluations[0].output  # of what compares them
    if not args.no_page:
        check_replaceable(common)
    for evaluation in evaluations:
        with in_use(evaluation.output, ranks):
            score(evaluation, metrics, ranks, device, fresh=args.fresh, on_error=args.on_error)
            if ranks.is_main_process:
                evaluation.summary = summarize_one(evaluation, metrics, protocol, args)
                report(evaluation, per_frame=args.per_frame)
    differences = []
    if len(evaluations) > 1:
        results = {evaluation.name: evaluation.videos for evaluation in evaluations}
        differences = compare(results, metrics.columns)
        if ranks.is_main_process:
            summaries = {evaluation.name: evaluation.summary for evaluation in evaluations}
            print(f"\n{text_table(*means_table(summaries))}\n\n{comparison_table(differences)}")
            for warning in unequal_sets({name: [v.name for v in videos] for name, videos in results.items()}):
                show(f"warning: {warning}", file=sys.stderr)
            file = common / COMPARISON
            write_json(file, {"reconstructions": {e.name: str(e.rec) for e in evaluations}, "differences": differences})
            print(f"wrote {os.path.relpath(file)}")
    if not args.no_page:
        with in_use(common, ranks):
            prepare_page(common, ranks, fresh=args.fresh)
            rows = page_rows(common, evaluations, metrics, ranks, count=args.page_videos, on_error=args.on_error)
            if ranks.is_main_process:
                make_page(common, evaluations, rows, differences, metrics, args.command)
    return 1 if any(evaluation.failed for evaluation in evaluations) else 0


def in_use(folder: Path, ranks: PartialState) -> AbstractContextManager[None]:
    """Create a folder and hold its lock, of this rank."""
    folder.mkdir(parents=True, exist_ok=True)
    error = PairError(f"{folder} is in use by another evaluation; choose another --output")
    return hold_lock(folder / f".rank{ranks.process_index}.lock", error)


def prepare_page(folder: Path, ranks: PartialState, *, fresh: bool) -> None:
    """Make the clips of an earlier page ready to be kept, or with `fresh` delete them."""
    if ranks.is_main_process:
        remove_unfinished(folder / CLIPS)
        if fresh:
            remove_page(folder)
        unpack_page(folder)
    ranks.wait_for_everyone()


def page_rows(
    folder: Path,
    evaluations: Sequence[Evaluation],
    metrics: MetricSet,
    ranks: PartialState,
    *,
    count: int | None,
    on_error: str,
) -> list[Row]:
    """The videos of the page in a folder. The ranks share its clips, of which there are `count`."""
    names, main = short_names(e.name for e in evaluations), ranks.is_main_process
    rows = make_rows({names[e.name]: e.jobs for e in evaluations}, {names[e.name]: e.videos for e in evaluations})
    limit_clips(rows, metrics.columns, count)
    mine = [row for row in rows if not row.why][ranks.process_index :: ranks.num_processes]
    shown = progress(mine, unit="video", desc="page", hidden=not main)
    errors = dict(gather_object(write_clips(folder, shown, on_error)))
    for row in rows:
        row.why = errors.get(row.id, row.why)
    return rows


def make_page(
    folder: Path,
    evaluations: Sequence[Evaluation],
    rows: Sequence[Row],
    differences: Sequence[Mapping[str, Any]],
    metrics: MetricSet,
    command: str,
) -> None:
    """Write the page of all reconstructions. command: to copy."""
    names = short_names(e.name for e in evaluations)
    files = {}
    for evaluation in evaluations:
        prefix = f"{names[evaluation.name]}: " if len(evaluations) > 1 else ""
        written = [evaluation.output / name for name in ("summary.json", "per_video.csv", "per_frame.csv")]
        files |= {prefix + file.name: file for file in written if file.is_file()}
    files |= {COMPARISON: folder / COMPARISON} if differences else {}
    renamed = [row | {key: names[row[key]] for key in ("name", "against")} for row in differences]
    summaries = {names[evaluation.name]: evaluation.summary for evaluation in evaluations}
    write_page(folder, make_report(folder, rows, summaries, metrics, renamed, command, files))
    print(f"wrote {os.path.relpath(folder / PAGE)}")


def output_folder(output: Path | None, rec: Path, recs: Sequence[Path]) -> Path:
    """Where the scores of `rec`, one of `recs`, go. output: as given by the user. Raises PairError."""
    rec = rec.resolve()
    if output is None:
        return rec.with_name(f"{rec.name}_eval")
    if output.is_file() or not output.resolve().parent.is_dir():
        raise PairError(f"--output {output} must be a folder, or the name of a new one in an existing folder")
    if [path.resolve().name for path in recs].count(rec.name) > 1:
        raise PairError(
            f"several reconstructions are named {rec.name}, so --output {output} cannot hold a folder of each; "
            "rename one, or leave --output out: scores then go beside each"
        )
    return output if len(recs) == 1 else output / rec.name


def score(
    evaluation: Evaluation,
    metrics: MetricSet,
    ranks: PartialState,
    device: torch.device,
    *,
    fresh: bool,
    on_error: str,
) -> None:
    """Score this rank's share of the pairs. The scores of all ranks go to evaluation.videos, their errors to `failed`.
    fresh: discard earlier scores."""
    rank, main = ranks.process_index, ranks.is_main_process
    if main:
        remove_unfinished(evaluation.output)
        for file in evaluation.output.glob("rank*.jsonl") if fresh else ():
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
    evaluation.failed += gather_object(score_jobs(jobs, store, device, on_error))
    evaluation.videos = collect(evaluation.jobs, store)


def summarize_one(evaluation: Evaluation, metrics: MetricSet, protocol: Protocol, args: Namespace) -> dict[str, Any]:
    """The content of summary.json. Raises PairError if there are no scores."""
    if not evaluation.videos:
        raise PairError("no pair could be scored:\n" + "\n".join(f"  {reason}" for reason in evaluation.failed))
    return summarize(evaluation.videos, metrics, protocol, args.preset, args.batch_size) | {
        "real_video_dir": str(args.ref),
        "generated_video_dir": str(evaluation.rec),
        "unmatched": evaluation.unmatched,
        "failed": evaluation.failed,
    }


def report(evaluation: Evaluation, *, per_frame: bool) -> None:
    """Print the scores of one reconstruction and write them to its folder."""
    summary, folder = evaluation.summary, evaluation.output
    print(set_table(summary))
    absent = [f"{name} is skipped: {reason}" for name, reason in summary["absent"].items()]
    failed = [f"not scored: {reason}" for reason in evaluation.failed]
    for warning in [*summary["warnings"], *evaluation.unmatched, *failed, *absent]:
        show(f"warning: {warning}", file=sys.stderr)
    write_json(folder / "summary.json", summary)
    write_per_video(folder / "per_video.csv", evaluation.videos)
    for optional in ("per_frame.csv", COMPARISON):  # of an earlier command, perhaps on other frames
        (folder / optional).unlink(missing_ok=True)
    if per_frame:
        write_per_frame(folder / "per_frame.csv", evaluation.videos)
    print(f"wrote {os.path.relpath(folder)}")
