"""Which pairs are scored, and what is said of those that cannot be."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.scoring import degrade, evaluate, make_pairs, one_pair, refused, report, write_two_sizes
from vae3d.data.decoding.readers import open_media
from vae3d.evaluation.pairs import Pair, PairReader, Protocol
from vae3d.inference.video import write_image, write_video

PSNR = ("--metric", "psnr")


@pytest.fixture
def folders(tmp_path):
    return make_pairs(tmp_path)


def test_pairs_are_found_by_name_with_the_suffix_aside(tmp_path):
    clip = tiny.frames(3)
    write_video(tmp_path / "a/sub/one_ori.mp4", clip, 24)
    write_video(tmp_path / "b/sub/one_rec.mp4", clip, 24)
    write_image(tmp_path / "a/two.png", clip[0])
    write_image(tmp_path / "b/two_rec.png", clip[1])
    write_image(tmp_path / "b/.two.png", clip[1])
    write_image(tmp_path / "b/.ipynb_checkpoints/two-checkpoint.png", clip[1])
    assert evaluate(tmp_path / "a", tmp_path / "b", *PSNR) == 0
    assert [video["name"] for video in report(tmp_path / "b")["per_video"]] == ["sub/one", "two"]


def test_missing_and_empty_folders_are_refused_and_not_made(folders, tmp_path, capsys):
    ori, _ = folders
    assert f"{tmp_path}/none: no such folder" in refused(capsys, ori, tmp_path / "none")
    assert "vae3d infer source=URL" in refused(capsys, "s3://bucket/ori", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "void").mkdir()
    assert f"{tmp_path}/void holds no video or image" in refused(capsys, ori, tmp_path / "void")
    assert "is given as original and as reconstruction" in refused(capsys, ori, ori)
    for folder in folders:
        (folder / "v1.mp4").rename(os.fsdecode(os.fsencode(folder) + b"/\xff.mp4"))
    assert r"\xff.mp4' is not UTF-8" in refused(capsys, *folders)


def test_files_without_partner_are_listed_and_left_out_on_request(folders, capsys):
    ori, rec = folders
    (rec / "v1.mp4").rename(rec / "w1.mp4")
    message = refused(capsys, ori, rec)
    assert "2 files without a partner of the same name, 2 with one:" in message
    assert f"only in {ori}: v1" in message
    assert f"only in {rec}: w1" in message
    assert "--allow_unmatched" in message
    assert evaluate(ori, rec, *PSNR, "--allow_unmatched") == 0
    assert report(rec)["unmatched"] == [f"only in {ori}: v1", f"only in {rec}: w1"]
    assert report(rec)["videos"] == 2


def test_ten_of_many_unmatched_are_shown_of_either_side(tmp_path, capsys):
    for i in range(12):
        write_image(tmp_path / f"a/a{i:02}.png", tiny.frames(1)[0])
        write_image(tmp_path / f"b/b{i:02}.png", tiny.frames(1)[0])
    message = refused(capsys, tmp_path / "a", tmp_path / "b")
    assert "24 files without a partner of the same name, 0 with one:" in message
    assert message.count(f"only in {tmp_path / 'a'}") == message.count(f"only in {tmp_path / 'b'}") == 10
    assert message.count("... 2 more") == 2
    assert "--allow_unmatched" not in message


@pytest.mark.parametrize("second", ["V0.png", "v0.png"])
def test_two_files_of_one_name_are_refused(folders, second, capsys):
    ori, rec = folders
    write_image(rec / second, tiny.frames(1)[0])
    message = refused(capsys, ori, rec)
    assert "have the same name; keep one" in message


def test_pairing_by_order_is_there_on_request_only(folders, capsys):
    ori, rec = folders
    for i in range(3):
        (rec / f"v{i}.mp4").rename(rec / f"other{i}.mp4")
    assert "6 files without a partner" in refused(capsys, ori, rec)
    assert evaluate(ori, rec, *PSNR, "--pair_by", "sorted") == 0
    assert report(rec)["videos"] == 3
    again = rec.with_name("again")
    shutil.copytree(rec, again)
    for i in range(3):
        (again / f"other{i}.mp4").rename(again / f"000{i}_other{i}.mp4")
    words = ("--ref", ori, "--compare", rec, again, *PSNR, "--device", "cpu", "--no_page")
    assert tiny.status("eval", *words, "--pair_by", "sorted") == 0
    compared = json.loads((rec.with_name("x_rec_eval") / "comparison.json").read_text())
    assert {row["videos"] for row in compared["differences"]} == {3}
    shutil.rmtree(again)
    (rec / "other2.mp4").unlink()
    assert "holds 3 files" in refused(capsys, ori, rec, "--pair_by", "sorted")


def test_reconstructions_without_a_common_video_are_refused_before_they_are_scored(folders, capsys):
    ori, rec = folders
    other = rec.with_name("other")
    other.mkdir()
    (rec / "v2.mp4").rename(other / "v2.mp4")
    words = ("--ref", ori, "--compare", rec, other, *PSNR, "--device", "cpu", "--no_page", "--allow_unmatched")
    assert tiny.status("eval", *words) == 2
    assert "no video in common" in capsys.readouterr().err
    assert not rec.with_name("x_rec_eval").exists()


def test_pairing_by_index_scores_against_the_sources_from_their_first_frame(tmp_path, capsys):
    write_video(tmp_path / "sources/holiday.mp4", tiny.frames(9), 24, "h264")
    clip = open_media(tmp_path / "sources/holiday.mp4").read(range(9))
    write_video(tmp_path / "x_rec/000007_holiday.mp4", clip[4:], 24)
    pd.DataFrame({"id": ["000007_holiday"], "source": ["/elsewhere/holiday.mp4"], "start": [4]}).to_csv(
        tmp_path / "x_rec/index.csv", index=False
    )
    assert evaluate(tmp_path / "sources", tmp_path / "x_rec", *PSNR, "--pair_by", "index_csv") == 0
    told = report(tmp_path / "x_rec")
    assert told["metrics"]["psnr"]["mean"] == 100.0
    assert not told["lossy_input"]  # the model has seen what the codec lost
    (tmp_path / "sources/holiday.mp4").rename(tmp_path / "sources/else.mp4")
    message = refused(capsys, tmp_path / "sources", tmp_path / "x_rec", "--pair_by", "index_csv")
    assert "000007_holiday: its source /elsewhere/holiday.mp4 is not in" in message
    assert "--allow_unmatched" not in message  # there would be no pair
    with (tmp_path / "x_rec/index.csv").open("a") as table:
        table.write("000008_work,/elsewhere/work.mp4,0\n")
    write_video(tmp_path / "x_rec/000008_work.mp4", clip, 24)
    write_video(tmp_path / "sources/work.mp4", clip, 24)
    by_index = (*PSNR, "--pair_by", "index_csv")
    assert "--allow_unmatched" in refused(capsys, tmp_path / "sources", tmp_path / "x_rec", *by_index)
    assert evaluate(tmp_path / "sources", tmp_path / "x_rec", *by_index, "--allow_unmatched") == 0
    told = report(tmp_path / "x_rec")
    assert [video["name"] for video in told["per_video"]] == ["000008_work"]
    assert "000007_holiday" in told["unmatched"][0]
    (tmp_path / "x_rec/index.csv").unlink()
    assert "index.csv: no such file" in refused(
        capsys, tmp_path / "sources", tmp_path / "x_rec", "--pair_by", "index_csv"
    )


@pytest.mark.parametrize("moved", [False, True])
def test_pairing_by_index_tells_sources_of_one_name_apart(moved, tmp_path):
    """Two folders hold a 0001.mp4 each, and the third lies in a folder that the other two's is the end of."""
    clips = [tiny.frames(3, seed=i) for i in range(3)]
    recorded = [str(tmp_path / "data" / name / "0001.mp4") for name in ("a", "b", "x/a")]
    for i, (path, clip) in enumerate(zip(recorded, clips, strict=True)):
        write_video(tmp_path / path, clip, 24)
        write_video(tmp_path / f"x_rec/{i}.mp4", clip, 24)
    pd.DataFrame({"id": ["0", "1", "2"], "source": recorded, "start": 0}).to_csv(
        tmp_path / "x_rec/index.csv", index=False
    )
    if moved:
        (tmp_path / "data").rename(tmp_path / "copy")
    assert evaluate(tmp_path / ("copy" if moved else "data"), tmp_path / "x_rec", *PSNR, "--pair_by", "index_csv") == 0
    told = report(tmp_path / "x_rec")
    assert [video["psnr"] for video in told["per_video"]] == [100.0] * 3


