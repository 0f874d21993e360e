"""Importing this makes Ctrl-C end the process with one line and status 130, also while modules are being imported.

Entries import it before anything else. VAE3D_TRACEBACK=1 shows where the process was.
"""

from __future__ import annotations

import os
import signal
import sys
from types import TracebackType

_print = sys.excepthook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt) or os.environ.get("VAE3D_TRACEBACK") == "1":
        _print(kind, error, trace)
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("interrupted (SIGINT)", file=sys.stderr, flush=True)
    sys.exit(128 + signal.SIGINT)


sys.excepthook = _hook
