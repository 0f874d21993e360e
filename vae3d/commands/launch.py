"""Starting processes: ranks, sweep jobs as torchrun children, console output of many ranks. Imports no torch."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from vae3d.config.issues import ConfigError
from vae3d.config.overrides import is_group, override_issues
from vae3d.config.schema import Launcher
from vae3d.errors import UserError
from vae3d.io import check_run_folder, naming, open_nofollow, write_text

R = TypeVar("R")
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TORCHRUN = """\
import sys
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.run import main
try:
    main()
except SignalException as error:  # the ranks have ended by then
    sys.exit(128 + error.sigval)  # instead of its traceback
"""
UNWRITABLE = frozenset(
    {
        *(errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ELOOP),
        *(errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS, errno.ESTALE),
    }
)  # errors of the disk or of the folder that the user named, not of the program


def rank() -> int:
    return int(os.environ.get("RANK", 0))


class ConsoleHandler(logging.Handler):
    """Log lines above the progress bar, from rank 0; warnings from every rank."""

    def __init__(self, stream: Any = None) -> None:
        super().__init__()
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        if rank() == 0 or record.levelno >= logging.WARNING:
            tqdm.write(self.format(record), file=self.stream)


class RunLogFile(logging.FileHandler):
    """A log file in a run's folder; raises FileError where it is a link. A full disk costs the lines, and not the run:
    one line on the console says so."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.failed = False

    def _open(self) -> IO[str]:
        return open_nofollow(Path(self.baseFilename), self.mode)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            tqdm.write(f"{self.baseFilename} lacks lines: {error.strerror}", file=sys.stderr)


def read_arguments(arguments: Sequence[str]) -> list[str]:
    """allow_unknown_keys(); overrides that Hydra would refuse end the process with one message and exit
    status 2."""
    overrides = allow_unknown_keys(arguments)
    if issues := override_issues(overrides):
        tell(ConfigError(issues))
        sys.exit(2)
    return overrides


def allow_unknown_keys(arguments: Sequence[str]) -> list[str]:
    """Command-line overrides as Hydra takes them.

    Plain `key=value` overrides get `++` in front: Hydra would stop at the first unknown key, and vae3d.config lists
    all. Values that Hydra's grammar does not accept, such as paths with `=`, brackets or letters beyond ASCII, are
    quoted, and `~/` is the home folder.
    """
    return [_override(a) if "=" in a and a[0] not in "-~" else a for a in arguments]


def _override(argument: str) -> str:
    key, _, value = argument.partition("=")
    name = key.lstrip("+")
    if not name[:1].isalpha() or is_group(name):
        return argument
    if value == "~" or value.startswith("~/"):
        value = os.path.expanduser(value)
    try:
        OverridesParser.create().parse_override(f"{name}={value}")
    except HydraException:
        if value[:1] + value[-1:] not in ("[]", "{}"):  # of which Hydra says what is wrong
            value = quoted(value)
    return f"{'' if key != name or name.startswith('hydra.') else '++'}{key}={value}"


def quoted(text: str) -> str:
    """Text as a value of a Hydra override, whatever is in it."""
    return QuotedString(text, Quote.single).with_quotes()


def run_directory() -> Path:
    return Path(HydraConfig.get().runtime.output_dir)


def prepare_run_folder(cfg: DictConfig) -> Path:
    """The run's folder, with this start's configuration in .hydra/rank<N>. Hydra itself would write that through links.

    Raises FileError if the folder holds links, see check_run_folder, or cannot be written to.
    """
    folder, info = run_directory(), HydraConfig.instance().cfg
    check_run_folder(folder)
    target = folder / ".hydra" / f"rank{rank()}"
    with naming(target):
        target.mkdir(parents=True, exist_ok=True)
        for name, content in (("config", cfg), ("hydra", info), ("overrides", info.hydra.overrides.task)):
            write_text(target / f"{name}.yaml", OmegaConf.to_yaml(content))
    return folder


