"""Ending a run between two steps when the machine is about to be taken away, or when Ctrl-C is pressed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # Slurm, Kubernetes, torchrun; Ctrl-C; a terminal that closes


@dataclass
class StopRequest:
    """signum: of the first signal that came; 0 before."""

    signum: int = 0


@contextmanager
def stop_signals(speak: bool = True) -> Iterator[StopRequest]:
    """Inside this context SIGTERM, SIGINT and SIGHUP set `signum` instead of killing the process.

    After SIGINT the next signal kills at once. SIGTERM may come any number of times, since Slurm and torchrun both send
    it to a rank. A signal that the process was started to ignore, as under nohup, stays ignored.
    """
    request, owner = StopRequest(), os.getpid()

    def handle(signum: int, _: object) -> None:
        if os.getpid() != owner:  # a data worker that has just been forked
            return
        if not request.signum and speak:
            again = "; a second Ctrl-C ends it at once, without saving" if signum == signal.SIGINT else ""
            message = f"\n{signal.Signals(signum).name}: the run stops after this step{again}\n"
            os.write(2, message.encode())  # print may not be entered twice
        request.signum = request.signum or signum
        if signum == signal.SIGINT:
            for name in STOPS:
                signal.signal(name, signal.SIG_DFL)

    before = {name: signal.getsignal(name) for name in STOPS}
    for name, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(name, handle)
    try:
        yield request
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
