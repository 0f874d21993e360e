"""`vae3d compare`: every encoder with every decoder, on the same frames."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn

import vae3d
from tests import tiny
from tests.evaluation.test_eval_page import content as shown
from tests.inference.test_infer import read, run
from tests.inference.test_wan_infer import write
from tests.stream_stub import StreamStub
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.commands import compare as compare_command
from vae3d.config.issues import ConfigError
from vae3d.config.validate import check_comparison
from vae3d.errors import UserError
from vae3d.inference.comparison import Comparer, Network, constant_frame_psnr
from vae3d.inference.comparison_report import degenerate_pairs
from vae3d.inference.video import write_video
from vae3d.loading import model_config
from vae3d.metrics import build_metrics
from vae3d.models.interface import convert_latents
from vae3d.result_folder import FolderError

SHIFT, SCALE = [0.1 * i for i in range(16)], [1 + 0.1 * i for i in range(16)]
TEACHER = [
    "model.latent_channels=16", f"model.latents_mean={SHIFT}", f"model.latents_std={SCALE}",
    "model.multipliers=[1,1,1,1]", "model.downsample=[false,true,true]",
]  # fmt: skip
PAIRS = ["student -> student", "student -> teacher", "teacher -> student", "teacher -> teacher"]
SMALL, LARGE = ["height=16", "width=24"], ["height=null", "width=null"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """4 x 8 x 8, 16 channels of raw latents."""
    return write("wan", tmp_path_factory.mktemp("wan16"), *TEACHER)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The same latent space, normalized."""
    return write("taehv", tmp_path_factory.mktemp("taew2_1"))


@pytest.fixture
def source(videos):
    return videos.parent / "clip3.mp4"  # 15 frames


def compare(checkpoint, source, prefix, teacher, *overrides) -> dict:
    words = [f"checkpoint={checkpoint}", f"source={source}", f"save_dir={prefix}", f"teacher.path={teacher}"]
    compare_command.run(check_comparison(tiny.compose(*words, *SMALL, *overrides, config="compare")))
    return json.loads(prefix.with_name(f"{prefix.name}_rec").joinpath("comparison.json").read_text())


def eight_bits(video: torch.Tensor) -> torch.Tensor:
    """[1, 3, T, H, W] in [-1, 1] -> [T, 3, H, W] in [0, 1]."""
    return ((video[0].transpose(0, 1).clamp(-1, 1) + 1) * 127.5).round() / 255


def test_pairs_are_the_same_where_results_are_copied_beside_the_computation(
    student, teacher, source, tmp_path, monkeypatch
):
    cost, costs = Network.cost, {}
    monkeypatch.setattr(
        Network, "cost", lambda self, video: costs.get(self.path) or costs.setdefault(self.path, cost(self, video))
    )
    few = ["num_frames=1", "metrics=[psnr]"]
    expected = compare(student, source, tmp_path / "cpu", teacher, *few)
    with StreamStub().active() as stub:
        found = compare(student, source, tmp_path / "gpu", teacher, *few)
    assert len(stub.host_waits) > len(PAIRS)
    assert found["files"] == expected["files"]


def test_figures_are_those_of_their_definitions(student, teacher, source, tmp_path):
    told = compare(student, source, tmp_path / "out", teacher, "num_frames=9")
    pixels = read(next((tmp_path / "out_ori").glob("*.mp4")))
    video = torch.from_numpy(pixels.transpose(3, 0, 1, 2).copy())[None].float() / 127.5 - 1
    own, raw = vae3d.load(student), vae3d.load(teacher)
    shift, scale = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (SHIFT, SCALE))
    with torch.no_grad():
        z, taught = own.encode(video).mode(), raw.encode(video).mode()
        expected = [
            own.decode(z, 9),
            raw.decode(z * scale + shift, 9),
            own.decode((taught - shift) / scale, 9),
            raw.decode(taught, 9),
        ]
    ref = eight_bits(video)
    ssim = build_metrics(["ssim"])
    for pair, rec in zip(PAIRS, map(eight_bits, expected), strict=True):
        ssim.update(ref, rec)
        frames = (ref - rec).double().square().flatten(1).mean(1)
        figures = told["files"][0]["pairs"][pair]
        assert figures["mse"] == pytest.approx(frames.mean().item(), rel=1e-5)
        assert figures["psnr_video"] == pytest.approx(-10 * math.log10(frames.mean()), abs=1e-4)
        assert figures["psnr"] == pytest.approx((-10 * frames.log10()).mean().item(), abs=1e-4)
        assert figures["ssim"] == pytest.approx(ssim.result().scores["ssim"].value, abs=1e-4)
    taught = (taught - shift) / scale
    latents = told["files"][0]["latents"]
    assert latents["mse"] == pytest.approx((z - taught).square().mean().item(), rel=1e-4)
    assert latents["cosine"] == pytest.approx((z * taught).sum().item() / (z.norm() * taught.norm()).item(), abs=1e-4)
    for whose, values in (("student", z), ("teacher", taught)):
        assert latents[whose]["mean"] == pytest.approx(values.mean((0, 2, 3, 4)).tolist(), abs=1e-4)
        assert latents[whose]["std"] == pytest.approx(values.std((0, 2, 3, 4), correction=0).tolist(), abs=1e-4)
    flat = told["files"][0]["baseline"]
    assert flat["black"] == pytest.approx(-10 * math.log10(ref.double().square().mean()), abs=1e-6)
    grey = ref.double().mean((0, 2, 3), keepdim=True)
    assert flat["mean_colour"] == pytest.approx(-10 * math.log10((ref - grey).square().mean()), abs=1e-6)


