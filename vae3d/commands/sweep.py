"""Sweeps (Hydra's -m): how each job ended, and the table of all jobs at the end. Imports no torch."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from vae3d.config.overrides import SWEPT, job_label, key_of, swept_keys
from vae3d.io import remove_empty, write_text
from vae3d.report import score_names, text_table
from vae3d.text import plural

JOB, SETTINGS = "job.json", "multirun.yaml"  # of a job, written here; of a sweep, written by Hydra
SWEEP = "VAE3D_SWEEP"  # in the environment of jobs: Sweep.name


@dataclass
class Sweep:
    """The sweep that this process runs. name: what its jobs note, to tell them from those of another in the folder."""

    folder: Path
    name: str


current: Sweep | None = None


def begin_sweep(config: DictConfig) -> None:
    """Note the sweep's folder, and in the environment of its jobs the keys that differ between them."""
    global current
    params = config.hydra.sweeper.get("params") or {}  # of Optuna, or of the configuration
    keys = [*map(key_of, params), *swept_keys(config.hydra.overrides.task)]
    os.environ[SWEPT] = ",".join(dict.fromkeys(keys))
    current = Sweep(Path(config.hydra.sweep.dir), f"{os.getpid()}-{time.time_ns()}")
    os.environ[SWEEP] = current.name


def record_job(folder: Path, job: JobReturn) -> None:
    """Write what a job changed and how it ended into its folder."""
    overrides = list(job.overrides or [])
    entry = {"overrides": overrides, "changes": job_label(overrides), "reason": None, "sweep": os.environ.get(SWEEP)}
    if job.status != JobStatus.COMPLETED:
        error = job._return_value  # the property raises it
        entry["reason"] = str(error.__cause__ or error) or type(error).__name__
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / JOB, json.dumps(entry, indent=1) + "\n")


def results(sweep: Sweep, metric: str) -> str:
    """A table of the sweep's jobs that have ended, the best first, and why jobs failed.

    metric: the one to sort by; val/loss is better if lower, others if higher.
    """
    found = [(file.parent, json.loads(file.read_text())) for file in sorted(sweep.folder.glob(f"*/{JOB}"))]
    jobs = [(folder, job) for folder, job in found if job["sweep"] == sweep.name]
    scores = {folder: last_scores(folder) for folder, _ in jobs}

    def key(job: tuple[Path, dict[str, Any]]) -> tuple[bool, bool, float]:
        value = scores[job[0]].get(metric)
        lower = metric == "val/loss"
        return job[1]["reason"] is not None, value is None, 0.0 if value is None else value if lower else -value

    jobs.sort(key=key)
    names = [name for name in score_names(scores.values()) if "loss_q" not in name]
    names.sort(key=lambda name: name != metric)
    head = ["job", *(name.removeprefix("val/") for name in names), "status"]
    rows = []
    for folder, job in jobs:
        values = [f"{scores[folder][name]:.4g}" if name in scores[folder] else "-" for name in names]
        rows.append([job["changes"] or folder.name, *values, "failed" if job["reason"] else "done"])
    lines = [f"{plural(len(jobs), 'job')} in {sweep.folder}", "", text_table(head, rows)]
    reasons: dict[str, list[str]] = {}
    for folder, job in jobs:
        if job["reason"]:
            where = str(folder) if has_begun(folder) else job["changes"] or folder.name
            reasons.setdefault(job["reason"], []).append(where)
    for reason, failed in reasons.items():
        lines += ["", *(f"failed: {where}" for where in failed), reason]
    return "\n".join(lines)


def has_begun(folder: Path) -> bool:
    """Whether a job's folder has more than its entry."""
    return any(path.name != JOB for path in folder.iterdir())


def remove_unbegun(sweep: Sweep) -> None:
    """Remove the entries of jobs in which no training began, and the sweep's folder if nothing else is in it."""
    for file in sweep.folder.glob(f"*/{JOB}"):
        if not has_begun(file.parent):
            file.unlink()
            remove_empty(file.parent)
    if [path.name for path in sweep.folder.glob("*")] == [SETTINGS]:
        (sweep.folder / SETTINGS).unlink()
        remove_empty(sweep.folder)


def last_scores(folder: Path) -> dict[str, float]:
    """The scores of a run's last validation."""
    scores: dict[str, float] = {}
    for row in metric_rows(folder):
        scores = {name: row[name] for name in row if name.startswith("val/")} or scores
    return scores


def metric_rows(folder: Path) -> list[dict[str, float]]:
    """The lines of the run's metrics.jsonl, without those that a kill or a full disk cut off."""
    file, rows = folder / "metrics.jsonl", []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