class FolderCheck(Callback):
    """Ends a start with one message where run.root cannot be made, or Hydra would write a sweep's multirun.yaml through
    a link. SystemExit, since Hydra turns other exceptions of callbacks into warnings."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        try:
            Path(str(config.run.root)).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"error: run.root={config.run.root}: cannot be made: {error.strerror}", file=sys.stderr)
            sys.exit(2)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self.on_run_start(config)
        file = Path(config.hydra.sweep.dir) / "multirun.yaml"
        if file.is_symlink():
            print(f"error: {file}: is a symbolic link to {os.readlink(file)}; delete it", file=sys.stderr)
            sys.exit(2)


def in_sweep() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ


def starts_ranks(launcher: Launcher) -> bool:
    """Whether this process is to start torchrun rather than to train."""
    return launcher.name == "torchrun" and not under_torchrun()


def torchrun_child(launcher: Launcher, script: str) -> None:
    """Run this job again under torchrun, with the same overrides and folder; wait for it.

    Raises RuntimeError if it fails, which lets Hydra go on with the next job of a sweep (SystemExit would not).
    """
    overrides = [o for o in HydraConfig.get().overrides.task if not o.lstrip("+").startswith("launcher")]
    command = [
        *(sys.executable, "-c", TORCHRUN),
        *([] if any("rdzv" in a or "master" in a for a in launcher.args) else ["--standalone"]),
        *(f"--nproc-per-node={launcher.nproc}", *launcher.args),
        *(script, *overrides, f"hydra.run.dir={quoted(str(run_directory()))}"),
    ]
    # In a session of its own, so that Ctrl-C reaches torchrun once, from here, and not from the terminal as well.
    child = subprocess.Popen(command, start_new_session=True)
    received: list[int] = []

    def forward(signum: int, _: object) -> None:
        received.append(signum)
        child.send_signal(signum)

    before = {name: signal.getsignal(name) for name in STOPS}
    for name, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(name, forward)
    try:
        code = child.wait()
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    if received:
        sys.exit(128 + received[0])
    if code:
        raise RuntimeError(f"torchrun exited with {code}; see the log files in {run_directory()}")


class Fits(Protocol):
    """A trainer. stopped_by: the signal that ended `fit`, or 0."""

    stopped_by: int

    def fit(self) -> bool: ...


def fit(trainer: Fits) -> int:
    """trainer.fit(); returns the signal that ended it, or 0. Where it ends with a UserError after a signal, that is
    printed and the process ends, which ends a sweep; without a signal the next job of a sweep runs."""
    try:
        trainer.fit()
    except UserError as error:
        if not trainer.stopped_by:
            raise
        tell(error)
        sys.exit(2)
    return trainer.stopped_by


def end_after(signum: int) -> None:
    """After a signal the exit status is 128 + its number, so that neither `&&` nor a sweep goes on."""
    if signum:
        sys.exit(128 + signum)


def last_metric(folder: Path, name: str, step: int) -> float | None:
    """The value of a metric at the last step of a run, from its metrics.jsonl; NaN if there is none, as after a
    validation that failed; None if the run holds that metric of no step, as without validation."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    values = {entry["step"]: entry[name] for entry in map(_entry, lines) if name in entry}
    return values.get(step, math.nan) if values else None


def _entry(line: str) -> dict[str, Any]:
    """A line of metrics.jsonl; {} for a damaged one, from a kill or a full disk in the middle of a write."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else {}


def exit_on_user_error(run: Callable[[], R]) -> R:
    """run(); a UserError, or a place that cannot be written, ends as its message alone and exit status 2.

    In a sweep it is raised on, so that the next job runs. VAE3D_TRACEBACK=1 shows where it came from.
    """
    raised_on = in_sweep() or os.environ.get("VAE3D_TRACEBACK") == "1"
    try:
        return run()
    except UserError as error:
        if raised_on:
            raise
        tell(error)
    except OSError as error:
        if raised_on or error.errno not in UNWRITABLE:
            raise
        place = error.filename or "a file could not be written (VAE3D_TRACEBACK=1 shows which)"
        print(f"error: {place}: {os.strerror(error.errno)}", file=sys.stderr, flush=True)
    sys.exit(2)


def tell(error: UserError) -> None:
    """Print an error, once per machine if all ranks have it.

    torchrun ends all ranks when the first one exits, so the others leave rank 0 time to speak before they do.
    """
    if error.on_every_rank and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)
    print(f"error: {error}", file=sys.stderr, flush=True)


def with_elastic_record(run: Callable[[], R]) -> R:
    """run(), so that torchrun's summary shows what went wrong in a rank, which Hydra would swallow."""
    if not under_torchrun():
        return run()
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(exit_on_user_error)(run)


def forbid_sweep_under_torchrun() -> None:
    """Raises UserError: ranks of an in-process sweep drift apart when one of them fails."""
    if in_sweep() and under_torchrun():
        raise UserError(
            "a sweep (-m) does not run under torchrun; let every job start its own ranks:\n"
            "  python train.py -m ... launcher=torchrun launcher.nproc=N"
        )
