"""What a run prints: one line per log step, the validation before the first step, and what the console's lines say."""

from __future__ import annotations

import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from tests.training.quick import trainer
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d.checkpoints.state import latest_state, load_state
from vae3d.commands import closing as end
from vae3d.commands import train
from vae3d.commands.closing import closing, longer
from vae3d.commands.summary import data_summary, held_out_lines, loss_summary, never_reached
from vae3d.config.check import read
from vae3d.config.issues import ConfigError
from vae3d.config.schema import TrainConfig
from vae3d.text import epoch_text
from vae3d.training.runlog import Countdown, duration, fields

STEP = {
    "loss": 1237.0, "loss/l1": 1236.9, "loss_mean/l1": 0.4026, "loss_weighted/l1": 1236.9,
    "loss/kl": 1935.0, "loss_mean/kl": 1.89, "loss_weighted/kl": 0.0019, "grad_norm": 3427.0, "loss_max": 1237.0,
    "skipped": 0.0, "lr/all": 0.0059, "clips_per_second": 25.2, "frames_per_second": 25.2, "memory_gib": 0.8,
}  # fmt: skip
VALIDATED = {"validation.every": 2, "validation.clips": 2, "validation.frames": 1, "trainer.max_steps": 4}


def test_a_line_has_each_term_per_element_its_share_and_the_weighted_total_and_no_value_twice():
    assert fields(STEP) == [
        "loss 1237: l1 0.4026 (100%), kl 1.89 (0%)", "lr 0.0059", "grad norm 3427", "25.2 clips/s",
    ]  # fmt: skip
    alone = {"loss": 0.5, "loss/mse": 0.5, "loss_q0": 0.9, "loss_q3": 0.1, "lr": 1e-3}
    assert fields(alone) == ["loss 0.5 (by quarter of the timesteps 0.9 - - 0.1)", "lr 0.001"]


def test_a_line_names_what_is_unusual():
    gan = {"loss/gan": -0.2, "loss_weighted/gan": -412.3, "loss_discriminator": 0.7, "skipped": 3.0}
    parts = {"lr/encoder": 1e-5, "lr/decoder": 1e-4, "memory_idle_gib": 0.1}
    assert fields({**{k: v for k, v in STEP.items() if k != "lr/all"}, **gan, **parts}) == [
        "loss 1237: l1 0.4026 (75%), kl 1.89 (0%), gan -0.2 (25%)", "discriminator 0.7", "lr 1e-05 encoder",
        "lr 0.0001 decoder", "grad norm 3427", "25.2 clips/s", "0.8 GiB", "3 steps skipped",
    ]  # fmt: skip


def test_the_start_says_which_terms_are_sums_and_which_are_means():
    means, sums = (
        loss_summary(read(tiny.compose(f"loss={loss}"), TrainConfig)[0].loss) for loss in ("erp", "recon_kl")
    )
    assert means.startswith("loss: 1 l1 + 0.5 edge + 0.1 lpips + 1e-06 kl (sum); mean")
    assert sums.startswith("loss: 1 l1 + 1e-06 kl; sum")


def test_a_validation_is_one_line_and_frames_that_are_videos_are_not_listed_twice():
    assert fields({"val/psnr": 16.12, "val/psnr_video": 16.12, "val/ssim": 0.4, "val_clips": 7}) == [
        "validation of 7 clips: psnr 16.12, ssim 0.4"
    ]
    loss = {"val/loss": 1.0, "val/loss_q0": 2.0, "val/loss_q1": 1.5, "val/sample_rms": 1.1}
    assert fields(loss) == ["validation: loss 1 (by quarter of the timesteps 2 1.5 - -), sample_rms 1.1"]


def test_the_time_left_is_that_of_the_steps_of_this_start_without_its_first():
    countdown = Countdown(step=100, max_steps=200)
    assert countdown.text(100) == "step 100/200  50%"
    for now in (1000.0, 1002.0, 1004.0):  # the first took long
        countdown.advance(now)
    assert countdown.text(103) == "step 103/200  51%  3 min 14 s left"
    assert countdown.text(200) == "step 200/200  100%"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.6, "1 min"), (3605, "1 h"), (7500, "2 h 5 min"), (90061, "1 d 1 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_first_step_has_a_line_where_there_is_no_progress_bar_and_counts_only_once_in_the_metrics(
    videos, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "vae3d")
    t = trainer(videos, tmp_path, **{"trainer.max_steps": 3, "trainer.log_every": 2, "validation.every": 0})
    t.fit()
    lines = [m for m in caplog.messages if m.startswith("step ")]
    assert [re.match(r"step (\d)/3  \d+%(?:  .* left)?  loss \d", line)[1] for line in lines] == ["1", "2", "3"]
    assert [row["step"] for row in rows(tmp_path)] == [2, 3]


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def comparable(folder) -> list[dict]:
    """Without what the machine decides."""
    return [{k: v for k, v in row.items() if "per_second" not in k and "memory" not in k} for row in rows(folder)]


