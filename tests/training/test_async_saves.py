"""Asynchronous checkpoints: what is in them, when they are complete, and what happens if they cannot be written."""

from __future__ import annotations

import errno
import logging
import threading

import pytest
import torch

from tests.adversarial import toy
from tests.training import quick
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d.checkpoints import state
from vae3d.training.failures import SaveError, TooManyFailures
from vae3d.transfer import HostBuffers, tensors_of

ASYNC = {"trainer.async_mode": "async", "trainer.save_every": 2, "trainer.max_steps": 6, "trainer.keep": 0}


def saved(folder, step):
    loaded = state.load_state(folder / f"checkpoints/step-{step:07d}")
    loaded.pop("config")
    return loaded


def test_checkpoints_and_exports_are_those_of_ordinary_saves_and_resume_bit_for_bit(videos, tmp_path):
    for name, mode in (("plain", "disabled"), ("async", "async")):
        t = quick.trainer(videos, tmp_path / name, **{**ASYNC, "trainer.async_mode": mode, "trainer.ema.decay": 0.5})
        assert t.fit()
    for step in (2, 4, 6):
        assert toy.same(saved(tmp_path / "plain", step), saved(tmp_path / "async", step))
        exports = [tmp_path / name / f"exports/step-{step:07d}/model.safetensors" for name in ("plain", "async")]
        assert exports[0].read_bytes() == exports[1].read_bytes()
    state.discard(tmp_path / "async/checkpoints", 6)
    resumed = quick.trainer(videos, tmp_path / "async", **ASYNC, **{"trainer.ema.decay": 0.5})
    assert resumed.step == 4
    assert resumed.fit()
    assert toy.same(saved(tmp_path / "plain", 6), saved(tmp_path / "async", 6))


def test_every_save_copies_into_memory_that_was_allocated_after_the_first_step(videos, tmp_path, monkeypatch):
    copies, reserved, copy, reserve = [], [], HostBuffers.copy, HostBuffers.reserve

    def copied(self, value):
        result = copy(self, value)
        copies.append([tensor.data_ptr() for tensor in tensors_of(result)])
        return result

    def reserving(self, value):
        reserve(self, value)
        reserved.extend(tensor.data_ptr() for tensor in self._buffers)

    monkeypatch.setattr(HostBuffers, "copy", copied)
    monkeypatch.setattr(HostBuffers, "reserve", reserving)
    t = quick.trainer(videos, tmp_path, **{**ASYNC, "trainer.ema.decay": 0.5, "trainer.max_steps": 8})
    assert t.fit()
    shared = [places for places in copies if places]
    assert len(shared) == 3  # the last save is written while training stands still
    assert shared[0] == shared[1] == shared[2] == reserved


@pytest.fixture
def slow(monkeypatch):
    """Lets state.write wait until it is set."""
    may_write, write = threading.Event(), state.write

    def waiting(*args):
        assert may_write.wait(60)
        write(*args)

    monkeypatch.setattr(state, "write", waiting)
    yield may_write
    may_write.set()


def test_training_goes_on_while_a_checkpoint_is_written_and_the_end_waits_for_it(videos, tmp_path, slow):
    t, seen = quick.trainer(videos, tmp_path, **ASYNC), []
    step = t.train_step

    def watched(*args):
        result = step(*args)
        seen.append((t.step, t.checkpointer.writing, state.latest_state(tmp_path / "checkpoints")))
        if t.step == 4:
            slow.set()
        return result

    t.train_step = watched
    before = {name: value.clone() for name, value in t.network.state_dict().items()}
    assert t.fit()
    assert seen[2:4] == [(3, True, None), (4, True, None)]  # of the checkpoint of step 2
    complete = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert complete == [f"step-000000{n}" for n in (2, 4, 6)]
    second, last = (saved(tmp_path, n)["model"] for n in (2, 6))
    assert not any(
        torch.equal(second["module.encoder.conv_in.weight"], w["module.encoder.conv_in.weight"]) for w in (before, last)
    )


def test_a_stop_waits_for_the_writer_and_saves_its_own_step(videos, tmp_path, slow):
    t = quick.trainer(videos, tmp_path, **ASYNC)
    threading.Timer(0.5, slow.set).start()
    step = t.train_step
    t.train_step = lambda batches, stop, *rest: step(batches, 15 if t.step == 2 else stop, *rest)
    assert not t.fit()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-0000002", "step-0000003"]


def test_a_full_disk_is_survived_counted_and_fatal_at_the_end(videos, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "write", full)
    t = quick.trainer(videos, tmp_path / "one", **ASYNC)
    with caplog.at_level(logging.WARNING), pytest.raises(SaveError, match=r"no checkpoint of step 6: rank 0: OSError"):
        t.fit()
    for n in (2, 4):
        assert (
            f"no checkpoint of step {n}: rank 0: OSError: [Errno 28] No space left on device; training goes on"
            in caplog.text
        )
    assert not list((tmp_path / "one/checkpoints").iterdir())
    t = quick.trainer(videos, tmp_path / "two", **ASYNC, **{"trainer.robust.save_failures": 2})
    with pytest.raises(TooManyFailures, match="2 checkpoints in a row could not be written"):
        t.fit()
    assert t.step in (5, 6)  # as soon as the error of step 4's is known


def test_an_error_elsewhere_leaves_the_begun_checkpoint_complete(videos, tmp_path, slow):
    t = quick.trainer(videos, tmp_path, **ASYNC)
    step = t.train_step

    def failing(*args):
        if t.step == 3:
            slow.set()
            raise ZeroDivisionError
        return step(*args)

    t.train_step = failing
    with pytest.raises(ZeroDivisionError):
        t.fit()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]
