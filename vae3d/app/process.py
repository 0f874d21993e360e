"""The process that opens files and runs the models, seen from the server, which does neither.

Files of strangers are decoded there: a decoder that crashes or never ends costs the job, not the server. If the
system kills it because memory ran out, the next job starts another.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from vae3d.app.settings import LESS_MEMORY, READING, Limits
from vae3d.errors import UserError

POLL = 0.1  # seconds
UNEXPECTED = "an error in vae3d ended the job; the terminal in which `vae3d app` runs shows it"
Progress = Callable[[float, str], None]  # fraction in [0, 1], what is done


def _run(connection: Connection, *arguments: Any) -> None:
    """What the process does. Here, because the server names it without importing torch."""
    from vae3d.app import worker

    worker.serve(connection, *arguments)


def start_forkserver(context: Any) -> None:
    """Let the process that others are forked from import torch, if it does not run yet."""
    if threading.current_thread() is not threading.main_thread():  # it runs, since the models were described
        return
    context.set_forkserver_preload(["vae3d.app.worker"])
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which it inherits: Ctrl-C is for the server alone
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)


class Stopped(Exception):
    """The job was cancelled."""


class Worker:
    """Starts the process when it is first needed, and again after it ended.

    checkpoints: as on the command line; () is TAEF2. tiles: arguments of set_tiles, for all of them. folder: the
    server's temporary folder, which the process deletes if the server is killed. method: of starting it; forkserver
    forks one that has imported torch, so that starting again after a job was cancelled takes no time.
    """

    def __init__(
        self,
        checkpoints: tuple[str, ...],
        device: str | None,
        tiles: tuple[int | None, int | None],
        folder: Path,
        limits: Limits,
        method: Literal["forkserver", "fork", "spawn"] = "forkserver",
    ) -> None:
        self.limits = limits
        self._arguments = checkpoints, device, tiles, str(folder), asdict(limits)
        self._context = multiprocessing.get_context(method)
        self._process: Any = None
        self._connection: Any = None

    def ask(self, request: dict[str, Any], progress: Progress, stop: Callable[[], bool] = lambda: False) -> Any:
        """The answer to a request of worker.Runner. stop: whether the job was cancelled.

        Raises UserError with what went wrong, Stopped.
        """
        try:
            self._start()
        except (OSError, EOFError) as error:
            raise UserError(f"the process that runs the models cannot be started: {error}; try again") from error
        try:
            self._connection.send_bytes(json.dumps(request).encode())
        except ConnectionError:
            raise UserError(self._why_ended()) from None
        stage, last = "", time.monotonic()
        while True:
            if stop():
                self.close()
                raise Stopped
            if not self._connection.poll(POLL):
                if stage == READING and time.monotonic() - last > self.limits.wait:
                    self.close()
                    raise UserError(
                        f"the file could not be read: no frame within {self.limits.wait:g} s (`--read_timeout`)"
                    )
                continue
            try:
                message = json.loads(self._connection.recv_bytes())
            except (EOFError, ConnectionError):
                raise UserError(self._why_ended()) from None
            last = time.monotonic()
            if "error" in message:
                raise UserError(message["error"])
            if "answer" in message:
                return message["answer"]
            stage = message["stage"]
            progress(message["fraction"], message["text"])

    def close(self) -> None:
        """End the process, if it runs."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = self._connection = None

    def _start(self) -> None:
        if self._process is not None and not self._process.is_alive():
            self.close()
        if self._process is None:
            if self._context.get_start_method() == "forkserver":
                start_forkserver(self._context)
            connection, theirs = self._context.Pipe()
            process = self._context.Process(target=_run, args=(theirs, *self._arguments), daemon=True)
            process.start()
            theirs.close()
            self._connection, self._process = connection, process

    def _why_ended(self) -> str:
        self._process.join()
        code = self._process.exitcode
        self.close()
        if code == -signal.SIGKILL:
            return f"the process that runs the models was killed, which happens when memory runs out; {LESS_MEMORY}"
        if code < 0:
            return f"the file crashed its decoder, or the model failed ({signal.Signals(-code).name})"
        return UNEXPECTED