def test_a_network_beside_itself_gives_four_equal_pairs(teacher, source, tmp_path):
    told = compare(teacher, source, tmp_path / "out", teacher, "num_frames=5")
    pairs = told["mean"]["pairs"]
    assert list(pairs) == PAIRS
    assert all(pairs[pair] == pairs[PAIRS[0]] for pair in PAIRS)
    assert told["mean"]["latents"]["mse"] == 0
    assert told["mean"]["latents"]["cosine"] == pytest.approx(1)
    assert told["mean"]["latents"]["student"] == told["mean"]["latents"]["teacher"]


def test_latents_go_through_the_statistics_of_the_network_that_has_them_raw():
    raw, normal = tiny.model("wan", "model.latents_mean=[1,2,3,4]", "model.latents_std=[2,2,2,2]"), nn.Module()
    normal.latent = "normalized"
    z = torch.randn(1, 4, 1, 2, 2)
    expected = (z - torch.arange(1.0, 5).view(1, 4, 1, 1, 1)) / 2
    torch.testing.assert_close(convert_latents(z, raw, normal), expected)
    torch.testing.assert_close(convert_latents(expected, normal, raw), z)
    assert convert_latents(z, raw, raw) is z


def test_only_frames_that_both_take_are_compared(student, teacher, source, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    told = compare(student, source, tmp_path / "out", teacher)
    assert (told["files"][0]["frames"], told["files"][0]["frames_reconstructed"]) == (13, 15)
    assert "num_frames for another number, such as 9, 13, 17, 21" in told["notes"][0]
    assert told["notes"][0] in caplog.text
    assert len(read(next((tmp_path / "out_rec").glob("*.mp4")))) == 15  # which is whole nevertheless
    with pytest.raises(UserError, match=r"num_frames=12: .* 5, 9, 13, 17"):
        compare(student, source, tmp_path / "b", teacher, "num_frames=12")
    assert not list(tmp_path.glob("b*"))


def test_frames_of_long_files_are_bounded(student, teacher, tmp_path):
    tiny.write_video(tmp_path / "long.mp4", tiny.frames(40))
    told = compare(student, tmp_path / "long.mp4", tmp_path / "out", teacher)
    assert told["files"][0]["frames"] == 33
    assert shown(tmp_path / "out_compare")[1]["000001_long"]["frames"] == 33
    told = compare(student, tmp_path / "long.mp4", tmp_path / "more", teacher, "num_frames=37")
    assert told["files"][0]["frames"] == 37
    assert told["notes"] == []


def test_frame_rules_of_both_networks_hold(teacher, source, tmp_path):
    """CogVideoX takes 8n or 1 + 8n, Wan 1 + 4n."""
    student = write("taehv", tmp_path / "taecvx", "model.variant=taecvx")
    assert compare(student, source, tmp_path / "out", teacher)["files"][0]["frames"] == 9


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ([], "has 4 latent channels and the checkpoint's model 16"),
        (TEACHER[:3], "has 2 pixels to a latent and the checkpoint's model 8"),
        (
            [*TEACHER[:4], "model.downsample=[false,false,true]"],
            "has 2 frames to a latent and the checkpoint's model 4",
        ),
    ],
)
def test_networks_of_another_latent_space_are_refused_before_anything_is_deleted(
    student, source, tmp_path, changes, error
):
    other = write("wan", tmp_path / "other", *changes)
    (tmp_path / "out_rec").mkdir()
    (tmp_path / "out_rec/metrics.json").touch()
    with pytest.raises(UserError, match=error):
        compare(student, source, tmp_path / "out", other, "overwrite=true")
    assert (tmp_path / "out_rec/metrics.json").is_file()


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["teacher.path=/nowhere"], "teacher.path=/nowhere: no such file or folder"),
        (["teacher.precision=fp8"], r"teacher.precision=fp8.*bf16"),
        (["teacher.pth=x"], r"teacher.pth.*teacher.path"),
        (["tile=16"], r"tile=16.*whole frames"),
        (["sample=true"], r"(?i)sample=true.*mode of the latents"),
        (["teacher.path=???"], r"teacher.path.* required(?!.*teacher=none)"),
    ],
)
def test_settings_that_do_not_go_with_a_teacher(student, source, tmp_path, overrides, error):
    with pytest.raises(ConfigError, match=error):
        compare(student, source, tmp_path / "out", student, *overrides)


