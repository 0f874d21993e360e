"""Ending a run between two steps when the machine is about to be taken away."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Stop:
    asked: bool = False


@contextmanager
def on_sigterm() -> Iterator[Stop]:
    """Inside this context SIGTERM (Slurm, Kubernetes, torchrun) sets `asked` instead of killing the process."""
    stop = Stop()

    def handle(*_: object) -> None:
        stop.asked = True

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
