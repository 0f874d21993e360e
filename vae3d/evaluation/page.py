"""The page of an evaluation: all reconstructions of a command, their scores, and the moving pictures of every video."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vae3d import __version__
from vae3d.data.media import MediaError
from vae3d.evaluation.pairs import PairReader, Protocol
from vae3d.evaluation.score import ScoringJob
from vae3d.evaluation.store import VideoScore
from vae3d.evaluation.summary import unequal_sets
from vae3d.evaluation.tables import means_table, metric_table
from vae3d.hashing import json_hash
from vae3d.metric_names import MEANINGS, PANORAMA, unit
from vae3d.metrics import MetricSet
from vae3d.metrics.base import Better, Nearest, frame_curves
from vae3d.pixels import displayable
from vae3d.report.clip import ORIGINAL
from vae3d.report.page import (
    Chapter,
    Clip,
    Difference,
    Metric,
    Report,
    Table,
    Video,
    clip_ids,
    encode_clip,
    read_clip,
    worst_first,
    write_clip,
)
from vae3d.text import plural

RANKED_BY = ("lpips_alex", "lpips_vgg", "ws_psnr", "psnr", "ssim")  # the first that was computed ranks the videos
MAX_WARNINGS = 30


@dataclass
class Row:
    """A video of the page, of all reconstructions that were scored. why: the reason if it has no clip."""

    id: str
    name: str
    jobs: dict[str, ScoringJob] = field(default_factory=dict)
    scores: dict[str, VideoScore] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    why: str = ""

    @property
    def shown(self) -> dict[str, ScoringJob]:
        """The reconstructions that fit into one clip: those of the first one's frames and size."""
        first = next(iter(self.jobs.values())).info
        fits = (first.frames, first.height, first.width)
        return {n: job for n, job in self.jobs.items() if (job.info.frames, job.info.height, job.info.width) == fits}


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Name or path of a reconstruction -> its name on the page: the last part of the path, if that distinguishes it."""
    names = list(names)
    last = [Path(name).name for name in names]
    short = {n: one if last.count(one) == 1 else n for n, one in zip(names, last, strict=True)}
    return {n: f"{one} (reconstruction)" if one == ORIGINAL else one for n, one in short.items()}


def make_rows(jobs: Mapping[str, Sequence[ScoringJob]], scores: Mapping[str, Sequence[VideoScore]]) -> list[Row]:
    """A row per scored video, sorted by name. Both arguments are by reconstruction."""
    names = sorted({video.name for videos in scores.values() for video in videos})
    rows = {name: Row(id, name) for name, id in clip_ids(names).items()}
    for rec, videos in scores.items():
        by_name = {job.pair.name: job for job in jobs[rec]}
        for video in videos:
            row = rows[video.name]
            row.jobs[rec], row.scores[rec] = by_name[video.name], video
            prefix = f"{rec}: " if len(scores) > 1 else ""
            row.warnings += [prefix + warning.removeprefix(f"{video.name}: ") for warning in video.info.warnings]
    for row in rows.values():
        row.warnings += [
            f"{rec} is not shown: {plural(job.info.frames, 'frame')} of {job.info.width} x {job.info.height} "
            f"differ from those of {next(iter(row.jobs))}"
            for rec, job in row.jobs.items()
            if rec not in row.shown
        ]
    return list(rows.values())


def ranking(rows: Sequence[Row], columns: Mapping[str, Better]) -> tuple[str | None, list[Row]]:
    """The metric that ranks the videos, and the rows from worst to best, see report.page.worst_first.

    None and the rows as they are without such a metric. Rows without a value come last.
    """
    scored = {column for row in rows for column in columns if any(value is not None for value in _values(row, column))}
    by = rank_column({column: better for column, better in columns.items() if column in scored})
    if by is None:
        return None, list(rows)
    order = worst_first({row.id: _values(row, by) for row in rows}, _direction(columns[by]))
    place = {id: index for index, id in enumerate(order)}
    return by, sorted(rows, key=lambda row: place.get(row.id, len(rows)))


def rank_column(columns: Mapping[str, Better]) -> str | None:
    """The first of RANKED_BY, or else the first column that has better and worse values."""
    directed = [column for column, better in columns.items() if better is not None]
    return next((column for column in (*RANKED_BY, *directed) if column in directed), None)


def _values(row: Row, column: str) -> list[float | None]:
    """Of every reconstruction that has the column."""
    return [video.scores[column].value for video in row.scores.values() if column in video.scores]


def limit_clips(rows: Sequence[Row], columns: Mapping[str, Better], count: int | None) -> None:
    """Choose `count` rows that get a clip: a third each the worst, the best, and spread between; the others say why
    not."""
    if count is None or count >= len(rows):
        return
    _, order = ranking(rows, columns)
    third = -(-count // 3)
    worst, best = order[:third], order[len(order) - min(third, count - third) :] if count > third else []
    between = order[len(worst) : len(order) - len(best)]
    left = count - len(worst) - len(best)
    places = [(2 * i + 1) * len(between) // (2 * left) for i in range(left)]  # the middles of `left` equal parts
    chosen = {row.id for row in [*worst, *best, *(between[place] for place in places)]}
    for row in rows:
        if row.id not in chosen:
            row.why = f"--page_videos {count} leaves it out; the page shows the worst, the best and some between"


def write_clips(folder: Path, rows: Iterable[Row], on_error: str = "stop") -> list[tuple[str, str]]:
    """Encode the clips of rows, or keep those of an earlier run whose files and protocol are the same.

    Returns ids and reasons of videos that could not be read, if on_error is `skip`. Raises MediaError and FileError.
    """
    errors = []
    for row in rows:
        key = json_hash([__version__, {rec: job.key for rec, job in row.shown.items()}])
        try:
            clip = read_clip(folder, row.id, key) or _encode(row.shown)
        except MediaError as error:
            if on_error == "stop":
                raise
            errors.append((row.id, str(error)))
            continue
        curves = {rec: frame_curves(video.scores) for rec, video in row.scores.items()}
        write_clip(folder, row.id, clip, curves, key)
    return errors


def _encode(jobs: Mapping[str, ScoringJob]) -> Clip:
    first, *_ = jobs.values()
    with ExitStack() as stack:
        readers = {rec: stack.enter_context(PairReader(job.pair, job.protocol)) for rec, job in jobs.items()}
        original = stack.enter_context(PairReader(first.pair, first.protocol))
        recs = {rec: map(displayable, reader.pictures(original=False)) for rec, reader in readers.items()}
        shown = map(displayable, original.pictures(original=True))
        return encode_clip(shown, recs, first.info.fps / first.protocol.stride)


def page_metrics(columns: Mapping[str, Better]) -> dict[str, Metric]:
    """Label, direction and meaning of columns of scores."""
    return {
        column: Metric(column, _direction(better), MEANINGS.get(column, ""), unit(column))
        for column, better in columns.items()
    }


def _direction(better: Better) -> str | float | None:
    if isinstance(better, Nearest):
        return better.target
    return {True: "higher", False: "lower", None: None}[better]


def make_report(
    folder: Path,
    rows: Sequence[Row],
    summaries: Mapping[str, Mapping[str, Any]],
    metrics: MetricSet,
    differences: Sequence[Mapping[str, Any]],
    command: str,
    files: Mapping[str, Path],
) -> Report:
    """The page of an evaluation, to be written into `folder`.

    summaries: reconstruction -> content of its summary.json. differences: from summary.compare. command: to copy.
    files: label -> file to link.
    """
    recs, first, columns = list(summaries), next(iter(summaries.values())), metrics.columns
    present = {
        c: b for c, b in columns.items() if any(c in video.scores for row in rows for video in row.scores.values())
    }
    ranked_by, _ = ranking(rows, present)
    tables = [
        Table(f"Scores of {rec}" if len(recs) > 1 else "Scores", *metric_table(s)) for rec, s in summaries.items()
    ]
    if len(recs) > 1:
        tables.insert(0, Table("Means", *means_table(summaries)))
    chapter = Chapter(
        "Videos",
        reconstructions=recs,
        metrics=page_metrics(present),
        videos=[_video(folder, row, _is_panorama(row, metrics, first["preset"]["name"])) for row in rows],
        ranked_by=ranked_by,
        tables=tables,
        differences=[_difference(row) for row in differences],
    )
    return Report(
        f"Reconstruction quality: {', '.join(recs if len(recs) > 1 else [Path(first['generated_video_dir']).name])}",
        [chapter],
        facts=_facts(summaries),
        commands=command,
        links={label: os.path.relpath(file, folder) for label, file in files.items()},
        warnings=_warnings(summaries, rows),
    )


def _is_panorama(row: Row, metrics: MetricSet, preset: str) -> bool:
    info = next(iter(row.jobs.values())).info
    twice = info.width == 2 * info.height and any(metric.name in PANORAMA for metric in metrics)
    return preset == "panorama" or twice


def _video(folder: Path, row: Row, panorama: bool) -> Video:
    info = next(iter(row.jobs.values())).info
    links = {ORIGINAL: next(iter(row.jobs.values())).pair.ref} | {rec: job.pair.rec for rec, job in row.jobs.items()}
    size = {"size": f"{info.width} x {info.height}", "frames": str(info.frames)} if row.why else {}  # else of the clip
    facts = size | {"codec of the original": info.codecs[0]}
    facts |= {f"codec of {rec}": job.info.codecs[1] for rec, job in row.jobs.items()}
    return Video(
        row.id,
        row.name,
        scores={rec: {c: s.value for c, s in video.scores.items()} for rec, video in row.scores.items()},
        facts=facts,
        links={label: os.path.relpath(path, folder) for label, path in links.items()},
        clip=not row.why,
        why=row.why,
        panorama=panorama,
        warnings=row.warnings,
    )


def _difference(row: Mapping[str, Any]) -> Difference:
    low, high = row["ci95"]
    shared = {key: row[key] for key in ("name", "against", "metric", "difference", "better_on", "videos")}
    return Difference(low=low, high=high, **shared)


def _facts(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    first, several = next(iter(summaries.values())), len(summaries) > 1
    default, preset = vars(Protocol()), first["preset"]
    facts = {"originals": first["real_video_dir"]}
    facts |= {(rec if several else "reconstructions"): s["generated_video_dir"] for rec, s in summaries.items()}
    facts |= {"videos": f"{first['videos']}, {plural(first['frames'], 'frame')}"}
    facts |= {"preset": ", ".join(f"{key} {value}" if key != "name" else value for key, value in preset.items())}
    protocol = {key: value for key, value in first["protocol"].items() if value != default[key]}
    facts |= {"protocol": _listed(protocol) or "all frames at their own size"}
    facts |= {f"settings of {metric}": _listed(settings) for metric, settings in first["settings"].items()}
    for rec, summary in summaries.items():
        if counts := {key: value for key, value in summary["counts"].items() if value}:
            facts[f"counts of {rec}" if several else "counts"] = _listed(counts)
    for metric, files in first["weights"].items():
        facts[f"weights of {metric}"] = ", ".join(f"{name} (SHA-256 {sha})" for name, sha in files.items())
    if first["background_of_alpha"]:
        facts["background of alpha"] = first["background_of_alpha"]
    return facts | {"versions": _listed(first["versions"])}


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _warnings(summaries: Mapping[str, Mapping[str, Any]], rows: Sequence[Row]) -> list[str]:
    """Of the whole set; those of single videos stand in their rows."""
    own = {warning for row in rows for video in row.scores.values() for warning in video.info.warnings}
    found: dict[str, None] = {}
    for rec, summary in summaries.items():
        prefix = f"{rec}: " if len(summaries) > 1 else ""
        of_set = [warning for warning in summary["warnings"] if warning not in own]
        for warning in [*of_set, *summary["unmatched"], *(f"not scored: {reason}" for reason in summary["failed"])]:
            found[prefix + warning] = None
        found |= {f"{name} is skipped: {reason}": None for name, reason in summary["absent"].items()}
    warnings = list(found)
    if (more := len(warnings) - MAX_WARNINGS) > 0:
        warnings = [*warnings[:MAX_WARNINGS], f"... {more} more in summary.json"]
    warnings += unequal_sets({rec: [row.name for row in rows if rec in row.scores] for rec in summaries})
    if count := sum(bool(row.warnings) for row in rows):
        warnings.append(f"{plural(count, 'video')} of {len(rows)} have warnings of their own, which their rows show")
    return warnings
