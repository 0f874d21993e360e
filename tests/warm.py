"""A process that has imported torch once and forks a child for each script that a test runs.

Starting Python with torch, hydra, av and pandas takes four seconds, a fork a fraction of one. The child runs the script as
`python script.py arguments` or `python -m module arguments` does: same sys.path, `__main__`, output, exit status. Several
ranks start as torchrun starts them: the environment names the rank, and when one fails the others are stopped. Tests of
starting itself (imports) start a Python of their own. torchrun is started as it is, and its ranks are processes that wait
for such children: see `python_of_torchrun`.

The test processes of pytest-xdist share the warm process, since it takes eight seconds to start: it listens at a socket,
and forks a server for each of them, which forks the children.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PRELOADED = (
    "torch._dynamo", "torchvision", "torch.utils.tensorboard", "pyarrow.dataset", "diffusers", "vae3d.commands.launch",
    *(f"vae3d.commands.{name}" for name in ("train", "infer", "eval", "encode", "train_diffusion", "sample")),
)  # fmt: skip
WORD = 8  # bytes of a number on the wire
ADDRESS = "VAE3D_WARM"  # environment variable: where the warm process listens, for the ranks of torchrun


class Job:
    """Running children of the warm process, one per environment. Wait for a job before starting the next one."""

    def __init__(self, command: list[str], cwd: Path, envs: Sequence[dict[str, str]], outputs: Sequence[int]) -> None:
        self._connection = _server()
        message = json.dumps({"argv": command[1:], "cwd": str(cwd), "envs": list(envs)}).encode()
        socket.send_fds(self._connection, [len(message).to_bytes(WORD, "big")], list(outputs))
        self._connection.sendall(message)
        self.pids = [_receive_number(self._connection) for _ in envs]
        self.codes: list[int] | None = None

    def poll(self) -> list[int] | None:
        """Exit codes, or None while a child runs."""
        return self.wait() if self.codes or select.select([self._connection], [], [], 0)[0] else None

    def wait(self, timeout: float | None = None) -> list[int]:
        """Exit codes; negative after a signal, as in subprocess. Kills all and raises TimeoutExpired after `timeout` s."""
        if self.codes is not None:
            return self.codes
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.signal(signal.SIGKILL)

        timer = threading.Timer(timeout or threading.TIMEOUT_MAX, expire)
        timer.daemon = True
        timer.start()
        self.codes = [os.waitstatus_to_exitcode(_receive_number(self._connection)) for _ in self.pids]
        timer.cancel()
        if expired.is_set():
            raise subprocess.TimeoutExpired("a warm job", timeout)
        return self.codes

    def signal(self, signum: int) -> None:
        """Send a signal to the children and to those they have started."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signum)


def run(command: list[str], cwd: Path, envs: Sequence[dict[str, str]], timeout: float) -> tuple[list[int], list[str]]:
    """Run a command once per environment. Returns exit codes and what each printed, errors included."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in envs]
        codes = Job(command, cwd, envs, [file.fileno() for file in files]).wait(timeout)
        for file in files:
            file.seek(0)
        return codes, [file.read().decode() for file in files]


def python_of_torchrun(folder: Path) -> dict[str, str]:
    """Environment variables with which torchrun starts its ranks in the warm process. Writes a script to `folder`."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S {shlex.quote(__file__)} run "$@"\n')
    script.chmod(0o755)
    _server()
    return {"PYTHON_EXEC": str(script), ADDRESS: _address()}


def _wait_as_python(arguments: list[str]) -> None:
    """Be `python arguments`, which runs in the warm process: pass signals on to it, and end as it ends."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until there is a child to pass them on to
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHON_EXEC", ADDRESS)}
    job = Job(["python", *arguments], Path.cwd(), [environment], [1])
    for signum in signals:
        signal.signal(signum, lambda received, _: job.signal(received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    [code] = job.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


@cache
def _address() -> str:
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")  # the same in all processes of a run
    return os.environ.get(ADDRESS) or f"{tempfile.gettempdir()}/vae3d-warm-{run or uuid.uuid4().hex}"


@cache
def _server() -> socket.socket:
    """A connection to a server of this process's own, which ends when the connection does."""
    ours = socket.socket(socket.AF_UNIX)
    while True:
        try:
            ours.connect(_address())
            break
        except FileNotFoundError:
            _start(_address())
        except ConnectionRefusedError:  # the process that it was of has been killed
            Path(_address()).unlink(missing_ok=True)
    atexit.register(ours.close)
    return ours


