"""The chapter of the demo's page that shows what a GAN brings."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.demo_sample import write_run, write_scores
from vae3d.errors import UserError

RUNS = {"sd_vae_tiny": (20.0, 0.3), "sd_vae_control": (21.0, 0.4), "sd_vae_gan_tiny": (20.5, 0.7)}


def adversarial(folder) -> None:
    """What scripts/demo.sh leaves of the three runs, with made-up numbers."""
    for run, (psnr, sharpness) in RUNS.items():
        lines = [{"step": step, "val/psnr": psnr, "val/sharpness": sharpness * step / 100} for step in (50, 100)]
        write_run(folder, run, lines)
        for kind in ("ori", "rec"):
            (folder / f"out/{run}_{kind}").mkdir(parents=True)
            Image.fromarray(np.full((16, 16, 3), 99, np.uint8)).save(folder / f"out/{run}_{kind}/cat.png")
    recs = {name: f"{run}_rec" for name, run in zip(("start", "more_steps", "gan"), RUNS, strict=True)}
    write_scores(folder / "out", recs, {"psnr": 28.0, "ssim": 0.5, "sharpness": 0.9})


@pytest.fixture(scope="module")
def report():
    return tiny.load_script("demo_gan_report")


def test_runs_that_go_on_begin_where_the_first_ended(report, tmp_path):
    adversarial(tmp_path)
    psnr, sharpness = report.curves(tmp_path)
    start, control, gan = ([step for step, _ in line] for line in psnr.series.values())
    assert start == [50, 100]
    assert control == gan == [100, 150, 200]
    assert [value for _, value in sharpness.series["300 steps with the GAN"]] == pytest.approx([0.3, 0.35, 0.7])


def test_one_picture_holds_curves_and_photographs(report, tmp_path):
    adversarial(tmp_path)
    report.draw(tmp_path, tmp_path / "gan.jpg")
    with Image.open(tmp_path / "gan.jpg") as picture:
        assert picture.width == 1000


def test_a_missing_run_is_named(report, tmp_path):
    adversarial(tmp_path)
    (tmp_path / "runs/sd_vae_control/metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"sd_vae_control.metrics.jsonl is missing; .*scripts/demo.sh"):
        report.chapter(tmp_path, tmp_path / "report")
