"""The evaluation's command line, its report and its warnings."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.scoring import degrade, evaluate, make_pairs, one_pair, original, refused, report
from vae3d.commands import eval as script
from vae3d.commands.flags import parse_eval
from vae3d.inference.video import write_image, write_video

PSNR = ("--metric", "psnr")


@pytest.fixture
def folders(tmp_path):
    return make_pairs(tmp_path)


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    mse = ((a.astype(float) - b) ** 2).mean((1, 2, 3)) / 255**2
    return -10 * np.log10(mse)


def noisy(i: int) -> np.ndarray:
    return degrade(original(i), 4.0 * (i + 1))


def test_the_reports_command_line_works_as_printed(folders, all_weights, capsys):
    ori, rec = folders
    words = (
        f"--batch_size 2 --real_video_dir {ori} --generated_video_dir {rec} --device cuda --sample_fps 24 "
        "--crop_size 32 --resolution 40 --num_frames 3 --sample_rate 1 --metric ssim psnr lpips flolpips"
    )
    assert script.main(parse_eval(words.split())) == 0
    captured = capsys.readouterr()
    assert "mean over videos" in captured.out
    if not torch.cuda.is_available():
        assert "no CUDA device here: scoring on the CPU" in captured.err
    told = report(rec)
    assert list(told["metrics"]) == ["ssim", "psnr", "psnr_video", "lpips_alex", "flolpips"]
    assert (told["videos"], told["frames"], told["lossy_input"]) == (3, 9, False)
    assert '"flolpips": [' in (rec.with_name("x_rec_eval") / "index.html").read_text()


@pytest.mark.smoke
def test_scores_are_means_of_videos_and_frames_by_hand(folders):
    ori, rec = folders
    assert evaluate(ori, rec, *PSNR) == 0
    expected = [psnr(original(i), noisy(i)) for i in range(3)]
    told = report(rec)
    assert [video["psnr"] for video in told["per_video"]] == pytest.approx([e.mean() for e in expected], abs=1e-5)
    figures = told["metrics"]["psnr"]
    means = [e.mean() for e in expected]
    assert figures["mean"] == pytest.approx(np.mean(means), abs=1e-5)
    assert figures["frame_mean"] == pytest.approx(np.concatenate(expected).mean(), abs=1e-5)
    assert figures["std"] == pytest.approx(np.std(means, ddof=1), abs=1e-5)
    assert figures["ci95"][0] < figures["mean"] < figures["ci95"][1]
    mse = ((original(0).astype(float) - noisy(0)) ** 2).mean() / 255**2
    assert told["per_video"][0]["psnr_video"] == pytest.approx(-10 * np.log10(mse), abs=1e-5)


def test_report_says_how_it_was_computed(folders, all_weights):
    ori, rec = folders
    assert evaluate(ori, rec, "--metric", "psnr", "lpips", "--num_frames", "4", "--crop_size", "32") == 0
    told = report(rec)
    content = (all_weights / "alexnet-owt-7be5be79.pth").read_bytes()
    assert told["weights"] == {"lpips_alex": {"alexnet-owt-7be5be79.pth": hashlib.sha256(content).hexdigest()}}
    assert told["preset"]["name"] == "default"
    assert (told["protocol"]["num_frames"], told["protocol"]["crop"]) == (4, 32)
    assert told["per_video"][0]["codecs"] == ["h264/gbrp", "h264/gbrp"]
    assert {"torch", "av", "vae3d", "python"} <= told["versions"].keys()


def test_tables_hold_every_video_and_on_request_every_frame(folders):
    ori, rec = folders
    for one in folders:
        (one / "v1.mp4").rename(one / "v\r1.mp4")
    assert evaluate(ori, rec, "--metric", "psnr", "tpsnr", "--per_frame") == 0
    folder = rec.with_name("x_rec_eval")
    videos = list(csv.DictReader((folder / "per_video.csv").open(newline="")))
    assert [row["name"] for row in videos] == ["v\r1", "v0", "v2"]
    frames = psnr(original(1), noisy(1))
    assert float(videos[0]["psnr_min"]) == pytest.approx(frames.min(), abs=1e-5)
    assert float(videos[0]["psnr_std"]) == pytest.approx(frames.std(), abs=1e-5)
    rows = [row for row in csv.DictReader((folder / "per_frame.csv").open(newline="")) if row["name"] == "v\r1"]
    assert [float(row["psnr"]) for row in rows] == pytest.approx(frames, abs=1e-5)
    assert [bool(row["tpsnr"]) for row in rows] == [True] * 5 + [False]  # pairs of neighbours


def test_first_frames_every_nth(folders):
    ori, rec = folders
    assert evaluate(ori, rec, *PSNR, "--num_frames", "2", "--sample_rate", "3") == 0
    expected = psnr(original(0), noisy(0))[[0, 3]].mean()
    assert report(rec)["per_video"][0]["psnr"] == pytest.approx(expected, abs=1e-5)


def test_batch_size_matters_only_to_presets_that_average_over_batches(folders):
    ori, rec = folders
    results = {}
    for preset in ("default", "opensora12"):
        for batch in ("1", "2"):
            words = (*PSNR, "--preset", preset, "--batch_size", batch, "--num_frames", "5")
            assert evaluate(ori, rec, *words) == 0
            results[preset, batch] = report(rec)["metrics"]["psnr"]["mean"]
    assert results["default", "1"] == results["default", "2"] == pytest.approx(results["opensora12", "1"])
    means = [psnr(original(i), noisy(i))[:5].mean() for i in range(3)]
    assert results["opensora12", "2"] == pytest.approx((np.mean(means[:2]) + means[2]) / 2, abs=1e-5)


def test_the_panorama_preset_chooses_its_metrics_unless_some_are_named(folders, capsys):
    assert evaluate(*folders, "--preset", "panorama") == 0
    told = report(folders[1])
    chosen = ("ws_psnr", "ws_ssim", "seam_gradient", "seam_ratio", "psnr_polar", "cube_psnr", "cube_psnr_up")
    assert {*chosen} < told["metrics"].keys()
    assert "psnr" not in told["metrics"]
    assert told["preset"]["name"] == "panorama"
    assert evaluate(*folders, *PSNR, "--preset", "panorama", "--output", str(folders[1].with_name("out"))) == 0
    chosen = json.loads((folders[1].with_name("out") / "summary.json").read_text())["metrics"]
    assert list(chosen) == ["psnr", "psnr_video"]
    with pytest.raises(SystemExit):
        script.main(parse_eval(["--help"]))
    printed = " ".join(capsys.readouterr().out.split())
    assert "default ssim psnr, or with --preset panorama ws_psnr ws_ssim seam polar cube" in printed


def test_a_mean_over_pixels_needs_one_size(folders, capsys):
    for folder in folders:
        write_video(folder / "large.mp4", tiny.frames(5, 64, 64), 24)
    assert "torchmetrics with data_range=1 averages over pixels" in refused(
        capsys, *folders, "--preset", "torchmetrics"
    )
    assert evaluate(*folders, *PSNR, "--preset", "torchmetrics", "--crop_size", "40") == 0


def test_base_finds_all_folders_and_shows_the_ceiling_beside(tmp_path, capsys):
    make_pairs(tmp_path)
    make_pairs(tmp_path, kind="spatial", amount=2.0)
    assert script.main(parse_eval(["--base", str(tmp_path / "x"), "--device", "cpu", "--no_page"])) == 0
    printed = capsys.readouterr().out
    assert "metric          rec  spatial" in printed
    assert "spatial - rec" in printed
    rows = json.loads((tmp_path / "x_rec_eval/comparison.json").read_text())["differences"]
    gap = (
        report(tmp_path / "x_spatial")["metrics"]["psnr"]["mean"]
        - report(tmp_path / "x_rec")["metrics"]["psnr"]["mean"]
    )
    assert rows[1]["metric"] == "psnr"
    assert rows[1]["difference"] == pytest.approx(gap)
    assert rows[1]["better_on"] == 3


def test_compare_gives_paired_differences_with_intervals(tmp_path, capsys):
    ori, first = make_pairs(tmp_path)
    _, second = make_pairs(tmp_path, kind="b", amount=3.0)
    words = [
        "--ref",
        str(ori),
        "--compare",
        str(first),
        str(second),
        "--device",
        "cpu",
        "--no_page",
        "--metric",
        "psnr",
    ]
    assert script.main(parse_eval([*words, "--output", str(tmp_path / "out")])) == 0
    (row, _) = json.loads((tmp_path / "out/comparison.json").read_text())["differences"]
    gaps = [
        psnr(original(i), degrade(original(i), 3.0 * (i + 1))).mean() - psnr(original(i), noisy(i)).mean()
        for i in range(3)
    ]
    assert row["difference"] == pytest.approx(np.mean(gaps), abs=1e-5)
    half = 4.303 * np.std(gaps, ddof=1) / 3**0.5  # Student's t, two degrees of freedom
    assert row["ci95"] == pytest.approx([np.mean(gaps) - half, np.mean(gaps) + half], abs=1e-3)
    assert (row["better_on"], row["videos"]) == (3, 3)
    assert "3 of 3" in capsys.readouterr().out


def test_reconstructions_may_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lr=1").mkdir()
    args = parse_eval(["--ref", "o", "--compare", "base=a/b=c", "lr=1", "./d=e", "f"])
    assert args.recs == {"base": Path("a/b=c"), "lr=1": Path("lr=1"), "./d=e": Path("d=e"), "f": Path("f")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ref a", "give --ref and --rec, --ref and --compare, or --base"),
        ("--base x --ref a", "--base names all folders"),
        ("--ref a --compare b", "--compare needs two or more different folders"),
        ("--ref a --compare x=b y=b", "--compare needs two or more different folders"),
        ("--ref a --compare x=b x=c", "--compare needs two or more different names"),
        ("--ref a --rec b --num_frames -3", "'-3' is not a whole number of 1 or more"),
        ("--ref a --rec b --sample_rate 0", "'0' is not a whole number of 1 or more"),
        ("--ref a --rec b --crop_size x", "'x' is not a whole number of 1 or more"),
        ("--ref a --rec b --resize 256", "256 is neither ref nor HEIGHTxWIDTH"),
        ("--ref a --rec b --preset mine", "invalid choice: 'mine'"),
    ],
)
def test_words_that_make_no_sense_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(parse_eval(words.split()))
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--device", "gpu"), "device=gpu is not usable here"),
        (("--output", "/nowhere/deeper/x"), "--output /nowhere/deeper/x must be a folder"),
        (("--metric", "vmaf"), "no metric is called vmaf; there are psnr, ssim, ms_ssim, lpips_alex"),
        (
            ("--preset", "opensora12", "--batch_size", "2"),
            "v1.2 eval/vae cannot batch videos of different lengths or sizes",
        ),
        (("--metric", "rfvd", "--rfvd_frames", "3"), "rfvd needs at least 10 frames; frames=3"),
    ],
)
def test_what_cannot_work_is_told_before_scoring(folders, all_weights, more, message, capsys):
    assert message in refused(capsys, *folders, *more)


def test_all_missing_weights_are_named_at_once_or_skipped(folders, tmp_path, monkeypatch, capsys):
    ori, rec = folders
    monkeypatch.setenv("VAE3D_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    message = refused(capsys, ori, rec, "--metric", "psnr", "lpips", "flolpips")
    assert "weights of lpips_alex, flolpips are missing; without them: psnr" in message
    assert "alexnet-owt-7be5be79.pth (244,408,911 bytes, sha256 7be5be79" in message
    assert "network-default.pytorch" in message
    assert "vae3d fetch-weights" in message
    assert "weights of lpips_alex are missing" in refused(capsys, ori, rec, "--metric", "lpips", "--on_missing", "skip")
    assert evaluate(ori, rec, "--metric", "psnr", "lpips", "--on_missing", "skip") == 0
    assert "warning: lpips_alex is skipped: alexnet-owt-7be5be79.pth" in capsys.readouterr().err
    told = report(rec)
    assert "psnr" in told["metrics"]
    assert "alexnet-owt-7be5be79.pth" in told["absent"]["lpips_alex"]


def test_single_frames_have_no_motion_and_are_counted(tmp_path, capsys):
    ori, rec = make_pairs(tmp_path, 2)
    frame = tiny.frames(1, 40, 48)[0]
    write_image(ori / "still.png", frame)
    write_image(rec / "still.png", degrade(frame))
    assert evaluate(ori, rec, "--metric", "psnr", "tpsnr") == 0
    told = report(rec)
    assert told["per_video"][0]["tpsnr"] is None
    assert (told["metrics"]["tpsnr"]["undefined"], told["metrics"]["psnr"]["undefined"]) == (1, 0)
    values = [video["tpsnr"] for video in told["per_video"][1:]]
    assert told["metrics"]["tpsnr"]["mean"] == pytest.approx(np.mean(values))


def test_identical_videos_are_counted_and_doubted(tmp_path, capsys):
    clip = tiny.frames(6, 48, 64)
    ori, rec = one_pair(tmp_path, clip, clip)
    assert evaluate(ori, rec) == 0
    assert "all pairs are identical" in capsys.readouterr().err
    told = report(rec)
    assert (told["metrics"]["psnr"]["mean"], told["metrics"]["ssim"]["mean"]) == (100.0, pytest.approx(1.0))
    assert told["counts"] == {"identical_frames": 6}


def test_lossy_files_are_flagged(tmp_path, capsys):
    clip = tiny.frames(6, 48, 64)
    ori, rec = one_pair(tmp_path, clip, degrade(clip), codec="h264")
    assert evaluate(ori, rec, *PSNR) == 0
    assert "1 of 1 pairs have a lossy codec" in capsys.readouterr().err
    assert report(rec)["lossy_input"]
    ori, rec = tmp_path / "pictures", tmp_path / "webp"
    for folder, suffix in ((ori, "png"), (rec, "webp")):
        folder.mkdir()
        Image.fromarray(clip[0]).save(folder / f"v.{suffix}")
    assert evaluate(ori, rec, *PSNR) == 0
    assert report(rec)["lossy_input"]


def test_pairs_that_are_none_and_shifted_ones_are_doubted(tmp_path, capsys):
    clip = tiny.frames(8, 48, 64)
    ori, rec = one_pair(tmp_path, clip, 255 - clip)
    assert evaluate(ori, rec, *PSNR) == 0
    assert "v: PSNR is below 10 dB on most frames" in capsys.readouterr().err
    for late, word in ((True, "late"), (False, "early")):
        longer = tiny.frames(9, 48, 64)
        pair = (longer[1:], longer[:-1]) if late else (longer[:-1], longer[1:])
        ori, rec = one_pair(tmp_path / word, *pair)
        assert evaluate(ori, rec, *PSNR) == 0
        assert f"fits the original better one frame {word}" in capsys.readouterr().err
    ori, rec = one_pair(tmp_path / "aligned", clip, degrade(clip, 2.0))
    assert evaluate(ori, rec, *PSNR) == 0
    assert "warning" not in capsys.readouterr().err


def test_scores_that_are_not_finite_are_errors_of_their_video(folders, monkeypatch, capsys):
    from vae3d.evaluation import pairs

    whole = pairs._as_float

    def with_a_hole(frames, device):
        x = whole(frames, device)
        if len(x) == 6:  # v1
            x[2, 0, 0, 0] = float("nan")
        return x

    monkeypatch.setattr(pairs, "_as_float", with_a_hole)
    ori, rec = folders
    assert "error: v1: the original: 1 of 34560 values are NaN or infinite, the first in frame 2" in refused(
        capsys, ori, rec, *PSNR
    )
    assert evaluate(ori, rec, *PSNR, "--on_error", "skip") == 1
    assert report(rec)["failed"] == ["v1: the original: 1 of 34560 values are NaN or infinite, the first in frame 2"]
    assert report(rec)["videos"] == 2


def test_many_metrics_are_printed_a_line_each(folders, capsys):
    assert evaluate(*folders, "--metric", "psnr", "ssim", "flicker", "tpsnr", "ws_psnr", "ws_ssim") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["3", "videos", "mean", "over", "videos", "95", "%", "interval", "standard", "deviation",
                                "median", "5", "%", "95", "%"]  # fmt: skip
    assert lines[2].startswith("psnr ")
