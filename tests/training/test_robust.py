"""Fault-tolerance limits, and preflight."""

from __future__ import annotations

import errno
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.quick import fill_disk, trainer
from tests.training.test_trainer import fresh_accelerate, weights  # noqa: F401
from vae3d.checkpoints import state
from vae3d.data.batches.clips import Unreadable
from vae3d.losses.objective import ErrorMap, Term, WeightedTerm
from vae3d.training import memory
from vae3d.training.checkpointer import run_on_all_ranks
from vae3d.training.failures import SaveError, TooManyFailures
from vae3d.training.preflight import PreflightError
from vae3d.training.step_status import StepMetrics

LONG = {"trainer.max_steps": 9, "trainer.save_every": 0}


class Late(Term):
    """A term that fails only once its ramp has begun."""

    def __init__(self, error):
        self.error = error

    def __call__(self, clip, out):
        if self.error is not None:
            raise self.error
        return ErrorMap(out.video * math.inf, 1)


class Zero(Term):
    """A term without any gradient."""

    def __call__(self, clip, out):
        return ErrorMap(out.video * 0, 1)


def with_late_term(t, error):
    t.objective.terms["late"] = WeightedTerm(Late(error), 1.0, (50_000, 60_000))
    return t


@pytest.mark.parametrize(
    ("error", "raised", "expected"),
    [
        (ValueError("no such layer"), ValueError, "no such layer"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB"),
            PreflightError,
            r"2x3x1x16x16 does not fit.*Tried 9 GiB",
        ),
        (None, PreflightError, r"not finite.*loss/late (inf|nan)"),
    ],
)
def test_a_loss_that_starts_late_fails_before_the_first_step(videos, tmp_path, error, raised, expected):
    t = with_late_term(trainer(videos, tmp_path, **LONG, **{"trainer.robust.preflight": True}), error)
    with pytest.raises(raised, match=expected):
        t.fit()
    assert t.step == 0


def test_preflight_needs_memory_for_the_optimizers_moments(videos, tmp_path, monkeypatch):
    t = trainer(videos, tmp_path, **LONG, **{"trainer.robust.preflight": True})

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB")

    monkeypatch.setattr(torch, "empty_like", full)
    with pytest.raises(PreflightError, match="does not fit into memory"):
        t.fit()


def test_preflight_takes_the_memory_of_a_step_of_several_micro_batches(videos, tmp_path):
    t = trainer(videos, tmp_path, **LONG, **{"trainer.accumulate": 2})
    with memory.PeakMemory([]) as tried:
        t.preflight()
    clips = list(t.data.clips(0, 2))
    t.train_step(clips[:2])
    with memory.PeakMemory([]) as real:
        t.forward_backward(clips[2:], t.adversary.update_phase(1), 1, StepMetrics())
    moments = sum(2 * p.nbytes for p in t.network.parameters() if p.requires_grad)
    assert tried.peak == pytest.approx(real.peak + moments, rel=0.01)


def test_preflight_leaves_no_trace(videos, tmp_path):
    runs = []
    for preflights in (False, True):
        changes = {"trainer.robust.preflight": preflights, "trainer.accumulate": 2}
        t = trainer(videos, tmp_path / str(preflights), **changes)
        t.fit()
        runs.append(weights(t))
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


def test_a_gradient_of_zero_stops_the_run_with_what_to_look_at(videos, tmp_path):
    t = trainer(videos, tmp_path, **LONG, **{"trainer.robust.zero_gradient": 3})
    forward = t.strategy.model.forward

    def clamped(video, **how):
        out = forward(video, **how)
        out.video = (out.video + 100).clamp(-1, 1)  # as decode_video of a published trainer did in place
        out.posterior.mean, out.posterior.logvar = out.posterior.mean * 0, out.posterior.logvar * 0
        return out

    t.strategy.model.forward = clamped
    with pytest.raises(TooManyFailures, match=r"3 steps in a row had no gradient at all.*are its outputs clamped"):
        t.fit()
    assert t.step == 3


def test_a_step_without_files_does_not_make_an_alarm_begin_again(videos, tmp_path):
    t = trainer(videos, tmp_path, **LONG, **{"trainer.robust.zero_gradient": 2})
    t.network.register_forward_hook(lambda _m, _in, out: setattr(out, "video", out.video * 0))
    clip = next(t.data.clips(0, 1))
    t.objective.terms = {"zero": WeightedTerm(Zero(), 1.0)}
    t.train_step([clip])
    t.train_step([Unreadable([("a.mp4", "is empty")])])
    with pytest.raises(TooManyFailures, match="2 steps in a row had no gradient at all"):
        t.train_step([clip])


def test_errors_in_a_row_are_counted_on_after_a_resume(videos, tmp_path):
    gone = [Unreadable([("a.mp4", "is empty")])]
    t = trainer(videos, tmp_path, **LONG, **{"trainer.robust.max_consecutive_failures": 2})
    t.train_step(gone)
    t.checkpointer.save(t.step)
    t.log.close()
    again = trainer(videos, tmp_path, **LONG, **{"trainer.robust.max_consecutive_failures": 2})
    with pytest.raises(TooManyFailures, match="2 steps in a row could not be finished"):
        again.train_step(gone)


