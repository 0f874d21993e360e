"""The page of an evaluation: rows, clips, differences and facts of every reconstruction, resumable and limited."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.scoring import degrade, evaluate, make_pairs, original
from vae3d.commands import eval as script
from vae3d.commands.flags import parse_eval
from vae3d.evaluation import page as pages
from vae3d.evaluation.pairs import Pair, PairError, PairReader, Protocol
from vae3d.inference.video import write_image, write_video
from vae3d.io import FileError
from vae3d.metric_names import MEANINGS
from vae3d.metrics.registry import METRICS, columns_of
from vae3d.report import page as report_pages

PSNR = ("--metric", "psnr")


def content(folder: Path) -> tuple[dict, dict[str, dict]]:
    """The report and the clips inside a page."""
    text = (folder / "index.html").read_text()
    clips = re.findall(r'class="clip" data-id="([^"]+)">(.*?)</script>', text, re.DOTALL)
    report = json.loads(re.search(r'id="report">(.*?)</script>', text, re.DOTALL)[1])
    return report, {id: json.loads(clip) for id, clip in clips}


def run(*words: object) -> int:
    return script.main(parse_eval([*map(str, words), "--device", "cpu"]))


def test_every_column_of_every_metric_has_a_meaning_of_one_sentence():
    columns = columns_of(list(METRICS))
    assert columns.keys() == MEANINGS.keys()
    assert all(meaning.endswith(".") for meaning in MEANINGS.values())
    described = pages.page_metrics(columns | {"mae": False})  # one of the user's own, which may have none
    assert (described["psnr"].better, described["psnr"].unit, described["rfvd"].better) == ("higher", "dB", "lower")
    assert (described["seam_ratio"].better, described["flicker_ori"].better, described["tof"].unit) == (
        1.0,
        None,
        "pixels",
    )


def test_compare_writes_one_page_of_all_reconstructions(tmp_path, monkeypatch):
    ori, _ = make_pairs(tmp_path, 2, kind="a")
    for kind, amount in (("b", 2.0), ("original", 9.0)):
        make_pairs(tmp_path, 2, kind=kind, amount=amount)
    recs = [tmp_path / f"x_{kind}" for kind in ("a", "b")] + [(tmp_path / "x_original").rename(tmp_path / "original")]
    monkeypatch.chdir(tmp_path)
    assert run("--ref", ori, "--compare", *recs, *PSNR, "ssim", "--per_frame") == 0
    report, clips = content(tmp_path / "x_a_eval")
    (chapter,) = report["chapters"]
    names = ["x_a", "x_b", "original (reconstruction)"]
    assert (chapter["reconstructions"], chapter["ranked_by"]) == (names, "psnr")
    row = chapter["videos"][1]
    assert (row["name"], row["panorama"], list(row["scores"])) == ("v1", False, names)
    assert row["links"]["x_b"] == "../x_b/v1.mp4"
    assert (tmp_path / "x_a_eval" / row["links"]["original"]).samefile(ori / "v1.mp4")
    clip = clips[row["id"]]
    assert {panel["of"] for panel in clip["panels"]} == {"original", *names}
    assert (clip["frames"], clip["source"]) == (6, [40, 48])
    curve = clip["curves"]["x_b"]["psnr"]
    assert np.mean(curve) == pytest.approx(row["scores"]["x_b"]["psnr"], abs=0.01)
    told = json.loads((tmp_path / "x_a_eval/comparison.json").read_text())["differences"]
    assert len(chapter["differences"]) == len(told) == 6
    shown = {(d["name"], d["metric"]): d["difference"] for d in chapter["differences"]}
    expected = next(d for d in told if d["name"].endswith("x_b") and d["metric"] == "psnr")["difference"]
    assert shown["x_b", "psnr"] == pytest.approx(expected, rel=1e-4)
    assert report["commands"].startswith(f"vae3d eval --ref {ori} --compare ")
    assert report["links"]["x_b: per_frame.csv"] == "../x_b_eval/per_frame.csv"
    assert {"preset", "protocol", "versions", "originals"} <= report["facts"].keys()
    assert chapter["tables"][0]["title"] == "Means"
    assert report["title"] == f"Reconstruction quality: {', '.join(names)}"


def test_with_output_the_common_page_stands_above_the_folders_of_the_reconstructions(tmp_path):
    ori, first = make_pairs(tmp_path, 1)
    _, second = make_pairs(tmp_path, 1, kind="b", amount=2.0)
    out = tmp_path / "out"
    assert run("--ref", ori, "--compare", first, second, *PSNR, "--output", out) == 0
    files = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert files == {"index.html", "comparison.json", first.name, second.name}
    links = content(out)[0]["links"]
    assert links["comparison.json"] == "comparison.json"
    assert links[f"{second.name}: per_video.csv"] == f"{second.name}/per_video.csv"


def test_base_shows_the_spatial_ceiling_beside(tmp_path):
    make_pairs(tmp_path, 1)
    make_pairs(tmp_path, 1, kind="spatial", amount=1.0)
    assert run("--base", tmp_path / "x", *PSNR) == 0
    report, clips = content(tmp_path / "x_rec_eval")
    assert report["chapters"][0]["reconstructions"] == ["rec", "spatial"]
    assert ("spatial", "picture") in {(panel["of"], panel["layer"]) for panel in clips["v0"]["panels"]}


def test_clips_are_kept_while_files_and_reconstructions_are_the_same(tmp_path, monkeypatch):
    """Also after a kill, and where more metrics are scored."""
    ori, rec = make_pairs(tmp_path)
    encoded, encode = [], pages.encode_clip

    def counted(*args: object) -> object:
        encoded.append(args)
        if len(encoded) == 2 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(pages, "encode_clip", counted)
    with pytest.raises(KeyboardInterrupt):
        run("--ref", ori, "--rec", rec, *PSNR)
    assert len(encoded) == 2
    assert run("--ref", ori, "--rec", rec, *PSNR) == 0
    assert len(encoded) == 2 + 2
    before = (tmp_path / "x_rec_eval/index.html").read_bytes()
    assert run("--ref", ori, "--rec", rec, *PSNR) == 0
    assert (tmp_path / "x_rec_eval/index.html").read_bytes() == before
    assert run("--ref", ori, "--rec", rec, *PSNR, "ssim") == 0
    assert "ssim" in content(tmp_path / "x_rec_eval")[1]["v0"]["curves"]["rec"]
    assert len(encoded) == 2 + 2
    write_video(rec / "v1.mp4", degrade(original(1), 9.0, seed=5), 24)
    assert run("--ref", ori, "--rec", rec, *PSNR) == 0
    assert len(encoded) == 2 + 2 + 1
    assert run("--ref", ori, "--rec", rec, *PSNR, "--fresh") == 0
    assert len(encoded) == 2 + 2 + 1 + 3


def test_page_videos_keeps_the_worst_and_the_best_and_says_so_in_the_other_rows(tmp_path, monkeypatch):
    ori, rec = make_pairs(tmp_path, 7)
    monkeypatch.setattr(report_pages, "SINGLE_FILE_BYTES", 0)
    assert evaluate(ori, rec, *PSNR, "--page", "--page_videos", "3") == 0
    folder = tmp_path / "x_rec_eval"
    videos = content(folder)[0]["chapters"][0]["videos"]
    assert [video["name"] for video in videos if video["clip"]] == ["v0", "v3", "v6"]
    assert all("--page_videos 3" in video["why"] for video in videos if not video["clip"])
    assert sorted(path.name for path in (folder / "index_clips").iterdir()) == [
        f"v{i}.{s}" for i in (0, 3, 6) for s in ("jpg", "js")
    ]


@pytest.mark.parametrize("count", range(1, 9))
def test_as_many_videos_are_shown_as_asked_for(count):
    for total in range(max(count, 2), 13):
        rows = [pages.Row(str(i), str(i), scores={"rec": tiny_score(i)}) for i in range(total)]
        pages.limit_clips(rows, {"psnr": True}, count)
        shown = [row.id for row in rows if not row.why]
        assert len(shown) == count
        assert "0" in shown
        assert (str(total - 1) in shown) == (count > 1)


def test_the_worst_videos_that_are_shown_are_those_that_the_page_marks():
    scores = {"a": [3.0, 9.0, 6.0, 5.0], "b": [8.0, 1.0, 6.0, 5.0]}  # means 5.5, 5, 6, 5
    rows = [pages.Row(str(i), str(i), scores={rec: tiny_score(scores[rec][i]) for rec in scores}) for i in range(4)]
    _, order = pages.ranking(rows, {"psnr": True})
    assert [row.id for row in order] == ["1", "3", "0", "2"]


def tiny_score(value: float) -> pages.VideoScore:
    from vae3d.metrics import Score

    return pages.VideoScore(str(value), None, {"psnr": Score(float(value))}, {}, {})


def test_panoramas_images_and_warnings_are_marked(tmp_path):
    wide = tiny.frames(1, 32, 64)[0]
    write_image(tmp_path / "o/p.png", wide)
    write_image(tmp_path / "r/p.png", wide ^ 4)
    assert evaluate(tmp_path / "o", tmp_path / "r", "--metric", "psnr", "ws_psnr", "--resolution", "64", "--page") == 0
    report, clips = content(tmp_path / "r_eval")
    (video,) = report["chapters"][0]["videos"]
    assert (video["panorama"], clips["p"]["frames"], clips["p"]["fps"]) == (True, 1, 0)
    assert any("upscaled before scoring" in warning for warning in report["warnings"])
    assert evaluate(tmp_path / "o", tmp_path / "r", *PSNR, "--page") == 0
    assert content(tmp_path / "r_eval")[0]["chapters"][0]["videos"][0]["panorama"] is False


def test_a_reconstruction_of_another_length_is_left_out_of_the_clip_with_a_warning(tmp_path):
    ori, a = make_pairs(tmp_path, 1, kind="a")
    write_video(tmp_path / "x_b/v0.mp4", degrade(original(0))[:4], 24)
    assert run("--ref", ori, "--compare", a, tmp_path / "x_b", "--frames", "common", *PSNR) == 0
    report, clips = content(tmp_path / "x_a_eval")
    warnings = report["chapters"][0]["videos"][0]["warnings"]
    assert any("x_b is not shown: 4 frames of 48 x 40" in warning for warning in warnings)
    assert {panel["of"] for panel in clips["v0"]["panels"]} == {"original", "x_a"}


@pytest.mark.parametrize("options", [[], ["--cut", "center"], ["--crop_size", "32"], ["--resize", "20x24"]])
def test_the_clip_shows_the_frames_that_are_scored(options, tmp_path):
    ori, rec = make_pairs(tmp_path, 1)
    protocol = Protocol(stride=2, num_frames=3, **{
        "--cut": {"cut": "center"}, "--crop_size": {"crop": 32}, "--resize": {"resize": (20, 24)}
    }.get((options or [""])[0], {}))  # fmt: skip
    with PairReader(Pair("v0", ori / "v0.mp4", rec / "v0.mp4"), protocol) as reader:
        for original, expected in ((True, reader.read(range(3))[0]), (False, reader.read(range(3))[1])):
            (shown,) = reader.pictures(original)
            assert np.array_equal(shown, np.rint(255 * expected.permute(0, 2, 3, 1).numpy()).astype(np.uint8))
    assert evaluate(ori, rec, *PSNR, "--sample_rate", "2", "--num_frames", "3", *options, "--page") == 0
    clip = content(tmp_path / "x_rec_eval")[1]["v0"]
    assert (clip["frames"], clip["fps"], clip["source"]) == (3, 12, list(shown.shape[1:3]))


def test_failed_and_unmatched_files_are_named(tmp_path):
    ori, rec = make_pairs(tmp_path)
    (rec / "v1.mp4").write_bytes(b"no video")
    (rec / "v2.mp4").unlink()
    assert evaluate(ori, rec, *PSNR, "--on_error", "skip", "--allow_unmatched", "--page") == 1
    report, clips = content(tmp_path / "x_rec_eval")
    assert list(clips) == ["v0"]
    assert any("v1.mp4" in warning for warning in report["warnings"])
    assert any("v2" in warning for warning in report["warnings"])


def test_reconstructions_of_different_videos_are_compared_on_those_that_both_have(tmp_path, capsys):
    ori, _ = make_pairs(tmp_path, 3, kind="a")
    make_pairs(tmp_path, 3, kind="b", amount=9.0)
    (tmp_path / "x_b/v1.mp4").write_bytes(b"no video")
    assert run("--ref", ori, "--compare", tmp_path / "x_a", tmp_path / "x_b", *PSNR, "--on_error", "skip") == 1
    report, clips = content(tmp_path / "x_a_eval")
    assert len(clips) == 3
    assert {row["videos"] for row in report["chapters"][0]["differences"]} == {2}
    for shown in (report["warnings"], capsys.readouterr().err.splitlines()):
        assert any("not scored: " in warning and "v1.mp4" in warning for warning in shown)
        assert any("x_a 3" in warning and "x_b 2" in warning for warning in shown)


def test_reconstructions_of_one_name_are_refused_with_output(tmp_path):
    ori, rec = make_pairs(tmp_path, 1)
    (tmp_path / "other").mkdir()
    other = rec.rename(tmp_path / "other" / rec.name)
    make_pairs(tmp_path, 1)
    with pytest.raises(PairError, match="several reconstructions are named x_rec"):
        run("--ref", ori, "--compare", rec, other, *PSNR, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_page_writes_none_and_a_page_replaces_none_of_another_program(tmp_path):
    ori, rec = make_pairs(tmp_path, 1)
    assert evaluate(ori, rec, *PSNR) == 0
    other = tmp_path / "x_rec_eval/index.html"
    assert not other.exists()
    other.write_text("<h1>my page</h1>")
    with pytest.raises(FileError, match=r"x_rec_eval/index.html is no page of vae3d"):
        run("--ref", ori, "--rec", rec, *PSNR)
    assert other.read_text() == "<h1>my page</h1>"