def test_pairing_by_index_takes_no_file_for_two_sources(tmp_path, capsys):
    """The second source is not in the folder, and the first has its name."""
    recorded = [str(tmp_path / "data" / name / "0001.mp4") for name in ("a", "b")]
    for i, path in enumerate(recorded):
        write_video(tmp_path / path, tiny.frames(2, seed=i), 24)
        write_video(tmp_path / f"x_rec/{i}.mp4", tiny.frames(2, seed=i), 24)
    pd.DataFrame({"id": ["0", "1"], "source": recorded, "start": 0}).to_csv(tmp_path / "x_rec/index.csv", index=False)
    message = refused(capsys, tmp_path / "data/a", tmp_path / "x_rec", *PSNR, "--pair_by", "index_csv")
    assert f"index.csv, 1: {recorded[0]} may be its source {recorded[1]}" in message


@pytest.mark.parametrize(
    "content", ["", "id,source\n", "id,source,start\n1,a.mp4,x\n", 'a,"\n', "\0", "id,source,start\n1,a,\n"]
)
def test_an_index_that_infer_did_not_write_is_one_message(content, tmp_path, capsys):
    write_video(tmp_path / "o/a.mp4", tiny.frames(2), 24)
    write_video(tmp_path / "x_rec/1.mp4", tiny.frames(2), 24)
    (tmp_path / "x_rec/index.csv").write_text(content)
    message = refused(capsys, tmp_path / "o", tmp_path / "x_rec", *PSNR, "--pair_by", "index_csv")
    assert "index.csv" in message


