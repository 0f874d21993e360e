"""A run's log: launches.jsonl, metrics.jsonl, data_errors.jsonl, console lines, progress bar; and its stop signals."""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vae3d.errors import UserError
from vae3d.io import hold_lock, open_nofollow, write_text, yaml_text
from vae3d.progress import Bar
from vae3d.report import score_names
from vae3d.text import plural
from vae3d.training.loggers import Loggers

log = logging.getLogger("vae3d")
PACKAGES = ("torch", "accelerate", "hydra-core", "av", "numpy")


class RunLocked(UserError):
    """Another process trains in the run's folder. Raised on rank 0 only."""

    on_every_rank = False


class RunLog:
    """Rank 0 writes; other ranks write their `errors`, and warnings with `any_rank`."""

    def __init__(self, folder: Path, logger: Loggers, *, rank: int) -> None:
        self.folder, self.logger, self.rank = folder, logger, rank
        self.main = rank == 0
        self._broken: set[str] = set()
        self._errors = f"data_errors{rank or ''}.jsonl"
        self._recorded: set[str] = set()  # its lines
        self._bar: Bar | None = None
        self._timer: Countdown | None = None

    def open(self, step: int, max_steps: int, *, validates: bool = False) -> None:
        """Lock the run's folder and start writing at `step`, first its validation if the run `validates` there.

        Raises RunLocked.
        """
        if (file := self.folder / self._errors).is_file():
            self._recorded = set(file.read_text(errors="replace").splitlines())
        if not self.main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        in_use = RunLocked(f"another process is training in {self.folder}; stop it, or give this run another name")
        self._lock = ExitStack()
        self._lock.enter_context(hold_lock(self.folder / ".lock", in_use))
        self.logger.open(self.folder, step, self._drop_after(step, validates))
        self._bar = Bar(total=max_steps, initial=step, unit="step", disable=None, dynamic_ncols=True, leave=False)
        self._timer = Countdown(step, max_steps)

    def launch(
        self, step: int, config: Mapping[str, Any], changed: Mapping[str, Any], data_changes: Sequence[str] = ()
    ) -> None:
        """Append this start to launches.jsonl: time, step, command, commit, versions, changed settings and data."""
        if not self.main:
            return
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "step": step,
            "command": sys.orig_argv,  # sys.argv is what Hydra was given, without the name of the command
            "commit": _git("rev-parse", "HEAD"),
            "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in PACKAGES},
            "changed_since_checkpoint": {key: list(pair) for key, pair in changed.items()},
            "data_changed_since_checkpoint": list(data_changes),
            "config": config,
        }
        self._append("launches.jsonl", entry)
        self.logger.config(config, step)
        versions = {"python": entry["python"], **entry["versions"], "commit": entry["commit"]}
        if entry["uncommitted_changes"]:
            versions["commit"] += " with uncommitted changes"
        for name, text in {
            "command": shlex.join(entry["command"]),
            "configuration": yaml_text(config),
            "versions": "\n".join(f"{package} {number or 'unknown'}" for package, number in versions.items()),
        }.items():
            self.text(name, text, step)
        for line in data_changes:
            self.warn(f"the data changed since step {step}: {line}")

    def text(self, name: str, text: str, step: int) -> None:
        """Give the logger a text about the run."""
        if self.main:
            self.logger.text(f"run/{name}", text, step)

    def say(self, message: str) -> None:
        if self.main:
            log.info(message)

    def warn(self, message: str, *, any_rank: bool = False) -> None:
        if self.main or any_rank:
            log.warning(message)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()
            self._timer.advance(time.monotonic())

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write values to metrics.jsonl and the logger, and the main ones to the console, in one line."""
        if not self.main:
            return
        with self._warn_on_os_error(f"metrics of step {step}"):
            self._append("metrics.jsonl", {"step": step, **values})
        self.logger.scalars(values, step)
        log.info("%s  %s", self._timer.text(step), "  ".join(fields(values)))

    def first_step(self, values: Mapping[str, float], step: int) -> None:
        """Write the main values of the first step to the console, if it has no progress bar: logs that go to a file
        would show nothing until the first `scalars`. Does nothing at later steps."""
        if self.main and self._bar.disable and step == self._timer.first + 1:
            log.info("%s  %s", self._timer.text(step), "  ".join(fields(values)))

    def frames(self, name: str, frames: np.ndarray, step: int, caption: str = "") -> None:
        """Show frames [T, H, W, 3] uint8: one as an image, several as a video."""
        if self.main and len(frames) == 1:
            self.logger.image(name, frames[0], step, caption)
        elif self.main:
            self.logger.video(name, frames, 8.0, step, caption)

    def errors(self, errors: Iterable[tuple[str, str]], consequence: str = "another file replaces it") -> None:
        """Report each (path, reason) once, in the log and in data_errors.jsonl (data_errors<N>.jsonl on rank N); in the
        file also if the run resumes. consequence: of the files that cannot be read, for the log."""
        for path, reason in errors:
            if path in self._broken:
                continue
            self._broken.add(path)
            log.warning("cannot be read, %s: %s: %s", consequence, path, reason)
            with self._warn_on_os_error(f"the error of {path}"):
                self._record(path, reason)

    def skipped_files(self, files: Iterable[tuple[str, str]]) -> None:
        """List readable files that are not used, such as too small ones, in data_errors.jsonl."""
        if self.main:
            with self._warn_on_os_error("the list of skipped files"):
                for path, reason in files:
                    self._record(path, reason)

    def close(self, failed: bool = False) -> None:
        """May be called twice, and after an error. failed: say so to the logger."""
        if self._bar is not None:
            self._bar.close()
            self.logger.close(failed)
            self._lock.close()

    def _drop_after(self, step: int, validates: bool) -> dict[str, int]:
        """Drop metrics of steps after the checkpoint, which a killed run took and this one takes again, and scores of
        `step` itself if it validates there.

        Returns the last such step of each metric.
        """
        file, dropped = self.folder / "metrics.jsonl", {}
        if not file.is_file():
            return dropped
        first = step + 1 if step else 0  # a start at step 0 takes all again

        def again(line: str) -> bool:
            return _step_of(line) >= first or (validates and _step_of(line) == step and '"val/' in line)

        lines = file.read_text(errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and _step_of(line) > -1 and not again(line)]
        if kept != lines:
            write_text(file, "".join(kept))
        for line in filter(again, lines):
            dropped |= dict.fromkeys(json.loads(line), _step_of(line))
        dropped.pop("step", None)
        return dropped

    @contextmanager
    def _warn_on_os_error(self, what: str) -> Iterator[None]:
        """Warn instead of raising if the entry cannot be written; the run goes on."""
        try:
            yield
        except OSError as error:
            log.warning("%s is not recorded: %s", what, error)

    def _record(self, path: str, reason: str) -> None:
        entry = {"path": path, "reason": reason}
        if (line := json.dumps(entry)) not in self._recorded:
            self._append(self._errors, entry)
            self._recorded.add(line)

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        with open_nofollow(self.folder / name, "a+b") as stream:
            if stream.seek(0, os.SEEK_END):
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # half a line, from a kill in the middle of a write
                    stream.write(b"\n")
            stream.write(json.dumps(entry).encode() + b"\n")


def _step_of(line: str) -> int:
    """The step of a line of metrics.jsonl; -1 if the line is damaged, as after a kill during a write."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return -1
    step = entry.get("step") if isinstance(entry, dict) else None
    return step if isinstance(step, int) else -1


