"""Progress of long commands: a bar in a terminal, and a line a minute where there is none."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

MINUTE = 60.0


class Bar(tqdm):
    """tqdm with a lock of this process alone. The lock of tqdm is shared with forked processes: if a worker is killed
    while it writes a line of the log, its rank waits for ever."""

    _lock = threading.RLock()


def _after_fork() -> None:
    Bar._lock = threading.RLock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class ProgressLines(Bar):
    """A tqdm that prints whole lines, for log files: none in the first `seconds`, then one every `seconds`."""

    def __init__(self, *args: Any, seconds: float = MINUTE, **settings: Any) -> None:
        super().__init__(*args, delay=seconds, mininterval=seconds, maxinterval=seconds, leave=False, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg != "":  # with which tqdm clears its bar at the end
            print(self if msg is None else msg, file=self.fp, flush=True)


def progress(items: Iterable[Any] | None = None, *, hidden: bool = False, **settings: Any) -> Bar:
    """tqdm, for terminals and log files. hidden: print nothing, as on all ranks but the first."""
    kind = Bar if sys.stderr.isatty() else ProgressLines
    return kind(items, disable=hidden, **settings)