@pytest.mark.parametrize(
    ("options", "scored"),
    [
        (["--resolution", "80"], "80x96"),
        (["--resolution", "80", "--crop_size", "60"], "60x60"),
        (["--resize", "50x48"], "50x48"),
        (["--resolution", "40"], None),
        (["--resolution", "20"], None),
        (["--resize", "40x48"], None),
        ([], None),
    ],
)
def test_enlarging_before_scoring_is_warned_of(options, scored, tmp_path, capsys):
    ori, rec = make_pairs(tmp_path, 2)  # 40x48
    assert evaluate(ori, rec, *PSNR, *options, "--page", "--page_videos", "1") == 0
    told, page = report(rec), (rec.with_name("x_rec_eval") / "index.html").read_text()
    warned = [f"2 of 2 pairs are upscaled before scoring (v0: 40x48, scored at {scored})"] if scored else []
    assert told["upscaled_input"] == bool(scored)
    for text in ("\n".join(told["warnings"]), page, capsys.readouterr().err):
        assert [warning for warning in warned if warning in text] == warned
        assert ("upscaled before" in text) == bool(warned)


def test_different_sizes_are_refused_with_both_and_can_be_scaled(tmp_path, capsys):
    clip = tiny.frames(4, 32, 40)
    ori, rec = one_pair(tmp_path, clip, clip[:, :24, :30])
    message = refused(capsys, ori, rec)
    assert "v: the original is 32x40, the reconstruction 24x30; --resize ref scales" in message
    assert evaluate(ori, rec, *PSNR, "--resize", "ref") == 0
    told = report(rec)
    assert (told["protocol"]["resize"], told["per_video"][0]["height"]) == ("ref", 32)
    assert evaluate(ori, rec, *PSNR, "--resize", "16x24") == 0
    told = report(rec)
    assert (told["protocol"]["resize"], told["per_video"][0]["width"]) == ([16, 24], 24)


def test_a_reconstruction_cut_to_a_multiple_of_eight_suggests_cutting_the_original(tmp_path, capsys):
    clip = tiny.frames(4, 36, 44)
    ori, rec = one_pair(tmp_path, clip, clip[:, 2:34, 2:42])
    assert "multiple of 8 or 16, use --cut center" in refused(capsys, ori, rec)
    assert evaluate(ori, rec, *PSNR, "--cut", "center") == 0
    assert report(rec)["metrics"]["psnr"]["mean"] == 100.0
    assert evaluate(ori, rec, *PSNR, "--cut", "topleft") == 0
    assert report(rec)["metrics"]["psnr"]["mean"] < 40
    assert "--cut cannot help" in refused(capsys, rec, ori, "--cut", "center", "--output", str(tmp_path / "e"))


def test_different_lengths_are_refused_with_both_and_common_frames_are_recorded(tmp_path, capsys):
    clip = tiny.frames(16, 32, 40)
    ori, rec = one_pair(tmp_path, clip, clip[:13])
    message = refused(capsys, ori, rec)
    assert "v: the original has 16 frames, the reconstruction 13 (a causal model that takes 4n+1 frames" in message
    assert "--frames common compares the first 13" in message
    assert evaluate(ori, rec, *PSNR, "--frames", "common") == 0
    assert report(rec)["frames"] == 13
    assert "v: of 16 and 13 frames the first 13" in capsys.readouterr().err
    assert evaluate(ori, rec, *PSNR, "--num_frames", "13") == 0


def test_videos_shorter_than_asked_for_are_told_or_refused(tmp_path, capsys):
    clip = tiny.frames(6)
    ori, rec = one_pair(tmp_path, clip, degrade(clip))
    assert evaluate(ori, rec, *PSNR, "--num_frames", "9") == 0
    assert "v has 6 of the 9 frames asked for" in capsys.readouterr().err
    assert "v has 6 of the 9" in refused(capsys, ori, rec, "--num_frames", "9", "--strict_frames")