def test_an_error_of_the_interpreters_memory_says_nothing_and_is_borne(videos, tmp_path):
    t = trainer(videos, tmp_path, **LONG)
    hook = t.network.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
    clip = next(t.data.clips(0, 1))
    assert not t.train_step([clip]).applied
    hook.remove()
    assert t.train_step([clip]).applied


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_too_full_for_a_checkpoint_is_called_so():
    """torch says `[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598`."""
    error = run_on_all_ranks(torch.device("cpu"), lambda: torch.save({"weight": torch.zeros(10**6)}, "/dev/full"))
    assert "rank 0: a file could not be written whole, as on a full disk: RuntimeError" in error


def test_a_disk_too_full_for_the_log_does_not_end_the_run(videos, tmp_path, monkeypatch, caplog):
    t = trainer(videos, tmp_path, **LONG)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(t.log, "_append", full)
    assert t.fit()
    assert "metrics of step 9 is not recorded: [Errno 28] No space left on device" in caplog.text


def test_nothing_readable_or_no_memory_stops_the_run_after_a_while(videos, tmp_path):
    t = trainer(videos, tmp_path, **LONG, **{"trainer.robust.max_consecutive_failures": 2})
    assert not t.train_step([Unreadable([("a.mp4", "is empty")])]).applied
    with pytest.raises(
        TooManyFailures, match=r"2 steps in a row could not be finished .*\n  the last: without a readable file: rank 0"
    ):
        t.train_step([Unreadable([("b.mp4", "is empty")])])
    assert "b.mp4" in (tmp_path / "data_errors.jsonl").read_text()


def test_other_errors_are_not_taken_for_a_lack_of_memory(videos, tmp_path):
    t = trainer(videos, tmp_path, **LONG)
    t.network.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("size mismatch")))
    with pytest.raises(RuntimeError, match="size mismatch"):
        t.fit()


@pytest.mark.parametrize(
    ("error", "memory_ran_out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error, memory_ran_out):
    assert memory.is_out_of_memory(error) == memory_ran_out


def test_a_full_disk_costs_checkpoints_but_not_the_run_until_patience_ends(videos, tmp_path, monkeypatch):
    t = trainer(
        videos, tmp_path, **{"trainer.max_steps": 6, "trainer.save_every": 1, "trainer.robust.save_failures": 2}
    )
    good = state.write

    def full(folder, *rest):
        raise OSError(errno.ENOSPC, "No space left on device")

    def every_other(folder, *rest):
        (full if t.step % 2 == 0 else good)(folder, *rest)

    monkeypatch.setattr(state, "write", every_other)
    with pytest.raises(SaveError, match=r"no checkpoint of step 6: rank 0: OSError.*the steps after step 5 are lost"):
        t.fit()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step-000000{n}" for n in (1, 3, 5)]
    monkeypatch.setattr(state, "write", full)
    t.checkpointer.save(t.step)
    with pytest.raises(
        TooManyFailures,
        match=r"2 checkpoints in a row could not be written .*\n  the last: no .*rank 0: OSError.*No space left",
    ):
        t.checkpointer.save(t.step)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("mode", ["disabled", "async"])
@pytest.mark.parametrize(
    ("file", "complete"), [("state.pt", False), ("run.json", False), ("model.yaml", True), ("model.safetensors", True)]
)
def test_a_disk_too_full_for_any_file_of_a_checkpoint_does_not_end_the_run(
    videos, tmp_path, monkeypatch, caplog, file, complete, mode
):
    t = trainer(videos, tmp_path, **LONG, **{"trainer.async_mode": mode})
    with monkeypatch.context() as patch:
        fill_disk(patch, file)
        t.checkpointer.save(t.step)
        t.checkpointer.wait()
    assert (state.latest_state(tmp_path / "checkpoints") is not None) == complete
    assert not list((tmp_path / "exports").glob("*"))
    assert "No space left on device" in caplog.text
    assert "training goes on" in caplog.text
    t.checkpointer.save(t.step)
    t.checkpointer.wait()
    assert (tmp_path / "exports/step-0000000/model.yaml").is_file()


@pytest.mark.parametrize(("threshold", "compacts"), [(None, False), (4.0, False), (2.0, True)])
def test_idle_memory_is_given_back_above_a_threshold_only(monkeypatch, threshold, compacts):
    held = {"reserved": 10 * 2**30}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: held["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 7 * 2**30)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.update(reserved=7 * 2**30))
    assert memory.release_idle_memory(threshold) == (3.0 if compacts else 0.0)
    assert memory.idle_gib() == (0.0 if compacts else 3.0)


def test_a_validation_without_memory_is_left_out_and_training_goes_on(videos, tmp_path, caplog):
    validates = {"validation.every": 1, "validation.frames": 1}
    t = trainer(videos, tmp_path, **validates)
    hook = t.network.register_forward_pre_hook(lambda network, _: None if network.training else no_memory())
    assert t.validate() == {}
    assert t.network.training
    t.fit()
    assert t.step == 2
    assert "validation failed at step 2: CUDA out of memory" in caplog.text
    hook.remove()
    assert "val/psnr" in t.validate()


def test_a_validation_of_nan_counts_as_failed_and_is_no_best_checkpoint(videos, tmp_path, caplog):
    validates = {"validation.every": 1, "validation.frames": 1, "trainer.best": "psnr"}
    t = trainer(videos, tmp_path, **validates)

    def spoil(network, _, out):
        return out if network.training else replace(out, video=out.video * float("nan"))

    hook = t.network.register_forward_hook(spoil)
    t.fit()
    assert t.step == 2
    assert re.search(r"validation failed at step 2: reconstruction of .*\.mp4: .* values are NaN", caplog.text)
    assert (t.best.value, (t.folder / "exports/best").exists()) == (None, False)
    hook.remove()
    assert "val/psnr" in t.validate()


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