def test_a_student_that_gives_black_is_warned_about(teacher, source, tmp_path, caplog):
    model = tiny.model("taehv")
    nn.init.zeros_(model.decoder[-1].weight)
    nn.init.constant_(model.decoder[-1].bias, -1)
    config = model_config("taehv", *tiny.MODEL["taehv"])
    write_export(Checkpoint(config, model.state_dict(), tmp_path, ""), tmp_path / "black")
    told = compare(tmp_path / "black", source, tmp_path / "out", teacher, "num_frames=5")
    figures = told["files"][0]
    assert figures["pairs"]["student -> student"]["psnr_video"] == pytest.approx(figures["baseline"]["black"], abs=1e-4)
    assert told["warnings"][0].startswith("student -> student shows nothing in 1 of 1 files")
    assert told["warnings"][0] in [record.message for record in caplog.records if record.levelname == "WARNING"]


def test_what_shows_something_is_not_warned_about():
    files = [
        {"file": "a", "pairs": {p: {"psnr_video": 15.1} for p in PAIRS}, "baseline": {"black": 5, "mean_colour": 14}}
    ]
    assert degenerate_pairs(files) == []
    files[0]["pairs"][PAIRS[1]]["psnr_video"] = 14.9
    assert [warning.split(" shows")[0] for warning in degenerate_pairs(files)] == [PAIRS[1]]


def test_pixels_that_are_not_finite_are_no_figures(teacher, source, tmp_path):
    model = tiny.model("taehv")
    nn.init.constant_(model.decoder[-1].bias, torch.nan)
    config = model_config("taehv", *tiny.MODEL["taehv"])
    write_export(Checkpoint(config, model.state_dict(), tmp_path, ""), tmp_path / "broken")
    for student, who, hint in (
        (tmp_path / "broken", "the model's pixels", "fp32"),
        (teacher, "teacher's decoder", "fp16"),
    ):
        whose = ["teacher.precision=fp16"] if student == teacher else []
        with pytest.raises(UserError, match=rf"clip3.mp4: .*{who}.* NaN or infinite, the first in frame 0; .*{hint}"):
            compare(student, source, tmp_path / hint, tmp_path / "broken", *whose)


def test_lpips_is_measured_if_asked_for(student, teacher, source, tmp_path, trunks):
    told = compare(student, source, tmp_path / "out", teacher, *LARGE, "num_frames=1", "metrics=[lpips,psnr,flicker]")
    pairs = told["mean"]["pairs"]
    assert [list(figures) for figures in pairs.values()] == [["mse", "psnr", "psnr_video", "ssim", "lpips_alex"]] * 4


def test_a_teacher_in_half_precision_and_a_still_image(student, teacher, videos, tmp_path):
    told = compare(student, videos.parent / "image0.png", tmp_path / "out", teacher, "teacher.precision=bf16")
    full = compare(student, videos.parent / "image0.png", tmp_path / "full", teacher)
    assert told["teacher"]["precision"] == told["cost"]["teacher"]["precision"] == "bf16"
    assert shown(tmp_path / "out_compare")[1]["000001_image0"]["media"].startswith("data:image/png;")
    for pair in PAIRS:
        assert told["mean"]["pairs"][pair]["psnr"] == pytest.approx(full["mean"]["pairs"][pair]["psnr"], abs=0.1)
    assert told["mean"]["latents"]["mse"] != full["mean"]["latents"]["mse"]


def test_black_and_one_colour_are_the_baselines():
    flat = constant_frame_psnr(np.full((2, 4, 4, 3), 51, np.uint8))
    assert flat == {"black": pytest.approx(-20 * math.log10(0.2)), "mean_colour": 100}