def test_different_frame_rates_are_refused_unless_ignored(tmp_path, capsys):
    clip = tiny.frames(4)
    ori, rec = one_pair(tmp_path, clip, clip, fps=25)
    assert "24 frames per second, the reconstruction 25; frames are paired by number" in refused(capsys, ori, rec)
    assert evaluate(ori, rec, *PSNR, "--ignore_fps") == 0


def test_more_than_eight_bits_are_refused_unless_asked_for(tmp_path, capsys):
    for folder in ("o", "r"):
        (tmp_path / folder).mkdir()
        tiny.write_video(tmp_path / folder / "v.mp4", tiny.frames(3), pixels="yuv444p10le")
    assert "has 10 bits per channel; --to_8bit" in refused(capsys, tmp_path / "o", tmp_path / "r")
    assert evaluate(tmp_path / "o", tmp_path / "r", "--to_8bit", *PSNR) == 0


def test_hdr_and_transparency_of_one_are_refused_and_grey_is_three_equal_channels(tmp_path, capsys):
    for kind, channels in (("o", 3), ("r", 4)):
        (tmp_path / kind).mkdir()
        Image.fromarray(np.full((20, 20, channels), 100, np.uint8)).save(tmp_path / kind / "a.png")
    assert "a.png: has transparent pixels; flatten it" in refused(capsys, tmp_path / "o", tmp_path / "r")
    for kind in ("o", "r"):
        Image.fromarray(np.full((20, 20), 100 if kind == "o" else 101, np.uint8)).save(tmp_path / kind / "a.png")
    assert evaluate(tmp_path / "o", tmp_path / "r", *PSNR) == 0
    assert report(tmp_path / "r")["metrics"]["psnr"]["mean"] == pytest.approx(48.1308, abs=1e-4)
    for kind in ("o", "r"):
        (tmp_path / kind / "a.png").unlink()
        tiny.write_video(tmp_path / kind / "v.mp4", tiny.frames(2), pixels="yuv420p10le", transfer=16)
    assert "is HDR (PQ)" in refused(capsys, tmp_path / "o", tmp_path / "r", "--to_8bit")


def test_files_that_do_not_decode_are_errors_of_their_pair(folders, capsys):
    ori, rec = folders
    (rec / "v1.mp4").write_bytes(b"")
    message = refused(capsys, ori, rec, *PSNR)
    assert f"1 of 3 pairs cannot be scored:\n  {rec}/v1.mp4: is empty (0 bytes)" in message
    assert "--on_error skip scores the others" in message
    assert evaluate(ori, rec, *PSNR, "--on_error", "skip") == 1
    told = report(rec)
    assert told["videos"] == 2
    assert told["failed"] == [f"{rec}/v1.mp4: is empty (0 bytes)"]
    for folder in folders:
        (folder / "v1.mp4").unlink()
        write_two_sizes(folder / "v1.ts")
    assert "v1.ts: changes its size at frame 4, from 48x64 to 32x32" in refused(capsys, ori, rec, *PSNR)
    assert evaluate(ori, rec, *PSNR, "--on_error", "skip") == 1
    assert "v1.ts: changes its size" in report(rec)["failed"][0]


def test_a_pair_too_small_or_short_for_a_metric_is_named_before_anything_is_scored(tmp_path, all_weights, capsys):
    ori, rec = make_pairs(tmp_path)
    for kind in (ori, rec):
        write_video(kind / "small.mp4", tiny.frames(2, 8, 8), 24)
    message = refused(capsys, ori, rec, "--metric", "ssim")
    assert "small: ssim needs frames of at least 11 pixels; these are 8x8" in message
    message = refused(capsys, ori, rec, "--metric", "rfvd", "ms_ssim", "lpips")
    assert (
        "ms_ssim needs frames of at least 161 pixels; these are 8x8; lpips_alex needs frames of at least 31" in message
    )
    assert "v0: rfvd needs at least 10 frames; there are 5" in message
    assert not list((tmp_path / "x_rec_eval").glob("*"))
    assert evaluate(ori, rec, "--metric", "ssim", "--resize", "16x16") == 0


def test_crop_larger_than_the_frames_is_refused(folders, capsys):
    assert "cannot be cropped to 64" in refused(capsys, *folders, "--crop_size", "64")


def test_scaling_is_the_originals(tmp_path):
    """pytorchvideo's ShortSideScale: bilinear without antialiasing, the long side rounded down; centre crop."""
    clip = tiny.frames(2, 50, 67)
    ori, rec = one_pair(tmp_path, clip, clip)
    x = torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 255
    expected = torch.nn.functional.interpolate(x, size=(32, 42), mode="bilinear", align_corners=False)
    with PairReader(Pair("v", ori / "v.mp4", rec / "v.mp4"), Protocol(resolution=32, crop=30)) as reader:
        torch.testing.assert_close(reader.read([0, 1])[0], expected[:, :, 1:31, 6:36])
