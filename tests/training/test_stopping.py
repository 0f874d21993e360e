"""Ends of a run: signals, errors of the data, full disks, kills, and steps that are skipped. What is saved, and said."""

from __future__ import annotations

import errno
import math
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import vae3d
from tests.training.quick import fill_disk, trainer
from tests.training.test_trainer import fresh_accelerate, trace, weights  # noqa: F401
from vae3d.checkpoints import state
from vae3d.commands import console, launch
from vae3d.data.batches.clips import Unreadable
from vae3d.data.media import DataError
from vae3d.io import FileError, is_disk_error
from vae3d.training import checkpointer
from vae3d.training.failures import SaveError, SpikeError
from vae3d.training.runlog import STOPS, stop_signals

PUBLISHES = {"trainer.publish.prefix": "vae", "trainer.publish.layout": "native"}
LONG = {"trainer.max_steps": 9, "trainer.save_every": 9}


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def steps(folder: Path, kind: str = "checkpoints") -> list[int]:
    return [int(path.name[5:]) for path in sorted((folder / kind).glob("step-*"))]


def at_step(t, step: int, do) -> None:
    """do() when the run begins a step."""
    take = t.train_step
    t.train_step = lambda *args: (do() if t.step == step else None, take(*args))[1]


# ---- signals