def test_figures_of_rgba_are_those_of_the_colours_over_grey(tmp_path):
    """Half of the frame is transparent, and the colour there does not count."""
    rgba = np.zeros((1, 16, 16, 4), np.uint8)
    rgba[:, :8] = (255, 255, 255, 0)
    rgba[:, 8:] = (255, 255, 255, 255)
    other = rgba.copy()
    other[:, :8, :, :3] = 0
    assert constant_frame_psnr(rgba) == constant_frame_psnr(other)
    assert constant_frame_psnr(rgba)["black"] == pytest.approx(-10 * math.log10((0.25 + 1) / 2))
    assert constant_frame_psnr(rgba)["mean_colour"] == pytest.approx(-20 * math.log10(0.25))
    write_video(tmp_path / "a.mkv", rgba.repeat(2, 1).repeat(2, 2), 24)
    student = write("taehv", tmp_path / "student", "model.pixel_channels=4")
    told = compare(student, tmp_path / "a.mkv", tmp_path / "out", student, "height=32", "width=32")
    figures = told["files"][0]["pairs"][PAIRS[0]]
    assert figures["psnr_video"] == pytest.approx(-10 * math.log10(figures["mse"]), abs=1e-4)


def test_the_page_shows_every_pair_and_is_whole_after_a_resume(student, teacher, source, tmp_path, monkeypatch):
    told = compare(student, source, tmp_path / "out", teacher, "num_frames=5")
    folder = tmp_path / "out_compare"
    report, clips = shown(folder)
    (chapter,), clip = report["chapters"], clips["000001_clip3"]
    assert chapter["reconstructions"] == PAIRS
    assert {(panel["of"], panel["layer"]) for panel in clip["panels"]} >= {(pair, "error") for pair in PAIRS}
    (video,) = chapter["videos"]
    for pair in PAIRS:
        assert video["scores"][pair]["psnr"] == pytest.approx(told["files"][0]["pairs"][pair]["psnr"], rel=1e-5)
        assert np.mean(clip["curves"][pair]["psnr"]) == pytest.approx(video["scores"][pair]["psnr"], rel=1e-5)
    assert [table["title"] for table in chapter["tables"]] == ["Means", "Latents", "Cost"]
    assert (folder / video["links"]["original, all frames"]).samefile(tmp_path / "out_ori/000001_clip3.mp4")
    before = (folder / "index.html").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Comparer, "file", lambda *_: pytest.fail("is compared again"))
        compare(student, source, tmp_path / "out", teacher, "num_frames=5")
    assert (folder / "index.html").read_bytes() == before
    (folder / "index.html").unlink()  # and the clip with it: the file is compared again
    compare(student, source, tmp_path / "out", teacher, "num_frames=5")
    assert shown(folder)[1].keys() == clips.keys()


def test_the_script_compares_files_and_infer_overwrites_them(student, teacher, videos, tmp_path):
    words = [f"checkpoint={student}", f"source={videos}", f"save_dir={tmp_path}/out", f"teacher={teacher}"]
    words += ["num_samples=2", "num_frames=9", "metrics=[psnr]", *SMALL]
    done = tiny.run(sys.executable, "-m", "vae3d", "compare", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    names = ["000001_clip0", "000002_clip1"]
    report, clips = shown(tmp_path / "out_compare")
    assert list(clips) == names
    assert report["commands"].startswith(f"vae3d compare checkpoint={student} source={videos} ")
    told = json.loads((tmp_path / "out_rec/comparison.json").read_text())
    assert told["student"]["variant"] == "taew2_1"
    assert [file["file"] for file in told["files"]] == names
    for pair in PAIRS:
        values = [file["pairs"][pair]["psnr"] for file in told["files"]]
        assert told["mean"]["pairs"][pair]["psnr"] == pytest.approx(sum(values) / 2)
        assert f"{pair}  " in done.stdout
    assert told["cost"]["student"]["first_frame_from"] == told["cost"]["teacher"]["first_frame_from"] == "1 latent"
    assert told["cost"]["student"]["first_frame_seconds"] > 0
    own = json.loads((tmp_path / "out_rec/metrics.json").read_text())["psnr"]
    assert told["mean"]["pairs"]["student -> student"]["psnr"] == pytest.approx(own, abs=0.02)  # streamed
    shutil.rmtree(tmp_path / "out_ori")
    for file in (tmp_path / "out_rec").glob("0*"):
        file.unlink()
    with pytest.raises(FolderError, match=r"save_dir=.*set overwrite=true"):
        run(student, videos, tmp_path / "out", "num_samples=1")
    run(student, videos, tmp_path / "out", "num_samples=1", "overwrite=true")
    assert not list((tmp_path / "out_compare").iterdir())
    assert not (tmp_path / "out_rec/comparison.json").exists()
