"""A process that has imported torch once, and forks a child for each script that a test runs.

A start of Python with torch, hydra, av and pandas takes four seconds, a fork a fraction of one. The child runs the
script as `python script.py arguments` does: same sys.path, `__main__`, output, exit status. Tests of starting itself
(torchrun, imports) start a Python of their own.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORD = 8  # bytes of a number on the wire


def run(command: list[str], cwd: Path, env: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run [python, script, *arguments]; stdout holds output and errors. Raises TimeoutExpired as subprocess.run does."""
    connection, expired = _server(), threading.Event()
    with tempfile.TemporaryFile() as output:
        job = json.dumps({"argv": command[1:], "cwd": str(cwd), "env": env}).encode()
        socket.send_fds(connection, [len(job).to_bytes(WORD, "big")], [output.fileno()])
        connection.sendall(job)
        group = _receive_number(connection)

        def kill() -> None:
            expired.set()
            os.killpg(group, signal.SIGKILL)

        timer = threading.Timer(timeout, kill)
        timer.start()
        status = _receive_number(connection)
        timer.cancel()
        if expired.is_set():
            raise subprocess.TimeoutExpired(command, timeout)
        output.seek(0)
        told = output.read().decode()
    return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status), told)


@cache
def _server() -> socket.socket:
    """The connection to this test process's own warm process, which ends when the connection does."""
    from tests import tiny

    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
    process = subprocess.Popen(command, cwd=ROOT, env=tiny.environ(), pass_fds=[theirs.fileno()])
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)  # runs before process.wait
    return ours


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise EOFError("the other side of the warm process has ended")
        received += part
    return received


def _receive_number(connection: socket.socket) -> int:
    return int.from_bytes(_receive(connection, WORD), "big")


def _serve(connection: socket.socket) -> dict[str, Any]:
    """Fork a child for each job, and return the job in the child alone."""
    while True:
        word, files, _, _ = socket.recv_fds(connection, WORD, 1)
        if not word:
            os._exit(0)
        job = json.loads(_receive(connection, int.from_bytes(word, "big")))
        child = os.fork()
        if child == 0:
            connection.close()
            os.setsid()
            for descriptor in (1, 2):
                os.dup2(files[0], descriptor)
            os.close(files[0])
            return job
        os.close(files[0])
        connection.sendall(child.to_bytes(WORD, "big"))
        _, status = os.waitpid(child, 0)
        connection.sendall(status.to_bytes(WORD, "big"))


def main() -> None:
    import torch._dynamo  # noqa: F401  (the first optimizer imports it)
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import vae3d.loading  # noqa: F401

    job = _serve(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.argv, sys.path[0] = job["argv"], os.path.dirname(job["argv"][0])
    runpy.run_path(job["argv"][0], run_name="__main__")


if __name__ == "__main__":
    main()
