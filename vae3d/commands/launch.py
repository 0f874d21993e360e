"""What commands that Hydra configures share: arguments, run folders, log output, ranks and exit statuses.

Imports no torch.
"""

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
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# torchrun without the traceback that it prints after a signal; by then all ranks have ended.
TORCHRUN = """\
import sys
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.run import main
try:
    main()
except SignalException as error:
    sys.exit(128 + error.sigval)
"""
# Errors of the disk, or of a path that the user gave; other OSErrors are bugs and keep their traceback.
UNWRITABLE = {
    *(errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS, errno.ESTALE),
}


def rank() -> int:
    return int(os.environ.get("RANK", 0))


class ConsoleHandler(logging.Handler):
    """Log lines of rank 0, and warnings of every rank, printed above the progress bar."""

    def __init__(self, stream: Any = None) -> None:
        super().__init__()
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        if rank() == 0 or record.levelno >= logging.WARNING:
            tqdm.write(self.format(record), file=self.stream)


class RunLogFile(logging.FileHandler):
    """A log file in a run's folder. A full disk does not stop the run: one line on the console names the file.

    Raises FileError if the file is a symbolic link.
    """

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
            tqdm.write(f"{self.baseFilename} is incomplete: {error.strerror}", file=sys.stderr)


def read_arguments(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments as overrides for Hydra. If it would refuse one, print why and exit with status 2."""
    overrides = allow_unknown_keys(arguments)
    if issues := override_issues(overrides):
        print_error(ConfigError(issues))
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
    """Write the configuration into the run's folder, as .hydra/rank<N>/*.yaml; returns the folder.

    Hydra's own writer is off (output_subdir: null), since it follows symbolic links. Raises FileError if the folder
    holds links, see check_run_folder, or cannot be written.
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
    """Exits with one message if run.root cannot be created, or if a sweep's multirun.yaml is a symbolic link.

    By SystemExit: Hydra turns other exceptions of callbacks into warnings.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        try:
            Path(str(config.run.root)).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"error: run.root={config.run.root}: cannot be created: {error.strerror}", file=sys.stderr)
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
    """Whether this process starts torchrun instead of training itself."""
    return launcher.name == "torchrun" and not under_torchrun()


def torchrun_child(launcher: Launcher, program: Sequence[str]) -> None:
    """Run this job again under torchrun, with the same overrides and run folder, and wait for it.

    program: what to start, such as ["train.py"] or ["-m", "vae3d.commands.cli", "train"]. Raises RuntimeError if it
    fails: then Hydra continues with the sweep's next job, which it does not after SystemExit.
    """
    overrides = [o for o in HydraConfig.get().overrides.task if not o.lstrip("+").startswith("launcher")]
    command = [
        *(sys.executable, "-c", TORCHRUN),
        *([] if any("rdzv" in a or "master" in a for a in launcher.args) else ["--standalone"]),
        *(f"--nproc-per-node={launcher.nproc}", *launcher.args),
        *(*program, *overrides, f"hydra.run.dir={quoted(str(run_directory()))}"),
    ]
    # In its own session: the terminal sends Ctrl-C to this process only, which forwards it once.
    child = subprocess.Popen(command, start_new_session=True)
    received: list[int] = []

    def forward(signum: int, _: object) -> None:
        received.append(signum)
        child.send_signal(signum)

    handlers = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    for signum, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(signum, forward)
    try:
        code = child.wait()
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    if received:
        sys.exit(128 + received[0])
    if code:
        raise RuntimeError(f"torchrun exited with {code}; see the log files in {run_directory()}")


class SupportsFit(Protocol):
    """A trainer. stopped_by: number of the signal that ended `fit`, or 0."""

    stopped_by: int

    def fit(self) -> bool: ...


def fit(trainer: SupportsFit) -> int:
    """Run trainer.fit(); returns the number of the signal that ended it, or 0.

    A UserError after a signal exits with status 2, which ends a sweep too; without a signal it is raised, and the
    sweep continues with its next job.
    """
    try:
        trainer.fit()
    except UserError as error:
        if not trainer.stopped_by:
            raise
        print_error(error)
        sys.exit(2)
    return trainer.stopped_by


def end_after(signum: int) -> None:
    """Exit with status 128 + signum if a signal ended the run; neither `&&` nor a sweep continues then."""
    if signum:
        sys.exit(128 + signum)


def last_metric(folder: Path, name: str, step: int) -> float | None:
    """A metric at a step, from the run's metrics.jsonl.

    NaN if the run has the metric at other steps only, as after a failed validation; None if it never has it.
    """
    file = folder / "metrics.jsonl"
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    values = {entry["step"]: entry[name] for entry in map(_entry, lines) if name in entry}
    return values.get(step, math.nan) if values else None


def _entry(line: str) -> dict[str, Any]:
    """A line of metrics.jsonl; {} for a line that a kill or a full disk cut off."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else {}


def exit_on_user_error(run: Callable[[], R]) -> R:
    """Call run(); for a UserError, or a path that cannot be written, print one message and exit with status 2.

    In a sweep the error is raised, and Hydra runs the next job. VAE3D_TRACEBACK=1 shows the traceback.
    """
    reraise = in_sweep() or os.environ.get("VAE3D_TRACEBACK") == "1"
    try:
        return run()
    except UserError as error:
        if reraise:
            raise
        print_error(error)
    except OSError as error:
        if reraise or error.errno not in UNWRITABLE:
            raise
        path = error.filename or "a file cannot be written (VAE3D_TRACEBACK=1 shows which)"
        print(f"error: {path}: {os.strerror(error.errno)}", file=sys.stderr, flush=True)
    sys.exit(2)


def print_error(error: UserError) -> None:
    """Print an error; if all ranks raise it, once per machine.

    torchrun ends all ranks when the first one exits, so the other ranks wait until rank 0 has printed.
    """
    if error.on_every_rank and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)
    print(f"error: {error}", file=sys.stderr, flush=True)


def with_elastic_record(run: Callable[[], R]) -> R:
    """Call run() such that torchrun's summary shows a rank's exception, which Hydra would catch."""
    if not under_torchrun():
        return run()
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(exit_on_user_error)(run)


def forbid_sweep_under_torchrun() -> None:
    """Raises UserError for a sweep under torchrun: its ranks would run different jobs once one of them fails."""
    if in_sweep() and under_torchrun():
        raise UserError(
            "a sweep (-m) cannot run under torchrun; let each job start its own ranks:\n"
            "  python train.py -m ... launcher=torchrun launcher.nproc=N"
        )
