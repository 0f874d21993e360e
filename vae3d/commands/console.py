"""Log lines and error messages of commands, on the console and in a run's log file. Imports no torch."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import vae3d
from vae3d.errors import UserError, escape, escape_lines
from vae3d.io import open_nofollow
from vae3d.text import is_utf8

R = TypeVar("R")
PACKAGE = os.path.join(os.path.dirname(vae3d.__file__), "")
_format_warning = warnings.formatwarning
# Errors of the disk, or of a path that the user gave; other OSErrors are bugs and keep their traceback.
UNWRITABLE = {
    *(errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS, errno.ESTALE),
}


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def write_above_bar(line: str, stream: Any) -> None:
    """Print a line, to stdout if stream is None. A terminal that was closed, or a pipe that nothing reads, ends no run,
    which has a log file: what would be printed is dropped from then on."""
    from vae3d.progress import Bar  # --help and errors of keys do without

    stream = stream or sys.stdout
    try:
        Bar.write(line, file=stream)
    except OSError:
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # of a stream without a file
            os.dup2(nowhere.fileno(), stream.fileno())


class ConsoleHandler(logging.Handler):
    """Log lines of rank 0, and warnings of every rank, printed above the progress bar."""

    def __init__(self, stream: Any = None) -> None:
        super().__init__()
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        if rank() == 0 or record.levelno >= logging.WARNING:
            write_above_bar(escape_lines(self.format(record)), self.stream)


class RunLogFile(logging.FileHandler):
    """A log file in a run's folder. A full disk does not stop the run: one line on the console names the file.

    Raises FileError if the file is a symbolic link.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.failed = False

    def _open(self) -> IO[str]:
        return open_nofollow(Path(self.baseFilename), self.mode)

    def format(self, record: logging.LogRecord) -> str:
        return escape_lines(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            write_above_bar(f"{self.baseFilename} is incomplete: {error.strerror}", sys.stderr)


def no_log_file() -> None:
    """From now on log to the console only."""
    for handler in [*logging.getLogger().handlers]:
        if isinstance(handler, RunLogFile):
            logging.getLogger().removeHandler(handler)


def show(text: str, file: Any = None) -> None:
    """Print text with names of files, or other words of files, in it."""
    print(escape_lines(text), file=file, flush=True)


def in_sweep() -> bool:
    if "hydra" not in sys.modules:
        return False
    from hydra.core.hydra_config import HydraConfig  # slow to import, and commands with flags do without
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of vae3d as a line of its own, with names of files escaped; others as Python shows them, with the code
    that they come from."""
    if filename.startswith(PACKAGE):
        return f"warning: {escape(str(message))}\n"
    return _format_warning(message, category, filename, lineno, line)


def exit_on_user_error(run: Callable[[], R]) -> R:
    """Call run(), and show our warnings as lines. For a UserError, a path that cannot be written or is not UTF-8, or
    text that the terminal cannot show, print one message and exit with status 2.

    In a sweep the job ends with an error that Hydra prints without a traceback, and the next job runs.
    VAE3D_TRACEBACK=1 shows the traceback.
    """
    warnings.formatwarning = format_warning
    try:
        return run()
    except (UserError, OSError, UnicodeEncodeError) as error:
        if os.environ.get("VAE3D_TRACEBACK") == "1":
            raise
        if isinstance(error, OSError):
            if error.errno not in UNWRITABLE:
                raise
            path = error.filename or "a file cannot be written (VAE3D_TRACEBACK=1 shows which)"
            print(f"error: {path}: {os.strerror(error.errno)}", file=sys.stderr, flush=True)
        elif isinstance(error, UnicodeEncodeError):
            text = ascii(error.object[max(0, error.start - 40) : error.end + 40])
            if is_utf8(error.object):  # of the terminal, whose locale is not UTF-8
                message = f"the output is {error.encoding}, which cannot hold {text}; set PYTHONIOENCODING=utf-8"
            else:  # of Arrow, CSV or a page
                message = f"the name of a file or folder is not UTF-8, rename it: {text}"
            print(f"error: {message}", file=sys.stderr, flush=True)
        else:
            print_error(error)
        if in_sweep():
            from hydra.errors import CompactHydraException

            raise CompactHydraException("its error is in the table of all jobs") from error
    sys.exit(2)


def print_error(error: UserError) -> None:
    """Print an error; if all ranks raise it, once per machine.

    torchrun ends all ranks when the first one exits, so the other ranks wait until rank 0 has printed.
    """
    if error.on_every_rank and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)
    print(f"error: {error}", file=sys.stderr, flush=True)