@pytest.fixture(autouse=True)
def hangup() -> Iterator[None]:
    """SIGHUP as in a terminal. nohup starts pytest with it ignored, and goes on without its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_saves_between_two_steps_and_is_returned(videos, tmp_path, name, capfd):
    signum = getattr(signal, name)
    before = [signal.getsignal(stop) for stop in STOPS]
    t = trainer(videos, tmp_path, **LONG)
    at_step(t, 2, lambda: os.kill(os.getpid(), signum))
    assert launch.fit(t) == signum
    assert steps(tmp_path) == [t.step] == [4]
    assert [signal.getsignal(stop) for stop in STOPS] == before
    assert name in capfd.readouterr().err


def test_a_stopped_run_logs_the_same_means_as_one_that_goes_on(videos, tmp_path):
    settings = {**LONG, "trainer.log_every": 4}
    trainer(videos, tmp_path / "whole", **settings).fit()
    t = trainer(videos, tmp_path / "parts", **settings)
    at_step(t, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert not t.fit()
    assert t.step % 4
    assert trainer(videos, tmp_path / "parts", **settings).fit()
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")


def test_after_sigint_the_next_signal_kills_and_sigterm_may_come_twice():
    with stop_signals(verbose=False) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signum == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert {signal.getsignal(stop) for stop in STOPS} == {signal.SIG_DFL}
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signum == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("console_of", [os.openpty, os.pipe], ids=["terminal", "pipe"])
def test_a_console_that_is_gone_ends_no_run(console_of):
    reader, writer = console_of()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream:
        for _ in range(2):
            console.write_above_bar("a line of the log", stream)


def test_a_terminal_that_is_closed_does_not_keep_its_signal_from_the_run(monkeypatch):
    def write(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with stop_signals() as request, monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.signum == signal.SIGHUP


def test_a_signal_in_a_row_of_skipped_steps_waits_for_one_that_is_taken(videos, tmp_path):
    t = trainer(videos, tmp_path, **LONG)
    clips = t.data.clips

    def spoiled(*span):
        for number, clip in enumerate(clips(*span)):
            if number in (2, 3):
                clip.video = clip.to("cpu").video * float("nan")
            yield clip

    object.__setattr__(t.data, "clips", spoiled)
    at_step(t, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert launch.fit(t) == signal.SIGTERM
    assert steps(tmp_path) == [5]


# ---- a disk that refuses


@pytest.mark.parametrize("stops", [False, True], ids=["at the end", "after a signal"])
def test_a_last_save_that_fails_is_an_error_that_says_what_is_lost(
    videos, tmp_path, monkeypatch, stops, caplog, capsys
):
    t = trainer(videos, tmp_path, **{"trainer.max_steps": 4, "trainer.save_every": 2})
    write = state.write
    monkeypatch.setattr(state, "write", lambda *args: (full if t.step > 2 else write)(*args))
    if stops:
        at_step(t, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as ended:
            launch.fit(t)
        said = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == 2
    else:
        with pytest.raises(SaveError) as error:
            launch.fit(t)
        said = str(error.value)
    assert f"no checkpoint of step {t.step}" in said
    assert "the steps after step 2 are lost" in said
    assert "training goes on" not in said + caplog.text
    assert steps(tmp_path) == [2]
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_an_export_that_fails_at_the_end_is_an_error_and_the_same_command_writes_it(videos, tmp_path, monkeypatch):
    t = trainer(videos, tmp_path, **PUBLISHES)
    with monkeypatch.context() as patch:
        fill_disk(patch, "model.yaml")
        with pytest.raises(SaveError, match=r"step-0000002 is complete, but its outputs are not: rank 0: .*model.yaml"):
            t.fit()
    assert not (tmp_path / "vae_final_ema.pt").exists()
    assert trainer(videos, tmp_path, **PUBLISHES).fit()
    assert steps(tmp_path, "exports") == [2]
    assert (tmp_path / "vae_final_ema.pt").is_file()


@pytest.mark.parametrize(
    ("error", "of_disk"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EFBIG, "File too large"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), True),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), True),
        (SafetensorError("Error while serializing: invalid shape"), False),
        (RuntimeError("size mismatch"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (OSError("not a number"), False),
        (ValueError("No space left on device"), False),
    ],
)
def test_what_a_disk_refused(error, of_disk):
    assert is_disk_error(error) == of_disk


def test_an_error_of_the_program_in_saving_is_not_taken_for_a_full_disk(videos, tmp_path, monkeypatch):
    t = trainer(videos, tmp_path)

    def wrong(*_):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(state, "write", wrong)
    with pytest.raises(RuntimeError, match="size mismatch"):
        t.checkpointer.save(t.step)


def test_a_checkpoint_is_durable_before_it_has_its_name(videos, tmp_path, monkeypatch):
    synced, fsync, replace = [], os.fsync, os.replace

    def recorded(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "replace", lambda path, to: (synced.append(f"rename {path.name}"), replace(path, to))[1])
    t = trainer(videos, tmp_path)
    t.checkpointer.save(t.step)
    before, after = synced[: (named := synced.index("rename .step-0000000.tmp"))], synced[named:]
    assert any("run.json" in name for name in before)
    assert {"state.pt", ".step-0000000.tmp"} <= set(before)
    assert "checkpoints" in after


# ---- kills


class Killed(BaseException):
    """As good as SIGKILL, as far as files go: nothing catches it."""


def kill(*_, **__):
    raise Killed


def files(run: Path) -> dict[str, bytes]:
    """What a run leaves for others: exports and published weights."""
    made = [path for path in run.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".yaml", ".pth")]
    return {str(path.relative_to(run)): path.read_bytes() for path in [*made, *run.glob("vae_*ema*.pt")]}


@pytest.mark.parametrize("place", ["write_export", "write_flat", "link"])
def test_what_a_kill_after_the_checkpoint_left_out_is_written_at_the_next_start(videos, tmp_path, monkeypatch, place):
    whole = trainer(videos, tmp_path / "whole", **PUBLISHES)
    whole.fit()
    killed = trainer(videos, tmp_path / "killed", **PUBLISHES)
    module = "vae3d.checkpoints.export" if place == "write_export" else "vae3d.training.vae_trainer"
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{place}", kill)
        with pytest.raises(Killed):
            killed.fit()
    assert steps(tmp_path / "killed") == [2]
    for folder, name in (("exports", ".step-0000002.tmp"), (".", ".vae_step2.pt.0a1b2c3d.tmp")):
        (tmp_path / "killed" / folder / name).mkdir(parents=True)
    assert trainer(videos, tmp_path / "killed", **PUBLISHES).fit()
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert "vae_final_ema.pt" in files(tmp_path / "killed")
    left = [path for path in (tmp_path / "killed").rglob(".*") if path.suffix == ".tmp"]
    assert not left


def test_a_stale_export_of_a_step_is_not_taken_for_the_new_checkpoints(videos, tmp_path, monkeypatch):
    trainer(videos, tmp_path).fit()
    stale = (tmp_path / "exports/step-0000002/model.safetensors").read_bytes()
    state.discard(tmp_path / "checkpoints", 2)
    again = {"optim.lr": 5e-3}
    with monkeypatch.context() as patch:
        patch.setattr("vae3d.checkpoints.export.write_export", kill)
        with pytest.raises(Killed):
            trainer(videos, tmp_path, **again).fit()
    trainer(videos, tmp_path, **again).fit()
    assert (tmp_path / "exports/step-0000002/model.safetensors").read_bytes() != stale


def test_what_a_deleted_checkpoint_wrote_goes_at_the_next_start_and_what_is_older_stays(videos, tmp_path, caplog):
    often = {**PUBLISHES, "trainer.save_every": 1, "trainer.keep": 2}
    trainer(videos, tmp_path, **often, **{"trainer.max_steps": 3}).fit()
    assert steps(tmp_path, "exports") == [2, 3]
    state.discard(tmp_path / "checkpoints", 3)
    t = trainer(videos, tmp_path, **often, **{"trainer.max_steps": 6})
    with caplog.at_level("INFO"):
        t.checkpointer.complete_newest(t.step)
    t.log.close()
    assert steps(tmp_path, "exports") == [2]
    assert sorted(path.name for path in tmp_path.glob("vae_*step*")) == ["vae_ema_step2.pt", "vae_step2.pt"]
    assert "step-0000003" in caplog.text


def test_loading_a_run_says_where_its_export_is_older_than_its_checkpoint(videos, tmp_path, monkeypatch, caplog):
    t = trainer(videos, tmp_path, **{"trainer.save_every": 1})
    t.fit()
    with caplog.at_level("INFO"):
        vae3d.load(tmp_path)
    assert "its newest export, step-0000002" in caplog.text
    assert "newest checkpoint" not in caplog.text
    checkpointer.remove(tmp_path / "exports/step-0000002")
    vae3d.load(tmp_path)
    assert "step-0000001 is the newest export" in caplog.text
    assert "newest checkpoint is step-0000002" in caplog.text


def test_metrics_are_left_alone_at_a_start_that_drops_none(videos, tmp_path):
    short = {"trainer.max_steps": 2, "trainer.save_every": 2}
    trainer(videos, tmp_path, **short).fit()
    file = tmp_path / "metrics.jsonl"
    whole, number = file.read_text(), file.stat().st_ino
    trainer(videos, tmp_path, **short).fit()
    assert (file.read_text(), file.stat().st_ino) == (whole, number)
    nonsense = '3\n{"step": "x"}\n{"step": ' + "9" * 5000 + '}\n{"step": 1, "x": ' + "[" * 10**5 + "\n"
    file.write_text(whole + nonsense + '{"step": 3, "loss": 1.0}\n{"step": 4, "lo')  # killed in the middle of a line
    opened = file.open()
    trainer(videos, tmp_path, **short).fit()
    assert file.read_text() == whole
    assert opened.read() != whole  # it was replaced, not rewritten


# ---- runs that are not well


def test_a_ruined_run_saves_nothing_more_and_keeps_the_last_good_checkpoint(videos, tmp_path):
    often = {
        "trainer.max_steps": 40,
        "trainer.save_every": 1,
        "trainer.keep": 1,
        "trainer.spike.max_consecutive_skips": 5,
    }
    t = trainer(videos, tmp_path, **often)
    at_step(t, 3, lambda: setattr(t.config.optim, "lr", 1e30))
    with pytest.raises(
        SpikeError, match=r"5 steps in a row were skipped.*No step succeeded after .*step-0000004"
    ) as error:
        t.fit()
    assert "delete it" in str(error.value)
    assert steps(tmp_path) == [3, 4]  # 4 has the ruined weights
    state.discard(tmp_path / "checkpoints", 4)
    assert trainer(videos, tmp_path, **{**often, "trainer.max_steps": 6}).fit()
    assert steps(tmp_path) == [5, 6]


def test_a_run_that_ends_on_skipped_steps_is_not_saved(videos, tmp_path):
    t = trainer(videos, tmp_path, **{"trainer.max_steps": 6, "trainer.save_every": 2})
    at_step(t, 3, lambda: setattr(t.config.optim, "lr", 1e30))
    with pytest.raises(SpikeError, match=r"ends on 2 skipped steps.*step 6 is not saved"):
        t.fit()
    assert steps(tmp_path) == steps(tmp_path, "exports") == [2, 4]


def test_a_checkpoint_that_is_due_at_a_skipped_step_waits_for_one_that_is_taken(videos, tmp_path):
    t = trainer(videos, tmp_path, **{"trainer.max_steps": 6, "trainer.save_every": 2, "trainer.keep": 0})
    take = t.train_step
    t.train_step = lambda clips, *rest: take([Unreadable([])] if t.step == 3 else clips, *rest)
    assert t.fit()
    assert steps(tmp_path) == [2, 5, 6]


def test_a_loader_that_fails_saves_what_is_finished_and_the_run_goes_on_to_the_same_bits(videos, tmp_path):
    whole = trainer(videos, tmp_path / "whole", **LONG)
    whole.fit()
    t = trainer(videos, tmp_path / "run", **LONG)
    clips = t.data.clips

    def dying(*span):
        yield from list(clips(*span))[:5]
        raise DataError("a worker was killed")

    object.__setattr__(t.data, "clips", dying)
    with pytest.raises(DataError, match=r"(?s)a worker was killed.*all 5 finished steps are saved"):
        t.fit()
    assert steps(tmp_path / "run") == [5]
    again = trainer(videos, tmp_path / "run", **LONG)
    assert again.fit()
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=0)
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")


def test_too_many_broken_files_save_first_and_are_counted_again_once_they_are_repaired(videos, tmp_path):
    t = trainer(videos, tmp_path, **LONG, **{"data.max_broken": 0.2})
    t.read_errors.reads, t.read_errors.broken = 1000, 199
    clip = next(t.data.clips(0, 1))
    clip.errors.extend([(f"{number}.mp4", "is empty") for number in range(5)])
    with pytest.raises(DataError, match=r"(?s)reads failed.*all 1 finished steps are saved"):
        t.train_step([clip])
    t.log.close()
    again = trainer(videos, tmp_path, **LONG, **{"data.max_broken": 0.2})
    assert (again.step, again.read_errors.reads, again.read_errors.broken) == (1, 0, 0)


# ---- links


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "launches.jsonl", "data_errors.jsonl", ".lock", "rank0.log", ".hydra", ".hydra/rank0/config.yaml",
     "checkpoints", "checkpoints/.step-0000002.tmp", "exports", "exports/.step-0000002.tmp", "exports/best",
     "tensorboard", "vae_final_ema.pt", "final_model.safetensors"],
)  # fmt: skip
def test_a_link_in_a_runs_folder_is_refused_by_name(videos, tmp_path, name):
    outside, link = tmp_path / "outside", tmp_path / "run" / name
    outside.mkdir()
    (outside / "file").write_text("precious")
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / "file" if "." in name.rpartition("/")[2][1:] else outside)
    with pytest.raises(FileError, match="symbolic link") as error:
        trainer(videos, tmp_path / "run")
    assert str(link) in str(error.value)
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "precious"


def test_a_pipe_in_a_runs_folder_is_refused_by_name(videos, tmp_path):
    os.mkfifo(tmp_path / "launches.jsonl")
    with pytest.raises(FileError, match=r"launches\.jsonl: is a pipe"):
        trainer(videos, tmp_path)


def test_the_log_file_follows_no_link_and_a_runs_folder_may_be_one(videos, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    assert trainer(videos, tmp_path / "run").fit()
    (tmp_path / "run/rank0.log").symlink_to(tmp_path / "log")
    handler = console.RunLogFile(tmp_path / "run/rank0.log", delay=True)
    with pytest.raises(FileError, match=r"rank0.log: is a symbolic link"):
        handler.emit(console.logging.makeLogRecord({"msg": "x"}))
    assert not (tmp_path / "log").exists()


def test_no_escape_sequence_of_a_name_reaches_the_terminal_or_the_log(tmp_path, capsys):
    record = console.logging.makeLogRecord({"msg": "first\n%s", "args": ("\x1b]0;title\x07.mp4",)})
    for handler in (console.ConsoleHandler(), console.RunLogFile(tmp_path / "log")):
        handler.emit(record)
    console.show("first\n\x1b]0;title\x07.mp4")
    line = "first\n\\x1b]0;title\\x07.mp4\n"
    assert (capsys.readouterr().out, (tmp_path / "log").read_text()) == (2 * line, line)


def test_a_warning_of_ours_is_a_line_and_others_say_where_they_come_from():
    ours = console.format_warning("of \x1b[0m\n.mp4", UserWarning, console.__file__, 1)
    assert ours == "warning: of \\x1b[0m\\n.mp4\n"
    assert console.format_warning("theirs", UserWarning, "torch.py", 1) == "torch.py:1: UserWarning: theirs\n"
    before = warnings.formatwarning
    try:
        console.exit_on_user_error(lambda: None)
        assert warnings.formatwarning is console.format_warning
    finally:
        warnings.formatwarning = before


def test_a_log_file_on_a_full_disk_lacks_lines_without_a_traceback(capsys):
    handler = console.RunLogFile("/dev/full")
    for _ in range(2):
        handler.emit(console.logging.makeLogRecord({"msg": "x"}))
    handler.stream = None  # its buffer cannot be flushed
    error = capsys.readouterr().err
    assert error.startswith("/dev/full ")
    assert error.endswith(": No space left on device\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("lines", "value"),
    [
        (['{"step": 2, "val/psnr": 20.5}', '{"step": 4, "val/psnr": 21.5}'], 21.5),
        (['{"step": 2, "val/psnr": 20.5}', '{"step": 4, "loss": 1.0}'], math.nan),  # whose validation failed
        (['{"step": 2, "val/psnr": 20.5}', '{"step": 4, "val/psnr": 2'], math.nan),
        (['{"step": 4, "val/ps', "[]", "7", "\udcff}", '{"val/psnr": 1}', '{"step": 4, "val/psnr": 21.5}'], 21.5),
        (['{"step": 4, "loss": 1.0}'], None),  # without validation
        (None, None),
    ],
)
def test_the_objective_of_a_sweep_is_the_value_of_the_last_step(tmp_path, lines, value):
    if lines is not None:
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines), errors="surrogateescape")
    assert launch.last_metric(tmp_path, "val/psnr", 4) == pytest.approx(value, nan_ok=True)
