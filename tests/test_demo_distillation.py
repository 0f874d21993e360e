"""The part of the demo and of its report that distils a toy VAE."""

from __future__ import annotations

import json
import shutil

import pytest

from tests import tiny
from tests.inference.test_comparison import TEACHER, compare
from tests.inference.test_wan_infer import write
from vae3d.config.issues import ConfigError
from vae3d.config.validate import check_comparison
from vae3d.errors import UserError

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
        (folder / "runs" / run).mkdir(parents=True)
        (folder / "runs" / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


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
    _, *rows, flat = report.pairs(results)
    assert [row[:2] for row in rows] == [[a, b] for a in ("student", "teacher") for b in ("student", "teacher")]
    for row in rows:
        scores = results["mean"]["pairs"][f"{row[0]} -> {row[1]}"]
        assert row[2:] == [f"{scores['psnr_video']:.2f}", f"{scores['ssim']:.4f}"]
    assert flat[2] == f"{results['mean']['baseline']['mean_colour']:.2f}"
    _, student, teacher = report.networks(results)
    assert [student[1], teacher[1]] == ["TAEHV", "WanVAE"]
    assert student[2] == f"{results['student']['parameters']:,}"
    assert teacher[4] == f"{results['cost']['teacher']['decode_frames_per_second']:.0f}"


def test_curves_are_the_students_beside_the_teachers_last_psnr(report, distilled):
    psnr, *losses = report.curves(distilled).axes
    line, curve = psnr.get_lines()
    assert list(line.get_ydata()) == [18.0, 18.0]
    assert list(zip(*curve.get_data(), strict=True)) == VAL["taehv_tiny"]
    for axis, top in zip(losses, (100, 50), strict=True):
        assert list(axis.get_lines()[0].get_ydata()) == [top / 100, top / 200]


def test_links_are_of_the_best_and_the_worst_clip(report):
    def comparison(*values: float) -> dict:
        return {
            "files": [{"file": str(psnr), "pairs": {"student -> student": {"psnr_video": psnr}}} for psnr in values]
        }

    assert [file["file"] for file in report.best_and_worst(comparison(20.0, 30.0, 10.0, 25.0))] == ["30.0", "10.0"]
    assert [file["file"] for file in report.best_and_worst(comparison(20.0))] == ["20.0"]


def test_section_holds_tables_curves_and_links(report, distilled):
    results = json.loads((distilled / "out/taehv_tiny_rec/comparison.json").read_text())
    section = report.section(distilled)
    assert section.count("<table>") == 2
    assert section.count("<img") == 1
    assert section.count('href="out/taehv_tiny_compare/index.html#video=00000') == 2
    assert "9 frames of 16 &times; 24" in section
    assert results["warnings"]  # random weights show nothing
    assert section.count("shows nothing in 3 of 3 files") == len(results["warnings"])


@pytest.mark.parametrize(
    "name",
    [
        "runs/taehv_teacher_tiny/metrics.jsonl",
        "runs/taehv_tiny/metrics.jsonl",
        "out/taehv_tiny_rec/comparison.json",
        "out/taehv_tiny_compare/index.html",
    ],
)
def test_a_missing_file_is_named(report, folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing; .*scripts/demo.sh"):
        report.section(folder)


def test_a_run_that_was_never_validated_is_named(report, folder):
    (folder / "runs/taehv_tiny/metrics.jsonl").write_text(json.dumps({"step": 50, "loss/latent": 1.0}) + "\n")
    with pytest.raises(UserError, match=r"runs/taehv_tiny/metrics.jsonl has no val/psnr"):
        report.section(folder)


def test_the_script_ends_with_a_single_message(tmp_path):
    done = tiny.run(*tiny.script("scripts/demo/demo_distillation_report.py"), "demo", "curves.png", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].startswith("error: demo/runs/taehv_teacher_tiny/metrics.jsonl is missing")
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
    [command] = [line.split("compare.py ")[1].split() for line in lines if "compare.py" in line]
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
