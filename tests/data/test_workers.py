"""Data workers that die, hang, or have no shared memory."""

from __future__ import annotations

import os
import signal
import time

import pytest
from torch.utils.data import Dataset, _utils

from tests import tiny
from vae3d.commands.training_data import build_training_data
from vae3d.data import workers
from vae3d.data.workers import WorkerError, check_shared_memory, load
from vae3d.errors import UserError


class Acting(Dataset):
    """Items do what they are called."""

    def __getitem__(self, item):
        if item not in ("a", "b", "c"):
            time.sleep(0.2)  # what was read before is on its way
        if item == "hang":
            time.sleep(60)
        elif item == "error":
            raise RuntimeError("a programming error")
        elif item == "exit":
            os._exit(3)
        elif isinstance(item, signal.Signals):
            os.kill(os.getpid(), item)
            time.sleep(60)
        return item


def run(*items, **options):
    return load(Acting(), workers=1, sampler=items, batch_size=None, collate_fn=str, **options)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(workers, "POLL", 0.1)
    monkeypatch.setattr(workers, "GRACE", 0.3)
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # how long PyTorch waits for a worker to end by itself


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (signal.SIGKILL, "memory"),
        (signal.SIGBUS, "--shm-size"),
        (signal.SIGSEGV, "vae3d check-data"),
        ("exit", "status 3"),
    ],
)
def test_a_worker_that_dies_is_one_error_with_the_reason(item, message):
    batches = run("a", item)
    assert next(batches) == "a"
    with pytest.raises(WorkerError, match=message) as error:
        next(batches)
    assert isinstance(error.value, UserError)
    assert getattr(item, "name", "") in str(error.value)


def test_a_worker_that_breaks_its_connection_before_its_end_shows_has_died():
    class Dying:
        pid, codes = 7, iter([None, None, -9])
        exitcode = property(lambda self: next(self.codes, -9))

    def batches():
        raise ConnectionResetError("Connection reset by peer")
        yield

    with pytest.raises(WorkerError, match="data worker 7 was ended by SIGKILL"):
        next(workers._watched(batches(), [Dying()], 1, lambda: False))


def test_a_worker_that_dies_interrupts_no_step():
    """PyTorch's own handler raises wherever the main thread is."""
    batches = run("a", signal.SIGKILL)
    assert next(batches) == "a"
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        sum(range(100))
    with pytest.raises(WorkerError):
        next(batches)


def test_a_worker_that_hangs_ends_the_run_after_the_timeout():
    batches = run("a", "hang", timeout=0.4)
    assert next(batches) == "a"
    with pytest.raises(WorkerError, match=r"data\.timeout") as error:
        next(batches)
    assert "/dev/shm" in str(error.value)


def test_a_run_that_is_to_end_does_not_wait_for_a_hanging_worker():
    with pytest.raises(WorkerError, match="asked to end"):
        next(run("hang", stopping=lambda: True))


def test_slow_batches_come_in_order_and_errors_of_the_program_as_they_are():
    batches = run(*"abc", "error", timeout=30)
    assert [next(batches) for _ in "abc"] == ["a", "b", "c"]
    with pytest.raises(RuntimeError, match="a programming error"):
        next(batches)


def test_too_little_shared_memory_is_refused_with_the_flag_that_helps():
    clip = 3 * 17 * 256 * 256
    check_shared_memory(clip, 1, 4, 2, 1, free=10 * clip)
    check_shared_memory(clip, 1, 4, 2, 1, free=None)
    with pytest.raises(UserError, match=r"data\.workers=4 with data\.prefetch=2 (.|\n)*--shm-size=1g"):
        check_shared_memory(clip, 1, 4, 2, 1, free=10 * clip - 1)
    with pytest.raises(UserError, match="8 ranks"):
        check_shared_memory(clip, 8, 4, 2, 1, free=10 * clip)


def test_training_looks_at_the_shared_memory_before_workers_start(videos, monkeypatch):
    config = tiny.training(
        "temporal_vae", videos, "loss=recon_kl", "data.workers=2", "data.frames.min=5", "data.frames.max=5"
    )
    data = build_training_data(config, 0, 1)
    clip = 3 * 5 * 16 * 16
    monkeypatch.setattr(workers, "shared_memory_free", lambda: 6 * 2 * clip - 1)
    with pytest.raises(UserError, match=r"6 batches of 0\.0 MiB"):
        data.clips(0, 1)
    monkeypatch.setattr(workers, "shared_memory_free", lambda: 6 * 2 * clip)
    assert len(list(data.clips(0, 1))) == 1
