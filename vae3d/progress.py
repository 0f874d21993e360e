"""Progress of long commands: a bar in a terminal, and a line a minute where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

MINUTE = 60.0


class ProgressLines(tqdm):
    """A tqdm that prints whole lines, for log files: none in the first `seconds`, then one every `seconds`."""

    def __init__(self, *args: Any, seconds: float = MINUTE, **settings: Any) -> None:
        super().__init__(*args, delay=seconds, mininterval=seconds, maxinterval=seconds, leave=False, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg != "":  # with which tqdm clears its bar at the end
            print(self if msg is None else msg, file=self.fp, flush=True)


def progress(items: Iterable[Any] | None = None, *, hidden: bool = False, **settings: Any) -> tqdm:
    """tqdm, for terminals and log files. hidden: print nothing, as on all ranks but the first."""
    kind = tqdm if sys.stderr.isatty() else ProgressLines
    return kind(items, disable=hidden, **settings)
