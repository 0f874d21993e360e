"""Loading with worker processes. A worker that dies or hangs, or full shared memory, raises an error in time."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from vae3d.data.media import DataError
from vae3d.errors import UserError
from vae3d.text import plural

SHARED_MEMORY = Path("/dev/shm")
POLL = 5.0  # seconds between two checks that the workers are alive
GRACE = 30.0  # seconds that a batch may take after the run was asked to end
GIB = 2**30


class WorkerError(DataError):
    """A worker process died, or none returns a batch in time. Finished steps are valid and can be saved."""

    on_every_rank = False


def usable_workers(wanted: int, setting: str = "data.workers") -> tuple[int, list[str]]:
    """At most as many workers as this rank has processors, and a line that says so if they are fewer than wanted.

    setting: its name in that line.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    processors = processor_count()
    most = max(1, processors // ranks)
    if wanted <= most:
        return wanted, []
    share = f", which {ranks} ranks share" if ranks > 1 else ""
    has, used = plural(processors, "processor"), plural(most, "worker")
    return most, [f"{setting}={wanted}: this machine has {has}{share}; {used} {'is' if most == 1 else 'are'} used"]


def processor_count() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def pool_errors(what: str) -> Iterator[None]:
    """Raise WorkerError where a process of a ProcessPoolExecutor was killed. what: it did, such as "indexes shards"."""
    try:
        yield
    except BrokenProcessPool as error:
        raise WorkerError(
            f"a process that {what} was ended by the system, usually out of memory; give the job more memory"
        ) from error


def load(
    dataset: Dataset[Any],
    *,
    workers: int,
    prefetch: int = 2,
    timeout: float = 0.0,
    stopping: Callable[[], bool] = lambda: False,
    item_bytes: int = 0,
    held: int = 1,
    spawn: bool = False,
    **options: Any,
) -> Iterator[Any]:
    """The batches of DataLoader(dataset, **options).

    timeout: seconds without a batch until WorkerError; 0: never. stopping: whether the run was asked to end; from
    then on a batch may take GRACE seconds. item_bytes: of one batch; 0: unknown. held: batches that the caller holds
    at a time. spawn: start workers as new interpreters instead of forks, for a dataset that uses CUDA.
    Raises DataError if /dev/shm is too small for the workers' batches; WorkerError within POLL seconds of a death; and
    the errors of a worker.
    """
    if not workers:
        return iter(DataLoader(dataset, **options))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        check_shared_memory(item_bytes, ranks, workers, prefetch, held, shared_memory_free())
    loader = DataLoader(
        dataset,
        num_workers=workers,
        prefetch_factor=prefetch,
        worker_init_fn=ignore_sigterm_in_worker,
        timeout=POLL,
        multiprocessing_context="spawn" if spawn else None,
        **options,
    )
    others = set(multiprocessing.active_children())
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    processes = [process for process in multiprocessing.active_children() if process not in others]
    _restore_sigchld(handler)
    return _watched(batches, processes, timeout, stopping)


def _restore_sigchld(handler: Any) -> None:
    """Remove PyTorch's handler, which raises RuntimeError in the main thread when a worker dies: in the middle of an
    optimizer step, nothing could be saved after it."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        return
    is_pytorchs = getattr(handler, "__module__", None) == "torch.utils.data._utils.signal_handling"
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if is_pytorchs or handler is None else handler)


def _watched(
    batches: Iterator[Any], workers: list[BaseProcess], timeout: float, stopping: Callable[[], bool]
) -> Iterator[Any]:
    start, stop_requested = time.monotonic(), None
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except UserError as error:
            raise _without_traceback(error) from None
        except (RuntimeError, OSError, EOFError) as error:
            timed_out = str(error).startswith("DataLoader timed out")
            if dead := _ended(workers, 0 if timed_out else 1):
                raise WorkerError(_death(dead)) from error
            if not timed_out:
                raise
            now = time.monotonic()
            stop_requested = (stop_requested or now) if stopping() else None
            if timeout and now - start >= timeout:
                raise WorkerError(_hang(len(workers), now - start, "")) from error
            if stop_requested is not None and now - stop_requested >= GRACE:
                raise WorkerError(_hang(len(workers), now - start, "the run was asked to end, and ")) from error
        else:
            yield batch
            start, stop_requested = time.monotonic(), None


def _without_traceback(error: UserError) -> UserError:
    """The error that a worker raised; PyTorch puts its traceback in front of the message."""
    kind = type(error)
    return kind(str(error.args[0]).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip())


def _ended(workers: list[BaseProcess], seconds: float) -> list[BaseProcess]:
    """The workers that have ended. Waits for one, at most `seconds`: its connections break a little earlier."""
    deadline = time.monotonic() + seconds
    while not (dead := [worker for worker in workers if worker.exitcode is not None]):
        if time.monotonic() >= deadline:
            break
        time.sleep(0.01)
    return dead


def _death(dead: list[BaseProcess]) -> str:
    """The message for dead workers: of one killed by a signal, if there is one."""
    worker = min(dead, key=lambda process: process.exitcode or 0)
    code = worker.exitcode or 0
    if code >= 0:
        return (
            f"data worker {worker.pid} exited with status {code}; see its output above. data.workers=0 uses no workers"
        )
    name = signal.Signals(-code).name
    hints = {
        "SIGKILL": "usually out of memory; lower data.workers or data.prefetch, or give the job more memory",
        "SIGBUS": f"which a full {SHARED_MEMORY} causes ({_free()}); docker run --shm-size=8g or --ipc=host, lower "
        "data.workers or data.prefetch, or data.workers=0",
        "SIGSEGV": "a decoder crashed on a file; vae3d check-data TABLE finds it",
    }
    return f"data worker {worker.pid} was ended by {name}: {hints.get(name, 'see the system log')}"


def _hang(workers: int, seconds: float, why: str) -> str:
    return (
        f"{why}{workers} data workers have given no batch for {seconds:.0f} s: a disk does not respond, or "
        f"{SHARED_MEMORY} is full ({_free()}); in Docker use --shm-size=8g or --ipc=host. data.workers=0 reads without "
        "workers, and data.timeout sets how long to wait (0: no limit)"
    )


def shared_memory_free() -> int | None:
    """Bytes; None where there is no such file system."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None


def _free() -> str:
    free = shared_memory_free()
    return f"{SHARED_MEMORY} is not there" if free is None else f"{free / GIB:.2f} GiB free"


def check_shared_memory(item_bytes: int, ranks: int, workers: int, prefetch: int, held: int, free: int | None) -> None:
    """Raise DataError if the batches in flight need more than `free` bytes of shared memory.

    Without this check, a worker hangs or is killed by SIGBUS long after the start.
    """
    batches = workers * prefetch + held + 1
    needed = ranks * batches * item_bytes
    if free is None or needed <= free:
        return
    where = f" on each of {ranks} ranks" if ranks > 1 else ""
    raise DataError(
        f"{SHARED_MEMORY} has {free / GIB:.2f} GiB free, and data.workers={workers} with data.prefetch={prefetch} keep "
        f"{batches} batches of {item_bytes / 2**20:.1f} MiB there{where}: {needed / GIB:.2f} GiB. In Docker use "
        f"--shm-size={-(-needed * 5 // (4 * GIB))}g or --ipc=host; else lower data.workers or data.prefetch, or set "
        "data.workers=0"
    )


def ignore_sigterm_in_worker(worker: int) -> None:
    """Ignore signals that do not come from the worker's own rank.

    torchrun and Slurm send SIGTERM to all processes, a terminal SIGINT and SIGHUP, but the rank still needs its
    workers' clips to finish the current step.
    """
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