def _git(*args: str) -> str | None:
    """Output of git in the project's folder; None without git or a repository."""
    try:
        done = subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# ---- the console's lines


class Countdown:
    """Counts the steps of a start, from which it knows how long the rest takes."""

    def __init__(self, step: int, max_steps: int) -> None:
        self.first, self.step, self.max_steps = step, step, max_steps
        self.started = self.now = 0.0

    def advance(self, now: float) -> None:
        """A step has ended. now: seconds."""
        self.step, self.now = self.step + 1, now
        if self.step == self.first + 1:  # not timed: it starts workers, and compiles
            self.started = now

    def text(self, step: int) -> str:
        """Step, percent and time left, which includes validations and saves as they were so far."""
        done = f"step {step}/{self.max_steps}  {100 * step // self.max_steps}%"
        timed = self.step - self.first - 1
        if timed < 1 or step >= self.max_steps:
            return done
        return f"{done}  {duration((self.now - self.started) / timed * (self.max_steps - step))} left"


def duration(seconds: float) -> str:
    """The two largest of days, hours, minutes and seconds: 2 h 5 min."""
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    left, parts = max(round(seconds), 0), []
    for size, unit in units:
        if left >= size or (size == 1 and not parts):
            parts.append(f"{left // size} {unit}")
        elif parts:
            parts.append("")
        left %= size
    return " ".join(part for part in parts[:2] if part)


