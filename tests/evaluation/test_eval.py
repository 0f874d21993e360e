from __future__ import annotations

import hashlib
import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from vae3d.inference.video import write_image, write_video

spec = importlib.util.spec_from_file_location("eval_common_metric", tiny.ROOT / "eval/eval_common_metric.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def degrade(clip: np.ndarray, amount: float = 8.0, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, amount, clip.shape)
    return np.clip(clip + noise, 0, 255).round().astype(np.uint8)


@pytest.fixture
def folders(tmp_path):
    """Three pairs, of 5, 6 and 7 frames."""
    for i in range(3):
        clip = tiny.frames(5 + i, 40, 48, seed=i)
        write_video(tmp_path / f"x_ori/v{i}.mp4", clip, 24)
        write_video(tmp_path / f"x_rec/v{i}.mp4", degrade(clip, 4.0 * (i + 1)), 24)
    return tmp_path / "x_ori", tmp_path / "x_rec"


def evaluate(ori, rec, *more: str) -> int:
    return script.main(["--real_video_dir", str(ori), "--generated_video_dir", str(rec), "--device", "cpu", *more])


def report(rec) -> dict:
    return json.loads(rec.with_name(f"{rec.name}_eval.json").read_text())


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    mse = ((a.astype(float) - b) ** 2).mean((1, 2, 3)) / 255**2
    return -10 * np.log10(mse)


def test_the_reports_command_line_works_as_printed(folders, trunks, capsys):
    ori, rec = folders
    words = (
        f"--batch_size 2 --real_video_dir {ori} --generated_video_dir {rec} --device cuda --sample_fps 24 "
        "--crop_size 32 --resolution 40 --num_frames 5 --sample_rate 1 --metric ssim psnr lpips"
    )
    assert script.main(words.split()) == 0
    captured = capsys.readouterr()
    assert "mean over videos" in captured.out
    if not torch.cuda.is_available():
        assert "no CUDA device here: scoring on the CPU" in captured.err
    told = report(rec)
    assert set(told["metrics"]) == {"ssim", "psnr", "lpips"}
    assert (told["videos"], told["frames"], told["lossy_input"]) == (3, 15, False)


def test_scores_are_means_of_videos_and_frames_by_hand(folders):
    ori, rec = folders
    assert evaluate(ori, rec, "--metric", "psnr") == 0
    expected = [
        psnr(tiny.frames(5 + i, 40, 48, seed=i), degrade(tiny.frames(5 + i, 40, 48, seed=i), 4.0 * (i + 1)))
        for i in range(3)
    ]
    told = report(rec)
    assert [video["psnr"] for video in told["per_video"]] == pytest.approx([e.mean() for e in expected], abs=1e-5)
    assert told["metrics"]["psnr"]["mean"] == pytest.approx(np.mean([e.mean() for e in expected]), abs=1e-5)
    assert told["metrics"]["psnr"]["frame_mean"] == pytest.approx(np.concatenate(expected).mean(), abs=1e-5)
    assert told["versions"]["torch"]
    assert told["per_video"][0]["codecs"] == ["h264/gbrp", "h264/gbrp"]


def test_first_frames_every_nth(folders):
    ori, rec = folders
    assert evaluate(ori, rec, "--metric", "psnr", "--num_frames", "2", "--sample_rate", "3") == 0
    clip = tiny.frames(5, 40, 48, seed=0)
    assert report(rec)["per_video"][0]["psnr"] == pytest.approx(psnr(clip, degrade(clip, 4.0))[[0, 3]].mean(), abs=1e-5)


def test_order_and_batch_size_do_not_matter(folders):
    ori, rec = folders
    results = []
    for more in ([], ["--batch_size", "3"]):
        evaluate(ori, rec, "--metric", "psnr", "ssim", *more)
        results.append(report(rec)["metrics"])
    assert results[0] == results[1]


def test_pairs_are_found_by_name_with_the_suffix_aside(tmp_path):
    clip = tiny.frames(3)
    write_video(tmp_path / "a/sub/one_ori.mp4", clip, 24)
    write_video(tmp_path / "b/sub/one_rec.mp4", clip, 24)
    write_image(tmp_path / "a/two.png", clip[0])
    write_image(tmp_path / "b/two_rec.png", clip[1])
    assert evaluate(tmp_path / "a", tmp_path / "b", "--metric", "psnr") == 0
    assert [video["name"] for video in report(tmp_path / "b")["per_video"]] == ["sub/one", "two"]


def refused(capsys, *args: str) -> str:
    assert script.main([*args, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    return captured.err


def dirs(ori, rec, *more: str) -> list[str]:
    return ["--real_video_dir", str(ori), "--generated_video_dir", str(rec), *more]


def test_folders_that_cannot_be_compared_are_refused(folders, tmp_path, capsys):
    ori, rec = folders
    assert f"{tmp_path}/none: no such folder" in refused(capsys, *dirs(ori, tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    (tmp_path / "void").mkdir()
    assert f"{tmp_path}/void holds no video or image" in refused(capsys, *dirs(ori, tmp_path / "void"))
    assert "is given as original and as reconstruction" in refused(capsys, *dirs(ori, ori))
    (rec / "v1.mp4").rename(rec / "w1.mp4")
    message = refused(capsys, *dirs(ori, rec))
    assert "2 files have no partner of the same name, 2 have:" in message
    assert f"only in {ori}: v1" in message
    assert f"only in {rec}: w1" in message
    assert evaluate(ori, rec, "--metric", "psnr", "--allow_unmatched") == 0
    assert report(rec)["unmatched"] == [f"only in {ori}: v1", f"only in {rec}: w1"]
    capsys.readouterr()
    write_image(rec / "V0.png", tiny.frames(1)[0])
    assert "have the same name; keep one" in refused(capsys, *dirs(ori, rec))


def one_pair(tmp_path, ori: np.ndarray, rec: np.ndarray, fps: float = 24, **kwargs):
    write_video(tmp_path / "o/v.mp4", ori, 24)
    write_video(tmp_path / "r/v.mp4", rec, fps, **kwargs)
    return dirs(tmp_path / "o", tmp_path / "r")


def test_pairs_of_unequal_size_length_or_rate_are_refused(tmp_path, capsys):
    clip = tiny.frames(16, 32, 40)
    assert "the original is 32x40, the reconstruction 32x32" in refused(
        capsys, *one_pair(tmp_path, clip, clip[:, :, :32])
    )
    message = refused(capsys, *one_pair(tmp_path, clip, clip[:13]))
    assert "the original has 16 frames, the reconstruction 13, a model that only takes 4n+1 frames" in message
    assert "--num_frames 13 compares the first ones" in message
    assert (
        script.main(
            [*dirs(tmp_path / "o", tmp_path / "r"), "--device", "cpu", "--num_frames", "13", "--metric", "psnr"]
        )
        == 0
    )
    capsys.readouterr()
    message = refused(capsys, *one_pair(tmp_path, clip, clip, fps=25))
    assert "24 frames per second, the reconstruction 25" in message
    assert (
        script.main([*dirs(tmp_path / "o", tmp_path / "r"), "--device", "cpu", "--ignore_fps", "--metric", "psnr"]) == 0
    )


def test_more_than_eight_bits_are_refused_unless_asked_for(tmp_path, capsys):
    clip = tiny.frames(3)
    for folder in ("o", "r"):
        (tmp_path / folder).mkdir()
        tiny.write_video(tmp_path / folder / "v.mp4", clip, pixels="yuv444p10le")
    assert "has 10 bits per channel; --to_8bit" in refused(capsys, *dirs(tmp_path / "o", tmp_path / "r"))
    assert evaluate(tmp_path / "o", tmp_path / "r", "--to_8bit", "--metric", "psnr") == 0


def test_a_faulty_pair_stops_or_is_skipped_and_the_exit_status_tells(folders, capsys):
    ori, rec = folders
    (rec / "v1.mp4").write_bytes(b"")
    assert f"{rec}/v1.mp4: is empty" in refused(capsys, *dirs(ori, rec))
    assert evaluate(ori, rec, "--metric", "psnr", "--on_error", "skip") == 1
    told = report(rec)
    assert told["videos"] == 2
    assert told["failed"] == [f"{rec}/v1.mp4: is empty (0 bytes)"]


def test_warnings_of_lossy_short_identical_and_suspicious_input(tmp_path, capsys):
    clip = tiny.frames(6, 48, 64)
    assert (
        script.main(
            [*one_pair(tmp_path, clip, clip, codec="h264"), "--device", "cpu", "--num_frames", "9", "--metric", "psnr"]
        )
        == 0
    )
    err = capsys.readouterr().err
    assert "files are stored lossily" in err
    assert "v has 6 of the 9 frames asked for" in err
    assert script.main([*one_pair(tmp_path, clip, clip), "--device", "cpu", "--metric", "psnr"]) == 0
    assert "all pairs are identical" in capsys.readouterr().err
    assert report(tmp_path / "r")["metrics"]["psnr"]["mean"] == 100.0
    assert script.main([*one_pair(tmp_path, clip, 255 - clip), "--device", "cpu", "--metric", "psnr"]) == 0
    assert "are the two a pair?" in capsys.readouterr().err


def test_metrics_that_are_not_there_are_named(folders, tmp_path, monkeypatch, capsys):
    ori, rec = folders
    assert "no metric is called vmaf; there are psnr, ssim, lpips" in refused(
        capsys, *dirs(ori, rec, "--metric", "vmaf")
    )
    assert "flolpips is not available yet" in refused(capsys, *dirs(ori, rec, "--metric", "ssim", "flolpips"))
    monkeypatch.setenv("VAE3D_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    message = refused(capsys, *dirs(ori, rec, "--metric", "psnr", "lpips"))
    assert "alexnet-owt-7be5be79.pth (244,408,911 bytes, sha256 7be5be79" in message
    assert "python scripts/fetch_weights.py" in message


def test_crop_larger_than_the_frames_is_refused(folders, capsys):
    assert "cannot be cropped to 64; lower --crop_size" in refused(capsys, *dirs(*folders, "--crop_size", "64"))


def test_scaling_is_the_originals():
    """pytorchvideo's ShortSideScale: bilinear without antialiasing, the long side rounded down; centre crop."""
    from vae3d.evaluation.pairs import Protocol, _prepare

    clip = tiny.frames(2, 50, 67)
    x = torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 255
    expected = torch.nn.functional.interpolate(x, size=(32, 42), mode="bilinear", align_corners=False)
    ours = _prepare(clip, Protocol(resolution=32, crop=30))
    torch.testing.assert_close(ours, expected[:, :, 1:31, 6:36])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--num_frames", "-3"),
        ("--num_frames", "0"),
        ("--sample_rate", "0"),
        ("--resolution", "0"),
        ("--crop_size", "x"),
    ],
)
def test_numbers_below_one_are_refused(folders, option, value, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate(*folders, option, value)
    assert end.value.code == 2
    assert f"{value} is no number of 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--device", "gpu"), "device=gpu is not usable here"),
        (("--output", "/nowhere/x.json"), "/nowhere is no folder"),
        (("--metric", "flolpips"), "flolpips is not available yet; there are psnr, ssim, lpips"),
    ],
)
def test_what_cannot_work_is_told_before_scoring(folders, more, message, capsys):
    assert evaluate(*folders, *more) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "mean over videos" not in captured.out


def test_report_tells_pooled_psnr_and_the_hash_of_weights(folders, trunks):
    ori, rec = folders
    assert evaluate(ori, rec, "--metric", "psnr", "lpips") == 0
    told = report(rec)
    clip = tiny.frames(5, 40, 48, seed=0)
    mse = ((clip.astype(float) - degrade(clip, 4.0)) ** 2).mean() / 255**2
    assert told["per_video"][0]["psnr_video"] == pytest.approx(-10 * np.log10(mse), abs=1e-6)
    content = (trunks / "alexnet-owt-7be5be79.pth").read_bytes()
    assert told["weights"] == {"lpips": hashlib.sha256(content).hexdigest()}


def test_a_pair_too_small_for_a_metric_is_named(tmp_path, capsys):
    for kind in ("ori", "rec"):
        write_video(tmp_path / f"x_{kind}/small.mp4", tiny.frames(2, 8, 8), 24)
    assert evaluate(tmp_path / "x_ori", tmp_path / "x_rec", "--metric", "ssim") == 2
    assert "small: ssim needs frames of at least 11 pixels" in capsys.readouterr().err


def test_transparent_images_are_refused(tmp_path, capsys):
    for kind in ("ori", "rec"):
        (tmp_path / f"x_{kind}").mkdir()
        Image.fromarray(np.full((20, 20, 4), 100, np.uint8)).save(tmp_path / f"x_{kind}/a.png")
    assert evaluate(tmp_path / "x_ori", tmp_path / "x_rec", "--metric", "psnr") == 2
    assert "a.png: has transparent pixels; flatten it" in capsys.readouterr().err