def _start(address: str) -> None:
    """Start the warm process, unless another test process does so just now."""
    from tests import tiny

    listener = socket.socket(socket.AF_UNIX)
    own = f"{address}-{os.getpid()}"
    listener.bind(own)
    listener.listen()  # from now on connections wait until the warm process accepts them
    try:
        os.link(own, address)
    except FileExistsError:
        return
    finally:
        os.unlink(own)
    here, there = socket.socketpair()
    command = [sys.executable, "-m", "tests.warm", str(listener.fileno()), str(there.fileno())]
    fds = [listener.fileno(), there.fileno()]
    process = subprocess.Popen(command, cwd=ROOT, env=tiny.environ(), pass_fds=fds)
    listener.close()
    there.close()
    atexit.register(process.wait)
    atexit.register(here.close)  # runs before process.wait
    atexit.register(Path(address).unlink, missing_ok=True)  # and this before both


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


def _accept(listener: socket.socket, life: socket.socket) -> socket.socket:
    """Fork a server for each connection, until the test process that started this one ends. Returns in the servers."""
    while True:
        ready, _, _ = select.select([listener, life], [], [])
        if listener not in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            life.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return connection
        connection.close()


def _serve(connection: socket.socket) -> tuple[dict[str, Any], dict[str, str]]:
    """Fork the children of each job; return the job and the child's environment in the child alone."""
    while True:
        word, files, _, _ = socket.recv_fds(connection, WORD, 16)
        if not word:
            os._exit(0)
        job = json.loads(_receive(connection, int.from_bytes(word, "big")))
        children: list[int] = []
        for env, file in zip(job["envs"], files, strict=True):
            child = os.fork()
            if child == 0:
                connection.close()
                os.setsid()
                for descriptor in (1, 2):
                    os.dup2(file, descriptor)
                for other in files:
                    os.close(other)
                return job, env
            children.append(child)
        for file in files:
            os.close(file)
        for child in children:
            connection.sendall(child.to_bytes(WORD, "big"))
        statuses: dict[int, int] = {}
        while len(statuses) < len(children):
            child, status = os.wait()
            statuses[child] = status
            if status:
                for other in set(children) - statuses.keys():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(other, signal.SIGTERM)
        for child in children:
            connection.sendall(statuses[child].to_bytes(WORD, "big"))


def main() -> None:
    """Import and build once what nearly every script needs, then serve."""
    for name in PRELOADED:
        import_module(name)
    for name in ("UNet2DModel", "DDIMScheduler", "DDPMScheduler", "FlowMatchEulerDiscreteScheduler"):
        getattr(sys.modules["diffusers"], name)  # imports it

    from tests import tiny
    from vae3d.commands.cli import check_training

    # The first check in a process also finds Hydra's plugins and builds tables of its parser and of the meta device.
    images = ["data.frames.min=1", "data.frames.max=1", "loss=recon_kl", "stage=finetune", "stage.init_from=random"]
    check_training(tiny.compose("model=spatial", *tiny.MODEL["spatial"], *tiny.TRAINING, *images, "data.source.path=."))

    gc.freeze()  # or a child's collections, of which one is its end, copy every page, which takes a second
    os.fsync = os.fstat  # as in tests/fixtures.py
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the servers
    job, env = _serve(_accept(*(socket.socket(fileno=int(number)) for number in sys.argv[1:])))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(job["cwd"])
    try:
        _run(job["argv"], job["cwd"])
        status = 0
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        status = end.code or 0
    # Python's own end, which would go on to free every object: that copies every page, which takes 0.4 seconds.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


def _run(argv: list[str], cwd: str) -> None:
    """As `python argv` does."""
    sys.orig_argv = [sys.executable, *argv]
    if argv[0] == "-m":
        sys.argv, sys.path[0] = argv[1:], cwd
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = argv, os.path.dirname(argv[0])
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "run":
        _wait_as_python([argument for argument in sys.argv[2:] if argument != "-u"])
    main()