def fields(values: Mapping[str, float]) -> list[str]:
    """The main values of a training step or of a validation, as the console shows them, none twice."""
    if any(name.startswith("val/") for name in values):
        return [validation_text(values)]
    texts = loss_texts(values)
    if "loss_discriminator" in values:
        texts.append(f"discriminator {short(values['loss_discriminator'])}")
    rates: dict[str, list[str]] = {}  # text of the rate -> parts that have it
    for name, value in values.items():
        if name.partition("/")[0] == "lr":
            rates.setdefault(short(value), []).append(name.removeprefix("lr").removeprefix("/"))
    texts += [f"lr {rate}{' ' + ', '.join(parts) if len(rates) > 1 else ''}" for rate, parts in rates.items()]
    if "grad_norm" in values:
        texts.append(f"grad norm {short(values['grad_norm'])}")
    if "clips_per_second" in values:
        texts.append(f"{short(values['clips_per_second'])} clips/s")
    if "teacher_cache_hits" in values:
        texts.append(f"{100 * values['teacher_cache_hits']:.0f}% of targets cached")
    if "memory_idle_gib" in values:  # of a GPU
        texts.append(f"{values['memory_gib']:.1f} GiB")
    if values.get("skipped"):
        texts.append(f"{plural(round(values['skipped']), 'step')} skipped")
    return texts


def loss_texts(values: Mapping[str, float]) -> list[str]:
    """The loss, and of each term its value per element and its share of what is minimized: l1 0.043 (98%).

    A term without a value per element, as a GAN's, has its value. The share is that of the weighted term among the
    absolute values of all.
    """
    names = dict.fromkeys(name.partition("/")[2] for name in values if name.startswith(("loss_mean/", "loss/")))
    weighted = {name: abs(values[f"loss_weighted/{name}"]) for name in names if f"loss_weighted/{name}" in values}
    total, terms = sum(weighted.values()), []
    for name in names:
        text = f"{name} {short(values.get(f'loss_mean/{name}', values.get(f'loss/{name}')))}"
        if len(weighted) > 1 and total and name in weighted:
            text += f" ({100 * weighted[name] / total:.0f}%)"
        terms.append(text)
    if "loss" not in values:  # a step of the discriminator only
        return terms
    loss = f"loss {short(values['loss'])}"
    if len(terms) == 1 and terms[0].split()[1] == loss.split()[1]:
        terms = []
    return [f"{loss}{': ' if terms else ''}{', '.join(terms)}{quarters(values, 'loss_q')}"]


def quarters(values: Mapping[str, float], prefix: str) -> str:
    """A diffusion model's loss by quarter of the timesteps, if it is there."""
    if not any(name.startswith(prefix) for name in values):
        return ""
    found = [short(values[f"{prefix}{q}"]) if f"{prefix}{q}" in values else "-" for q in range(4)]
    return f" (by quarter of the timesteps {' '.join(found)})"


def validation_text(values: Mapping[str, float]) -> str:
    scores = {name.removeprefix("val/"): short(values[name]) for name in score_names([values])}
    shown = [
        f"{name} {text}{quarters(values, 'val/loss_q') if name == 'loss' else ''}"
        for name, text in scores.items()
        if not name.startswith("loss_q")
    ]
    count = values.get("val_clips", 0)
    clips = f" of {plural(round(count), 'clip')}" if count else ""
    return f"validation{clips}: {', '.join(shown)}"


def short(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}"


# ---- stop signals

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # Slurm, Kubernetes, torchrun; Ctrl-C; a terminal that closes


@dataclass
class StopRequest:
    """signum: the first signal received, or 0."""

    signum: int = 0


@contextmanager
def stop_signals(verbose: bool = True) -> Iterator[StopRequest]:
    """Inside this context SIGTERM, SIGINT and SIGHUP set `signum` instead of killing the process.

    After SIGINT the next signal kills at once. SIGTERM may come repeatedly: Slurm and torchrun both send it to a rank.
    A signal that is ignored already, as SIGHUP under nohup, stays ignored.
    """
    request, owner = StopRequest(), os.getpid()

    def handle(signum: int, _: object) -> None:
        if os.getpid() != owner:  # a data worker that has just been forked
            return
        if not request.signum and verbose:
            again = "; a second Ctrl-C ends it at once, without saving" if signum == signal.SIGINT else ""
            message = f"\n{signal.Signals(signum).name}: the run stops after this step{again}\n"
            with suppress(OSError):  # SIGHUP comes from a terminal that was closed
                os.write(2, message.encode())  # print is not reentrant
        request.signum = request.signum or signum
        if signum == signal.SIGINT:
            for name in STOPS:
                signal.signal(name, signal.SIG_DFL)

    before = {name: signal.getsignal(name) for name in STOPS}
    for name, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(name, handle)
    try:
        yield request
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
