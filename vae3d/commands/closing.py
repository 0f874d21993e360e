"""What a run prints when it ends: scores from start to end, where its files are, and the next commands to copy."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig

from vae3d.checkpoints.location import step_folders
from vae3d.checkpoints.state import latest_state
from vae3d.commands.launch import search_path
from vae3d.commands.sweep import metric_rows
from vae3d.metrics.base import Better, goodness
from vae3d.report import score_names, text_table
from vae3d.text import plural
from vae3d.training.runlog import duration, short

if TYPE_CHECKING:
    from vae3d.training.trainer import Trainer

Row = Mapping[str, float]


def closing(trainer: Trainer, first_step: int, seconds: float, commands: Sequence[tuple[str, str]]) -> str:
    """The paragraphs that end a run.

    first_step: where this start began. seconds: since then. commands: (purpose, command) that work with this run.
    """
    steps, schedule = trainer.step - first_step, trainer.data.schedule
    paragraphs = []
    if steps:
        clips = schedule.clips_before(trainer.step) - schedule.clips_before(first_step)
        each = sorted({leaf.batch_size for leaf in schedule.leaves})
        size = plural(each[0], "clip") if len(each) == 1 else f"{each[0]} to {plural(each[-1], 'clip')}"
        paragraphs.append(f"{plural(steps, 'step')} of {size} in {duration(seconds)}: {plural(clips, 'clip')}")
    rows = validation_rows(trainer.folder)
    if scores := score_rows(rows, trainer.better):
        head = ["score", f"at step {rows[0]['step']}", "best", "at step", f"at step {rows[-1]['step']}"]
        columns = len(head) if len(rows) > 1 else 2
        paragraphs.append(text_table(head[:columns], [row[:columns] for row in scores]))
    paragraphs.append("\n".join(f"{name:12}{where}" for name, where in places(trainer)))
    paragraphs += [f"# {purpose}\n{command}" for purpose, command in commands]
    return "\n\n".join(paragraphs)


def validation_rows(folder: Path) -> list[Row]:
    """The lines of metrics.jsonl that have validation scores, by step."""
    rows = {row["step"]: row for row in metric_rows(folder) if any(name.startswith("val/") for name in row)}
    return [rows[step] for step in sorted(rows)]


def score_rows(rows: Sequence[Row], better: Mapping[str, Better]) -> list[list[str]]:
    """Of each score: name, first value, best value and its step, last value.

    better: which values are better, by score; None or missing: a score without a best value.
    """
    found = []
    for name in score_names(rows):
        label, values = name.removeprefix("val/"), {row["step"]: row[name] for row in rows if name in row}
        direction, best, at = better.get(label), "", ""
        if direction is not None:
            step = max(values, key=lambda step: goodness(values[step], direction))
            best, at = short(values[step]), str(step)
        first, last = (short(rows[i][name]) if name in rows[i] else "-" for i in (0, -1))
        found.append([label, first, best, at, last])
    return found


def places(trainer: Trainer) -> list[tuple[str, str]]:
    """(what, path) of a run's files that exist."""
    folder = trainer.folder
    exports = step_folders(folder / "exports")
    found = [
        ("run", folder),
        ("checkpoint", latest_state(folder / "checkpoints")),
        ("export", exports[-1] if exports else None),
        ("best export", folder / "exports/best"),
        *(("published", path) for path in trainer.final_outputs(trainer.step)),
        ("profile", folder / "profile.txt"),
    ]
    lines = [(name, shown(path)) for name, path in found if path is not None and path.exists()]
    logs = [name for name in ("metrics.jsonl", "rank0.log", "tensorboard") if (folder / name).exists()]
    return [*lines, ("logs", f"{shown(folder)}/{{{','.join(logs)}}}")]


def shown(path: Path) -> str:
    """Relative to the working directory, if it is in there."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def command(name: str, **settings: Any) -> str:
    """A `vae3d` command with KEY=VALUE arguments; those that are None are left out."""
    words = [f"{key}={value}" for key, value in settings.items() if value is not None]
    return " ".join([start_of(name), *map(shlex.quote, words)])


def start_of(name: str) -> str:
    return f"vae3d {name}" if shutil.which("vae3d") else f"python -m vae3d {name}"


def longer(name: str, trainer: Trainer) -> tuple[str, str] | None:
    """(purpose, command) to train on for as many steps again; None if the run was not started from a command line."""
    last = 2 * trainer.step  # trainer.max_steps may be below the steps that the run has
    more = trainer.step < trainer.config.trainer.max_steps
    purpose = f"resume at step {trainer.step}" if more else f"train on, to step {last}"
    if not HydraConfig.initialized() or latest_state(trainer.folder / "checkpoints") is None:
        return None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return purpose, f"# the same command{'' if more else f' with trainer.max_steps={last}'}"
    words = [word.removeprefix("++") for word in (*HydraConfig.get().overrides.task, *search_path())]
    if not more:
        words = [word for word in words if not word.startswith("trainer.max_steps=")]
        words.append(f"trainer.max_steps={last}")
    return purpose, " ".join([start_of(name), *map(shlex.quote, words)])


def curves(folder: Path) -> tuple[str, str] | None:
    """(purpose, command) to show curves beside those of other runs; None if there are none."""
    if not (folder / "tensorboard").is_dir():
        return None
    return "curves and pictures", f"tensorboard --logdir {shlex.quote(shown(folder.parent))}"
