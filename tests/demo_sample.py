"""What scripts/demo.sh leaves in its folder, with made-up numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests import tiny
from vae3d.report.page import Chapter, Clip, Difference, Metric, Report, Video, encode_clip, write_clip, write_page

PARAMETERS = 1234


def write_run(folder: Path, name: str, lines: Sequence[Mapping[str, float]], batch: int = 2) -> None:
    """A finished run. lines: of metrics.jsonl."""
    run = folder / "runs" / name
    (run / "exports/step-0000100").mkdir(parents=True)
    config = {"data": {"batch_size": batch}, "trainer": {"accumulate": 1}}
    (run / "launches.jsonl").write_text(json.dumps({"step": 0, "config": config}) + "\n")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_file({"weight": np.zeros((2, PARAMETERS // 2), np.float32)}, run / "exports/step-0000100/model.safetensors")


def write_scores(out: Path, recs: Mapping[str, str], means: Mapping[str, float], panorama: bool = False) -> None:
    """What `vae3d eval --compare` writes. recs: name -> folder in out."""
    for folder in recs.values():
        (out / f"{folder}_eval").mkdir(parents=True)
        metrics = {name: {"mean": value} for name, value in means.items()}
        (out / f"{folder}_eval/summary.json").write_text(json.dumps({"metrics": metrics}))
    write_moving(out / f"{next(iter(recs.values()))}_eval", [*recs], means, panorama)


def write_moving(page: Path, recs: Sequence[str], means: Mapping[str, float], panorama: bool = False) -> None:
    """A page of one clip, of three frames."""
    original = tiny.frames(3, height=16, width=32)
    clip: Clip = encode_clip([original], {rec: [original[::-1].copy()] for rec in recs}, 8)
    write_clip(page, "clip", clip, {rec: {m: [value] * 3 for m, value in means.items()} for rec in recs}, "key")
    video = Video(
        "clip", "a clip", {rec: dict(means) for rec in recs}, panorama=panorama, links={"original": "../o.mp4"}
    )
    metrics = {name: Metric(name, "higher") for name in means}
    gap = [Difference(rec, recs[0], m, 1.0, 0.5, 1.5, 1, 1) for rec in recs[1:] for m in means]
    write_page(
        page, Report("Scores", [Chapter("Videos", "", recs, metrics, [video], next(iter(means)), differences=gap)])
    )


def read_page(page: Path) -> dict:
    """The report in index.html."""
    text = (page / "index.html").read_text()
    return json.loads(text.split('id="report">')[1].split("</script>")[0])
