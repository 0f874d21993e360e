"""Processes of their own that run a function."""

from __future__ import annotations

import os
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


def exit_statuses(children: Iterable[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
