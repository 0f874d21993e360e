"""Sweeps: the folders of jobs, and the table of all jobs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from vae3d.commands import sweep
from vae3d.config.overrides import SWEPT, allow_unknown_keys, job_folder, job_label, swept_keys
from vae3d.errors import UserError


@pytest.fixture
def swept(monkeypatch):
    """Sets the keys that a sweep changes."""
    return lambda *keys: monkeypatch.setenv(SWEPT, ",".join(keys))


def test_a_sweep_changes_the_keys_with_several_values():
    given = [
        "-m",
        "experiment=a,b",
        "optim.lr=1e-3,2e-3",
        "optim.betas=[0.9,0.99]",
        "run.name='a,b'",
        "run.seed=range(3)",
    ]
    overrides = [o for o in allow_unknown_keys(given) if not o.startswith("-")]
    assert swept_keys(overrides) == ["experiment", "optim.lr", "run.seed"]


def test_a_job_is_named_by_what_the_sweep_changes_as_short_as_it_differs(swept):
    swept("optim.lr", "loss.terms.kl.weight", "loss.terms.l1.weight", "model")
    overrides = [
        "++optim.lr=0.001",
        "++loss.terms.kl.weight=1e-06",
        "++loss.terms.l1.weight=2",
        "model=wan",
        "run.seed=1",
    ]
    assert job_label(overrides) == "lr=0.001 kl.weight=1e-06 l1.weight=2 model=wan"
    assert re.fullmatch(r"lr=0\.001_kl\.weight=1e-06_l1\.weight=2_model=wan_[0-9a-f]{6}", job_folder(overrides))


def test_folders_are_safe_short_and_differ(swept):
    swept("stage.init_from", "optim.betas", "data.source.path")
    paths = ["/weights/a,b/step-0000100", "'/weights/über Größe?*'", "runs/x/", "..", "/weights/c,d/step-0000100"]
    jobs = [
        ["++stage.init_from=" + path, "++optim.betas=[0.9, 0.999]", "++data.source.path=" + 60 * "v"] for path in paths
    ]
    names = [job_folder(job) for job in jobs]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,90}", name), name
    assert job_folder(jobs[0]) == names[0]  # so that a repeated sweep resumes its jobs
    assert job_folder([*jobs[0], "++trainer.max_steps=9"]) != names[0]


def finished(folder: Path, *overrides: str, error: Exception | None = None, **scores: float) -> None:
    """A job as Hydra reports it, and its metrics."""
    job = JobReturn(overrides=list(overrides), status=JobStatus.FAILED if error else JobStatus.COMPLETED)
    job.return_value = error
    sweep.record_job(folder, job)
    rows = [{"step": 0, "val/psnr": 1.0}, {"step": 2, **{f"val/{name}": value for name, value in scores.items()}}]
    if scores:
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def begun(folder: Path, *overrides: str) -> sweep.Sweep:
    sweeper = {"params": None}
    hydra = {"sweeper": sweeper, "overrides": {"task": list(overrides)}, "sweep": {"dir": str(folder)}}
    sweep.begin_sweep(OmegaConf.create({"hydra": hydra}))
    return sweep.current


def test_the_table_has_the_best_first_and_failed_jobs_last_with_their_reasons_once(tmp_path, monkeypatch):
    monkeypatch.setenv(SWEPT, "")
    monkeypatch.setenv(sweep.SWEEP, "")
    monkeypatch.setattr(sweep, "current", None)
    begun(tmp_path, "++optim.lr=9")
    finished(tmp_path / "of an earlier sweep", "++optim.lr=9", psnr=99.0)
    current = begun(tmp_path, "++optim.lr=1,2,3,4", "++run.seed=5")
    assert os.environ[SWEPT] == "optim.lr"
    finished(tmp_path / "a", "++optim.lr=1", psnr=20.0, ssim=0.5, psnr_video=20.0)
    finished(tmp_path / "b", "++optim.lr=2", psnr=30.0, ssim=0.25, psnr_video=30.0)
    for name, lr in (("c", 3), ("d", 4)):
        finished(tmp_path / name, f"++optim.lr={lr}", error=UserError("out of luck"))
    text = sweep.results(current, "val/psnr")
    cells = [line.split() for line in text.splitlines() if line.startswith(("job", "lr="))]
    assert cells == [
        ["job", "psnr", "ssim", "status"], ["lr=2", "30", "0.25", "done"], ["lr=1", "20", "0.5", "done"],
        ["lr=3", "-", "-", "failed"], ["lr=4", "-", "-", "failed"],
    ]  # fmt: skip
    assert text.count("out of luck") == 1
    assert "failed: lr=3\nfailed: lr=4\n" in text  # no training began in their folders
    (tmp_path / "c/launches.jsonl").touch()
    assert f"failed: {tmp_path / 'c'}\n" in sweep.results(current, "val/psnr")
    sweep.remove_unbegun(current)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "of an earlier sweep"]
    assert (tmp_path / "c" / sweep.JOB).exists()


def test_a_loss_is_better_if_it_is_lower(tmp_path, monkeypatch):
    monkeypatch.setenv(SWEPT, "")
    monkeypatch.setattr(sweep, "current", None)
    current = begun(tmp_path, "++optim.lr=1,2")
    finished(tmp_path / "a", "++optim.lr=1", loss=2.0)
    finished(tmp_path / "b", "++optim.lr=2", loss=1.0)
    jobs = [line.split()[0] for line in sweep.results(current, "val/loss").splitlines() if line.startswith("lr=")]
    assert jobs == ["lr=2", "lr=1"]
