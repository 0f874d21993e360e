"""Processes of their own that run a function."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any


def start(task: Callable[..., Any], *args: Any) -> int:
    """Run a function in a process of its own; returns its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            task(*args)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def exit_statuses(children: Iterable[int], seconds: float = 90.0) -> list[int]:
    """As subprocess gives them: -N after signal N. Ends those that take longer."""
    deadline, statuses = time.monotonic() + seconds, []
    for child in children:
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGABRT)  # with faulthandler, which pytest enables, it prints where it is
            time.sleep(0.01)
        statuses.append(os.waitstatus_to_exitcode(ended[1]))
    return statuses
