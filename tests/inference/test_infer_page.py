"""infer.py report=true: a page of originals, reconstructions and the 2D VAE's, from the files that were written."""

from __future__ import annotations

import json

import numpy as np
import pytest

import vae3d
from tests import tiny
from tests.evaluation.test_eval_page import content
from tests.inference.test_infer import run
from vae3d.errors import UserError
from vae3d.inference import page as pages
from vae3d.inference.video import write_video

SETTINGS = ["metrics=[psnr]", "height=16", "width=16", "fps=59.94", "report=true"]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    for i, name in enumerate(("a <0>", "b")):
        tiny.write_video(tmp_path / f"source/{name}.mp4", tiny.frames(3, seed=i))
    return tmp_path / "source"


def test_the_page_shows_all_outputs_with_scores_and_links(export, source, tmp_path):
    run(export, source, tmp_path / "out", *SETTINGS)
    folder = tmp_path / "out_report"
    report, clips = content(folder)
    (chapter,) = report["chapters"]
    assert chapter["reconstructions"] == ["rec", "spatial"]
    first = chapter["videos"][0]
    assert (first["name"], first["facts"]["source"]) == ("000001_a-0-", str(source / "a <0>.mp4"))
    clip = clips[first["id"]]
    assert {panel["of"] for panel in clip["panels"]} == {"original", "rec", "spatial"}
    assert (clip["frames"], clip["source"]) == (3, [16, 16])
    assert np.mean(clip["curves"]["rec"]["psnr"]) == pytest.approx(first["scores"]["rec"]["psnr"], rel=1e-5)
    assert (folder / first["links"]["spatial"]).samefile(tmp_path / "out_spatial/000001_a-0-.mp4")
    assert (report["facts"]["codec"], report["facts"]["fps"]) == ("lossless", "59.94")
    weights = json.loads((tmp_path / "out_rec/command.json").read_text())["weights of checkpoint"]
    assert report["facts"]["weights of checkpoint"] == weights
    assert sorted(report["links"]) == ["command.json", "index.csv", "metrics.json"]


def test_a_page_is_added_to_finished_files_and_keeps_its_clips(export, source, tmp_path, monkeypatch):
    run(export, source, tmp_path / "out", *SETTINGS[:-1])
    assert not (tmp_path / "out_report").exists()
    run(export, source, tmp_path / "out", *SETTINGS)
    before = (tmp_path / "out_report/index.html").read_bytes()
    monkeypatch.setattr(pages, "encode_clip", lambda *_: pytest.fail("is encoded again"))
    run(export, source, tmp_path / "out", *SETTINGS)
    assert (tmp_path / "out_report/index.html").read_bytes() == before
    (tmp_path / "out_report/notes.txt").touch()
    run(export, source, tmp_path / "out", *SETTINGS[:-1], "overwrite=true")
    assert [path.name for path in (tmp_path / "out_report").iterdir()] == ["notes.txt"]


def test_files_that_fail_are_named_on_the_page(export, source, tmp_path):
    (source / "c.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"c\.mp4"):
        run(export, source, tmp_path / "out", *SETTINGS, "on_error=skip", "codec=h264")
    report, clips = content(tmp_path / "out_report")
    assert len(clips) == 2
    assert any("codec=h264" in warning for warning in report["warnings"])
    assert any("c.mp4" in warning for warning in report["warnings"])


def test_transparent_pixels_are_shown(tmp_path):
    vae3d.save(tiny.model("taesd", "model.pixel_channels=4"), tmp_path / "model")
    rgba = np.concatenate([tiny.frames(2, 16, 16), np.full((2, 16, 16, 1), 100, np.uint8)], 3)
    write_video(tmp_path / "a.mkv", rgba, 24)
    run(tmp_path / "model", tmp_path / "a.mkv", tmp_path / "out", *SETTINGS)
    _, clips = content(tmp_path / "out_report")
    assert clips["000001_a"]["frames"] == 2
