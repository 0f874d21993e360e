"""Importing this module makes Ctrl-C print one line and exit with status 130, also during other imports.

Scripts import it first. VAE3D_TRACEBACK=1 shows the traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from types import TracebackType

_default_hook = sys.excepthook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt) or os.environ.get("VAE3D_TRACEBACK") == "1":
        _default_hook(kind, error, trace)
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("interrupted (SIGINT)", file=sys.stderr, flush=True)
    sys.exit(128 + signal.SIGINT)


sys.excepthook = _hook