def test_the_first_validation_is_before_step_1_and_changes_no_other_number(videos, tmp_path, caplog):
    caplog.set_level(logging.INFO, "vae3d")
    t = trainer(videos, tmp_path / "with", **VALIDATED)
    state = torch.get_rng_state()
    t.validate()
    assert torch.equal(torch.get_rng_state(), state)
    t.log.close()
    (tmp_path / "with/metrics.jsonl").unlink()
    caplog.clear()
    trainer(videos, tmp_path / "with", **VALIDATED).fit()
    lines = [m for m in caplog.messages if m.startswith("step ")]
    assert [re.match(r"step (\d)/4 ", line)[1] for line in lines] == ["0", "1", "2", "2", "3", "4", "4"]
    assert [line.split("  ")[-1].startswith("validation of 1 clip: psnr ") for line in lines] == [
        True, False, False, True, False, False, True,
    ]  # fmt: skip
    trainer(videos, tmp_path / "without", **VALIDATED, **{"validation.on_start": False}).fit()
    first, *others = comparable(tmp_path / "with")
    assert first["step"] == 0
    assert first["val/psnr"] > 0
    assert others == comparable(tmp_path / "without")
    ours, theirs = (load_state(latest_state(tmp_path / name / "checkpoints")) for name in ("with", "without"))
    for kind in ("model", "ema"):
        assert all(torch.equal(tensor, theirs[kind][name]) for name, tensor in ours[kind].items())


def test_a_resume_does_not_repeat_the_first_validation_and_a_start_at_0_replaces_it(videos, tmp_path):
    for steps in (2, 4):
        trainer(videos, tmp_path / "run", **{**VALIDATED, "trainer.max_steps": steps}).fit()
    assert [row["step"] for row in rows(tmp_path / "run") if "val/psnr" in row] == [0, 2, 4]
    never_saved = {**VALIDATED, "trainer.max_steps": 2, "trainer.save_every": 0}
    for _ in range(2):
        trainer(videos, tmp_path / "again", **never_saved).fit()
    assert [row["step"] for row in rows(tmp_path / "again") if "val/psnr" in row] == [0, 2]


def test_the_first_validation_counts_for_no_best_checkpoint(videos, tmp_path):
    worse = {**VALIDATED, "trainer.best": "psnr", "optim.lr": 1e-9, "trainer.ema.decay": 0.0}
    t = trainer(videos, tmp_path, **worse)
    t.fit()
    assert t.best.step in (2, 4)


def test_on_start_is_a_switch(videos):
    from tests import tiny

    with pytest.raises(ConfigError, match=r"validation\.on_start=3: must be true or false"):
        tiny.training("temporal_vae", videos, "validation.on_start=3", "loss=recon_kl")


def test_what_begins_after_the_last_step_is_warned_of(videos, tmp_path, caplog):
    late = ["adversary.start=3", "optim.warmup_steps=3", "loss.terms.kl.ramp=[3,5]", "loss.terms.l1.ramp=[2,5]"]
    late += ["optim.decay_start=4", "optim.schedule=cosine"]
    images = ["stage=finetune", "stage.init_from=random", "loss=recon_kl", "data.frames.min=1", "data.frames.max=1"]
    config = tiny.training("spatial", videos, *images, *tiny.GAN, *late, "trainer.max_steps=3")
    assert [line.partition("=")[0] for line in never_reached(config)] == [
        "optim.warmup_steps", "optim.decay_start", "loss.terms.kl.ramp", "adversary.start",
    ]  # fmt: skip
    train.build_trainer(config, tmp_path).log.close()
    assert "adversary.start=3: the run ends before, at trainer.max_steps=3" in caplog.text


def test_a_run_beyond_max_steps_is_complete_and_offers_steps_that_it_does_not_have(
    videos, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "vae3d")
    trainer(videos, tmp_path, **VALIDATED).fit()
    t = trainer(videos, tmp_path, **VALIDATED | {"trainer.max_steps": 2})
    t.fit()
    assert any("complete: step 4/2;" in message for message in caplog.messages)
    started = ["trainer.max_steps=2", "optim.lr=1e-3"]
    hydra = SimpleNamespace(
        initialized=lambda: True, get=lambda: SimpleNamespace(overrides=SimpleNamespace(task=started))
    )
    monkeypatch.setattr(end, "HydraConfig", hydra)
    monkeypatch.setattr(end, "search_path", list)  # of Hydra, too
    purpose, command = longer("train", t)
    assert purpose.endswith("step 8")
    assert command.endswith("train optim.lr=1e-3 trainer.max_steps=8")


def test_a_run_of_one_validation_ends_with_its_scores_alone(videos, tmp_path):
    t = trainer(videos, tmp_path, **VALIDATED)
    t.fit()
    metrics = tmp_path / "metrics.jsonl"
    head = re.compile(r"score +at step 0( +best +at step +at step 4)?")
    assert head.fullmatch(closing(t, 4, 0.1, []).splitlines()[0])[1]
    metrics.write_text("".join(line for line in metrics.read_text().splitlines(True) if json.loads(line)["step"] == 0))
    assert head.fullmatch(closing(t, 4, 0.1, []).splitlines()[0])[1] is None


def test_a_held_out_file_is_told_in_one_line_whatever_its_name():
    clip = SimpleNamespace(paths=["a\n\x1b[0m.mp4"])
    [line] = held_out_lines(SimpleNamespace(held_out=[clip], errors=[]))
    assert line.endswith(r": a\n\x1b[0m.mp4")


def test_files_that_are_too_short_are_no_training_files(videos, tmp_path):
    t = trainer(videos, tmp_path, **{"data.frames.min": 17, "data.frames.max": 17, "trainer.max_steps": 3})
    lines = data_summary(t.config, t.data)
    used = int(re.match(r"(\d+) training files?, ", lines[0])[1])
    skipped = int(re.search(r"skipped: (\d+) files? with fewer than 17", lines[-1])[1])
    assert used <= 5  # of ten videos of 12 to 21 frames and two images
    assert used + skipped == len(t.data.streams[0].schedule.lengths)


@pytest.mark.parametrize(
    ("epochs", "text"),
    [(0.3636, "0.364 epochs"), (1.0, "1 epoch"), (999.7, "1000 epochs"), (138181.8, "138182 epochs")],
)
def test_epochs(epochs, text):
    assert epoch_text(epochs) == text
