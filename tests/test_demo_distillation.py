"""The part of the demo, and the chapter of its page, that distils a toy VAE."""

from __future__ import annotations

import json
import shutil

import pytest

from tests import tiny
from tests.demo_sample import write_run
from tests.inference.test_comparison import TEACHER, compare
from tests.inference.test_wan_infer import write
from vae3d.config.issues import ConfigError
from vae3d.config.validate import check_comparison
from vae3d.errors import UserError
from vae3d.report.page import has_clip

VAL = {"taehv_teacher_tiny": [(300, 15.0), (600, 18.0)], "taehv_tiny": [(100, 14.0), (200, 17.5)]}


def distil(folder, source) -> None:
    """In out/ what compare.py writes of three clips, student and teacher with random weights; metrics in runs/."""
    checkpoints = folder / "checkpoints"
    teacher = write("wan", checkpoints / "teacher", *TEACHER)
    student = write("taehv", checkpoints / "student")
    compare(student, source, folder / "out/taehv_tiny", teacher, "num_frames=9", "num_samples=3")
    for run, values in VAL.items():
        lines = [{"step": s, "loss/latent": 100 / s, "loss/features": 50 / s} for s, _ in values]
        lines += [{"step": step, "val/psnr": psnr} for step, psnr in values]
        write_run(folder, run, lines)


@pytest.fixture(scope="module")
def report():
    return tiny.load_script("demo_distillation_report")


@pytest.fixture
def folder(tmp_path, distilled):
    """A copy, for tests that take something away."""
    return shutil.copytree(distilled, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, videos):
    folder = tmp_path_factory.mktemp("demo")
    distil(folder, videos)
    return folder


def test_tables_are_those_of_the_comparison(report, distilled):
    results = json.loads((distilled / "out/taehv_tiny_rec/comparison.json").read_text())
    *rows, flat = report.pairs(results).rows
    assert [row[:2] for row in rows] == [[a, b] for a in ("student", "teacher") for b in ("student", "teacher")]
    for row in rows:
        scores = results["mean"]["pairs"][f"{row[0]} -> {row[1]}"]
        assert row[2:] == [f"{scores['psnr_video']:.2f}", f"{scores['ssim']:.4f}"]
    assert flat[2] == f"{results['mean']['baseline']['mean_colour']:.2f}"
    student, teacher = report.networks(results).rows
    assert [student[1], teacher[1]] == ["TAEHV", "WanVAE"]
    assert student[2] == f"{results['student']['parameters']:,}"
    assert teacher[4] == f"{results['cost']['teacher']['decode_frames_per_second']:.0f}"


def test_curves_are_the_students_beside_the_teachers_last_psnr(report, distilled):
    psnr, *losses = report.curves(distilled)
    assert psnr.series == {"student": VAL["taehv_tiny"], "teacher, 18.00 dB at its end": [(100, 18.0), (200, 18.0)]}
    for chart, top in zip(losses, (100, 50), strict=True):
        assert chart.series == {"student": [(100, top / 100), (200, top / 200)]}


def test_the_chapter_holds_the_clips_of_every_pair_of_encoder_and_decoder(report, distilled, tmp_path):
    results = json.loads((distilled / "out/taehv_tiny_rec/comparison.json").read_text())
    chapter = report.chapter(distilled, tmp_path)
    assert chapter.reconstructions == [*results["mean"]["pairs"]]
    assert [video.name for video in chapter.videos] == [file["file"] for file in results["files"]]
    for video, file in zip(chapter.videos, results["files"], strict=True):
        assert has_clip(tmp_path, video.id)
        assert video.scores["teacher -> student"]["ssim"] == pytest.approx(
            file["pairs"]["teacher -> student"]["ssim"], rel=1e-4
        )
    assert "9 frames of 16 x 24" in chapter.tables[0].note
    assert [(row[1], row[5]) for row in chapter.tables[2].rows] == [
        ("1,234", str(distilled / "runs" / run)) for run in VAL
    ]
    assert list(chapter.warnings) == results["warnings"] != []  # random weights show nothing


@pytest.mark.parametrize(
    "name",
    ["runs/taehv_teacher_tiny/metrics.jsonl", "runs/taehv_tiny/metrics.jsonl", "out/taehv_tiny_rec/comparison.json",
     "out/taehv_tiny_compare/index.html"],
)  # fmt: skip
def test_a_missing_file_is_named(report, folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing; .*scripts/demo.sh"):
        report.chapter(folder, folder / "report")


def test_a_run_that_was_never_validated_is_named(report, folder):
    (folder / "runs/taehv_tiny/metrics.jsonl").write_text(json.dumps({"step": 50, "loss/latent": 1.0}) + "\n")
    with pytest.raises(UserError, match=r"runs/taehv_tiny/metrics.jsonl has no val/psnr"):
        report.chapter(folder, folder / "report")


def test_the_script_ends_with_a_single_message(tmp_path):
    done = tiny.run(*tiny.script("scripts/demo/demo_distillation_report.py"), "demo", "curves.png", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].startswith("error: demo/runs/taehv_tiny/metrics.jsonl is missing")
    assert "Traceback" not in done.stdout


def test_the_experiments_write_what_the_report_reads(report):
    student, teacher = (tiny.compose(f"experiment={name}") for name in (report.STUDENT, report.TEACHER))
    assert [student.run.root, teacher.run.root] == ["demo/runs", "demo/runs"]
    assert student.teacher.path == f"demo/runs/{report.TEACHER}"
    assert {f"loss/{name}" for name, term in student.loss.terms.items() if term.weight} >= set(report.LOSSES)
    for config in (student, teacher):
        assert "psnr" in config.validation.metrics
        assert config.trainer.max_steps % config.validation.every == 0  # the last line is of the finished run


def test_the_demo_compares_what_it_distilled(report, tmp_path, monkeypatch):
    """Before the demo ran, the check misses only what earlier lines make."""
    monkeypatch.chdir(tmp_path)
    lines = (tiny.ROOT / "scripts/demo.sh").read_text().replace("\\\n", "").splitlines()
    [command] = [line.split("vae3d compare ")[1].split() for line in lines if "vae3d compare" in line]
    config = tiny.compose(*(a.replace("teacher=", "teacher.path=") for a in command), config="compare")
    with pytest.raises(ConfigError) as error:
        check_comparison(config)
    made = [
        f"checkpoint=demo/runs/{report.STUDENT}",
        "source=demo/videos/videos.csv",
        f"teacher.path=demo/runs/{report.TEACHER}",
    ]
    assert sorted(f"{issue.key}={issue.value}" for issue in error.value.issues) == sorted(made)
    assert config.save_dir == f"demo/out/{report.STUDENT}"
