"""The page of reconstructed files: original, reconstruction and, of two-stage models, the 2D VAE's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from vae3d import __version__
from vae3d.data.decoding.readers import open_media
from vae3d.evaluation.page import page_metrics, rank_column
from vae3d.evaluation.pairs import pieces
from vae3d.hashing import json_hash
from vae3d.inference.reconstruct import FileResult, Reconstructor
from vae3d.inference.results import Results
from vae3d.io import read_json
from vae3d.metrics.base import frame_curves
from vae3d.pixels import displayable
from vae3d.report import number
from vae3d.report.page import Chapter, Report, Table, Video, clip_id, encode_clip, read_clip, write_clip
from vae3d.text import significant

LABELS = {"ori": "original", "rec": "rec", "spatial": "spatial"}  # kind of output -> on the page
LOSSY = "codec=h264: pictures and errors are those of the written files, scores those of the pixels before the codec"


def write_clips(reconstructor: Reconstructor, files: Iterable[FileResult]) -> None:
    """Encode the clips of files from their outputs, or keep those of the same outputs. Raises MediaError, FileError."""
    folder = reconstructor.folder("report")
    for file in files:
        outputs = dict(reconstructor.outputs(file.id))
        stamps = {kind: (path.name, path.stat().st_size, path.stat().st_mtime_ns) for kind, path in outputs.items()}
        key = json_hash([__version__, stamps])
        clip = read_clip(folder, clip_id(file.id), key)
        if clip is None:
            videos = {LABELS[kind]: read_displayable(path) for kind, path in outputs.items()}
            original = videos.pop("original")
            clip = encode_clip(original, videos, file.fps)
        curves = {"rec": frame_curves(file.result.scores)}
        write_clip(folder, clip_id(file.id), clip, curves, key)


def read_displayable(path: Path) -> Iterator[np.ndarray]:
    """Chunks [T, H, W, 3] uint8 of a video or image. Raises MediaError."""
    with closing(open_media(path, alpha=None)) as reader:
        for indices in pieces(reader.info, reader.info.num_frames):
            yield displayable(reader.read(indices))


def make_report(
    results: Results,
    files: Sequence[FileResult],
    means: Mapping[str, float | None],
    cost: Mapping[str, Any] | None,
    failed: Sequence[str],
    command: str,
) -> Report:
    """The page of <save_dir>_report. means: of the metrics. cost: of measure_cost. failed: files left out, and why."""
    reconstructor = results.reconstructor
    folder, rec, columns = reconstructor.folder("report"), reconstructor.folder("rec"), reconstructor.metrics.columns
    shown = {LABELS[kind]: None for file in files for kind, _ in reconstructor.outputs(file.id)}
    tables = []
    if means:
        tables.append(Table("Means", ["metric", "mean"], [[name, number(mean)] for name, mean in means.items()]))
    if cost is not None:
        rows = [[k.replace("_", " "), significant(v) if isinstance(v, float) else str(v)] for k, v in cost.items()]
        tables.append(Table("Cost, on the first chunk", ["", ""], rows))
    scored = {c: better for c, better in columns.items() if any(c in file.result.scores for file in files)}
    chapter = Chapter(
        "Videos",
        reconstructions=[label for label in shown if label != "original"],
        metrics=page_metrics(scored),
        videos=[_video(reconstructor, file, folder) for file in files],
        ranked_by=rank_column(scored),
        tables=tables,
    )
    written = [rec / name for name in ("index.csv", "metrics.json", "command.json")]
    settings = read_json(rec / "command.json")
    return Report(
        f"Reconstructions: {Path(reconstructor.config.save_dir).name}",
        [chapter],
        facts={"checkpoint": reconstructor.config.checkpoint, "source": reconstructor.config.source}
        | {name: _text(value) for name, value in settings.items() if value not in (None, False, [], {})}
        | {"version": f"vae3d {__version__}"},
        commands=command,
        links={path.name: os.path.relpath(path, folder) for path in written if path.is_file()},
        warnings=[*([LOSSY] if reconstructor.config.codec == "h264" else []), *(f"left out: {f}" for f in failed)],
    )


def _video(reconstructor: Reconstructor, file: FileResult, folder: Path) -> Video:
    scores = {column: score.value for column, score in file.result.scores.items()}
    facts = {"source": file.source}
    facts |= {"first frame": str(file.start)} if file.start else {}
    padding = {"frames": file.pad_frames, "rows": file.pad_bottom, "columns": file.pad_right}
    if any(padding.values()):
        facts["padding"] = ", ".join(f"{value} {name}" for name, value in padding.items() if value)
    return Video(
        clip_id(file.id),
        file.id,
        scores={"rec": scores} if scores else {},
        facts=facts,
        links={LABELS[k]: os.path.relpath(path, folder) for k, path in reconstructor.outputs(file.id)},
        panorama=file.width == 2 * file.height,
        warnings=["the source is smaller and was enlarged, which smooths errors"] if file.enlarged else [],
    )


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
