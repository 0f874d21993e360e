"""Importing this module makes Ctrl-C print one line and exit with status 130, also during other imports. A command
whose output nothing reads any more, as of `| head`, exits without a traceback.

Scripts import it first. VAE3D_TRACEBACK=1 shows the traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from types import TracebackType

_default_hook = sys.excepthook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if os.environ.get("VAE3D_TRACEBACK") != "1":
        if issubclass(kind, KeyboardInterrupt):
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print("interrupted (SIGINT)", file=sys.stderr, flush=True)
            sys.exit(128 + signal.SIGINT)
        if issubclass(kind, BrokenPipeError) and _output_is_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again at its end
            sys.exit(128 + signal.SIGPIPE)
    _default_hook(kind, error, trace)


def _output_is_closed() -> bool:
    """Whether stdout is the broken pipe; it may also be one to another process."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


sys.excepthook = _hook
