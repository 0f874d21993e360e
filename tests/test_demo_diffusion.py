"""The chapter of the demo's page that shows samples of diffusion models beside their data."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.demo_sample import write_run
from vae3d.config.diffusion import check_diffusion, check_sampling
from vae3d.config.issues import ConfigError
from vae3d.config.latents import check_encoding
from vae3d.diffusion.sampling import write_frames
from vae3d.inference.pictures import grid
from vae3d.report.page import read_clip

DISTANCES = {"samples": 0.15, "other latents": 0.125, "noise": 0.25}
# Script, configuration, its check -> what is missing before the demo ran, of images and of clips.
COMMANDS = {
    ("encode", "latents", check_encoding): [
        ["checkpoint=demo/runs/ldm_vae_tiny", "source=demo/classes/images.csv"],
        ["checkpoint=demo/runs/ldm_video_vae_tiny", "source=demo/videos/videos.csv"],
    ],
    ("train-diffusion", "diffusion", check_diffusion): [
        ["cache=demo/latents/classes", "vae.path=demo/runs/ldm_vae_tiny"],
        ["cache=demo/latents/videos", "vae.path=demo/runs/ldm_video_vae_tiny"],
    ],
    ("sample", "sample", check_sampling): [
        ["against=demo/latents/classes", "checkpoint=demo/runs/ldm_unet_tiny"],
        ["against=demo/latents/videos", "checkpoint=demo/runs/ldm_video_tiny"],
    ],
}


def sampled(folder) -> None:
    """What scripts/demo.sh leaves of the two models, with made-up numbers: samples black, data white."""
    for run, size in (("ldm_unet_tiny", (1, 16, 16)), ("ldm_video_tiny", (5, 8, 8))):
        out = folder / "out" / run
        out.mkdir(parents=True)
        for name, value in (("grid", 0), ("data", 255)):
            write_frames(out / name, grid(np.full((100, *size, 3), value, np.uint8)))
        (out / "distances.json").write_text(json.dumps({"count": 256, "sliced_wasserstein": DISTANCES}))
    for run in ("ldm_vae_tiny", "ldm_video_vae_tiny", "ldm_unet_tiny", "ldm_video_tiny"):
        write_run(
            folder, run, [{"step": 50, "clips_per_second": 10.0}, {"step": 100, "clips_per_second": 20.0}], batch=4
        )


@pytest.fixture(scope="module")
def report():
    return tiny.load_script("demo_diffusion_report")


def test_samples_are_left_of_the_data_and_frames_below_each_other(report, tmp_path):
    sampled(tmp_path)
    for run, side, times in (("ldm_unet_tiny", 16, 1), ("ldm_video_tiny", 8, 3)):
        picture = report.beside(tmp_path / "out" / run)
        cell = side + 2
        assert picture.shape[1] == 2 * report.COLUMNS * cell + report.GAP
        assert picture.shape[0] == times * report.ROWS * cell + (times - 1) * (report.GAP // 2)
        left, right = picture[: side - 2, : side - 2], picture[: side - 2, -cell:-4]  # h264 blurs edges
        assert left.max() < 40
        assert right.min() > 215


def test_the_picture_by_itself_and_the_table(report, tmp_path, capsys):
    sampled(tmp_path)
    report.draw(tmp_path, tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.width == 2 * report.COLUMNS * 18 + report.GAP
    table = capsys.readouterr().out.splitlines()
    assert table[-1].split() == ["video", "transformer,", "clips", "(256)", "0.25", "0.15", "0.12"]


def test_samples_and_data_move_in_one_clip_without_an_error(report, tmp_path):
    sampled(tmp_path)
    chapter = report.chapter(tmp_path, tmp_path / "report")
    video, image = (read_clip(tmp_path / "report", one.id, "") for one in chapter.videos)
    assert {(panel.of, panel.layer) for panel in image.panels} == {("data", "picture"), ("samples", "picture")}
    assert {panel.layer for panel in video.panels} == {"picture", "change"}
    assert (image.kind, video.frames) == ("image/png", 5)
    assert chapter.videos[0].links == {
        "samples": "../out/ldm_video_tiny/grid.mp4",
        "data": "../out/ldm_video_tiny/data.mp4",
    }
    _, training = chapter.tables
    assert training.rows[0][1:5] == ["1,234", "100", "4", "30 s"]  # 50 x 4 / 10 + 50 x 4 / 20 seconds


@pytest.mark.parametrize("which", COMMANDS, ids=lambda which: which[0])
def test_commands_of_the_demo_are_sound(which, tmp_path, monkeypatch):
    """Before the demo ran, the check of each misses only what earlier lines make."""
    name, config, check = which
    monkeypatch.chdir(tmp_path)
    lines = (tiny.ROOT / "scripts/demo.sh").read_text().replace("\\\n", "").splitlines()
    commands = [line.split(f"vae3d {name} ")[1].split() for line in lines if f"vae3d {name} " in line]
    for command, missing in zip(commands, COMMANDS[which], strict=True):
        with pytest.raises(ConfigError) as error:
            check(tiny.compose(*command, config=config))
        assert sorted(f"{issue.key}={issue.value}" for issue in error.value.issues) == missing
