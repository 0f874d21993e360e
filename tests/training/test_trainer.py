from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

import vae3d
from tests import tiny
from tests.training import quick
from vae3d.adversarial.base import NoAdversary, UpdatePhase
from vae3d.checkpoints.formats import CheckpointError
from vae3d.checkpoints.state import ResumeError, latest_state, load_state
from vae3d.commands import train
from vae3d.data.media import DataError
from vae3d.training.freeze import PartError, eval_mode
from vae3d.training.vae_trainer import VaeTrainer


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def trainer(videos: Path, folder: Path, *overrides: str, name: str = "temporal_vae") -> VaeTrainer:
    return train.build_trainer(tiny.training(name, videos, "loss=recon_kl", "data.frames.max=5", *overrides), folder)


@pytest.fixture(scope="module")
def two_steps(videos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two_steps")
    trainer(videos, folder).fit()
    return folder


@pytest.fixture
def ended(two_steps, tmp_path) -> Path:
    """A copy of a run that ended after two steps."""
    return shutil.copytree(two_steps, tmp_path / "ended")


def weights(t: VaeTrainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in t.network.state_dict().items()}


def trace(folder: Path, key: str = "loss") -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[key]) for line in lines if key in line]


def test_training_lowers_the_loss_and_writes_what_a_run_must_leave(videos, tmp_path):
    t = trainer(videos, tmp_path, "debug=overfit", "trainer.max_steps=30", "trainer.save_every=30", "optim.lr=3e-3")
    t.fit()
    losses = [loss for _, loss in trace(tmp_path)]
    assert losses[-1] < 0.6 * losses[0]
    exported = vae3d.load(tmp_path)
    assert exported.state_dict().keys() == t.network.state_dict().keys()
    launch = json.loads((tmp_path / "launches.jsonl").read_text())
    assert launch["step"] == 0
    assert torch.__version__.startswith(launch["versions"]["torch"])
    assert launch["config"]["optim"]["lr"] == 3e-3


def test_every_term_is_logged_raw_weighted_and_per_element(two_steps):
    last = json.loads((two_steps / "metrics.jsonl").read_text().splitlines()[-1])
    for term in ("l1", "kl"):
        assert {f"loss/{term}", f"loss_mean/{term}", f"loss_weighted/{term}"} <= last.keys()
    assert {"loss", "grad_norm", "skipped", "lr/temporal_encoder", "clips_per_second", "memory_gib"} <= last.keys()
    assert last["loss_mean/l1"] == pytest.approx(last["loss/l1"] / (3 * 16 * 16), rel=1e-4)
    assert last["loss"] == pytest.approx(last["loss_weighted/l1"] + last["loss_weighted/kl"], rel=1e-4)


def test_frozen_parts_stay_bit_equal_and_in_eval_mode(videos, tmp_path, spatial_export):
    t = trainer(
        videos,
        tmp_path,
        "stage=stage1",
        "loss=latent",
        "data.frames.min=5",
        f"stage.init_from.spatial_vae={spatial_export}",
    )
    before = weights(t)
    t.fit()
    after = weights(t)
    for name in before:
        assert torch.equal(before[name], after[name]) == (not name.startswith("temporal_vae.")), name
    assert not t.network.spatial_vae.training
    assert t.network.temporal_vae.encoder.training
    spatial = vae3d.load(spatial_export)
    for name, tensor in spatial.state_dict().items():
        assert torch.equal(after[f"spatial_vae.{name}"], tensor)


def test_parts_train_at_their_own_rate(videos, tmp_path):
    t = trainer(
        videos,
        tmp_path,
        "++stage.train={spatial_encoder: 0.1, spatial_decoder: 1.0, temporal_encoder: 1.0, temporal_decoder: 1.0}",
    )
    t.fit()
    rates = {group["part"]: group["lr"] for group in t.optimizer.param_groups}
    assert rates["spatial_encoder"] == pytest.approx(1e-4)
    assert rates["temporal_decoder"] == pytest.approx(1e-3)


def test_accumulation_changes_nothing_but_memory(videos, tmp_path):
    common = ["data.batch_size=4", "optim.eps=0.01"]  # so that Adam does not blow up rounding of tiny gradients
    whole = trainer(videos, tmp_path / "whole", *common)
    start = weights(whole)
    whole.fit()
    parts = trainer(videos, tmp_path / "parts", *common, "trainer.accumulate=4")
    parts.fit()
    expected = weights(whole)
    torch.testing.assert_close(weights(parts), expected, rtol=0, atol=1e-6)
    assert max((tensor - start[name]).abs().max() for name, tensor in expected.items()) > 1e-4


@pytest.mark.smoke
def test_two_and_two_steps_are_four(videos, tmp_path):
    """Weights, optimizer, EMA and the trace of every metric, bit for bit, with accumulation and random frame counts."""
    common = [
        "data.batch_size=4",
        "trainer.accumulate=2",
        "data.frames.images=0.3",
        "trainer.log_every=3",
        "data.flip=true",
    ]
    whole = trainer(videos, tmp_path / "whole", *common, "trainer.max_steps=4")
    whole.fit()
    trainer(videos, tmp_path / "parts", *common, "trainer.max_steps=2").fit()
    resumed = trainer(videos, tmp_path / "parts", *common, "trainer.max_steps=4")
    assert resumed.step == 2
    resumed.fit()
    a, b = (load_state(latest_state(tmp_path / run / "checkpoints")) for run in ("whole", "parts"))
    for kind in ("model", "ema"):
        for name in a[kind]:
            assert torch.equal(a[kind][name], b[kind][name]), (kind, name)
    for index, state in a["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, b["optimizer"]["state"][index][name])
    assert a["spikes"] == b["spikes"]
    assert trace(tmp_path / "whole")[-1] == trace(tmp_path / "parts")[-1]


def test_a_changed_learning_rate_is_taken_on_resume_and_written_down(videos, ended):
    resumed = trainer(videos, ended, "trainer.max_steps=3", "optim.lr=5e-4", "optim.weight_decay=0.1")
    resumed.fit()
    assert resumed.optimizer.param_groups[0]["lr"] == 5e-4
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.1
    launch = json.loads((ended / "launches.jsonl").read_text().splitlines()[-1])
    assert launch["changed_since_checkpoint"]["optim.lr"] == [1e-3, 5e-4]
    assert launch["step"] == 2


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.temporal.layers=2", "model.temporal.layers: 1 in the checkpoint, 2 now"),
        ("data.frames.max=4", "data.frames.max: 5 in the checkpoint, 4 now"),
        ("run.seed=7", "run.seed: 0 in the checkpoint, 7 now"),
        ("stage.train.spatial_encoder=0.5", "stage.train.spatial_encoder: 1.0 in the checkpoint, 0.5 now"),
    ],
)
def test_another_run_is_not_continued(videos, ended, override, key):
    with pytest.raises(ResumeError, match=key):
        trainer(videos, ended, "trainer.max_steps=3", override)


def test_a_finished_run_stays_as_it_is(videos, ended):
    before = (ended / "metrics.jsonl").read_text()
    trainer(videos, ended).fit()
    assert (ended / "metrics.jsonl").read_text() == before


def test_metrics_after_the_checkpoint_are_forgotten(videos, ended):
    with (ended / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    trainer(videos, ended, "trainer.max_steps=3").fit()
    steps = [step for step, _ in trace(ended)]
    assert steps == [1, 2, 3]
    assert trace(ended)[-1][1] != 1.0


def test_an_unfinished_checkpoint_is_not_taken(videos, ended):
    half = ended / "checkpoints/step-0000099"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    assert trainer(videos, ended, "trainer.max_steps=3").step == 2


def test_checkpoints_are_kept_to_a_number(videos, tmp_path):
    trainer(videos, tmp_path, "trainer.max_steps=5", "trainer.save_every=1", "trainer.keep=2").fit()
    for kind in ("checkpoints", "exports"):
        assert sorted(p.name for p in (tmp_path / kind).iterdir()) == ["step-0000004", "step-0000005"]


def test_exports_hold_the_averaged_weights(videos, tmp_path):
    t = trainer(videos, tmp_path, "trainer.ema.decay=0.5", "trainer.ema.warmup=false")
    t.fit()
    name = "temporal_vae.quant_conv.conv.weight"
    exported = vae3d.load(tmp_path).state_dict()[name]
    assert torch.equal(exported, t.ema.shadow[name])
    assert not torch.equal(exported, weights(t)[name])


def test_sigterm_saves_and_ends_between_two_steps(videos, tmp_path):
    t = trainer(videos, tmp_path, "trainer.max_steps=50", "trainer.save_every=50")
    step = t.train_step

    def interrupted(*args):
        if t.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    t.train_step = interrupted
    t.fit()
    assert 3 <= t.step <= 5
    assert latest_state(tmp_path / "checkpoints").name == f"step-{t.step:07d}"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert trainer(videos, tmp_path, "trainer.max_steps=50", "trainer.save_every=50").step == t.step


def test_an_export_cut_off_in_the_middle_is_written_again(videos, tmp_path, monkeypatch):
    t = trainer(videos, tmp_path, "trainer.save_every=1")
    with monkeypatch.context() as patch:
        patch.setattr("vae3d.checkpoints.export.yaml_text", lambda *a, **k: 1 / 0)  # as good as a kill
        with pytest.raises(ZeroDivisionError):
            t.export(tmp_path / "exports/step-0000001")
    with pytest.raises(CheckpointError, match=r"no exports/ of a run"):
        vae3d.load(tmp_path)
    t.export(tmp_path / "exports/step-0000001")
    assert vae3d.load(tmp_path).micro_frames == 17


def test_a_part_without_gradient_is_an_error(videos, tmp_path):
    t = trainer(videos, tmp_path, "trainer.robust.preflight=true")
    t.objective.terms = {"kl": t.objective.terms["kl"]}
    with pytest.raises(PartError, match=r"stage.train names parts that no loss term reaches"):
        t.fit()


def test_five_percent_broken_rows_train_through_and_are_listed(videos, tmp_path):
    """Some do not open and are found when the table is read; one is cut off later and found by a worker."""
    rows = pd.concat([pd.read_csv(videos).iloc[:10]] * 4, ignore_index=True)
    rows["path"] = [str(videos.parent / path) for path in rows["path"]]
    for column, values in (
        ("num_frames", [12 + i % 10 for i in range(40)]),
        ("height", 32),
        ("width", 40),
        ("fps", 24.0),
    ):
        rows[column] = values
    rows["num_frames"] = rows["num_frames"].astype(float)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes((videos.parent / "clip5.mp4").read_bytes()[:900])
    rows.loc[3, ["path", "num_frames"]] = [str(tmp_path / "empty.mp4"), np.nan]
    rows.loc[7, "path"] = str(tmp_path / "cut.mp4")
    rows.to_csv(tmp_path / "t.csv", index=False)
    t = trainer(tmp_path / "t.csv", tmp_path / "run", "data.batch_size=8", "trainer.max_steps=6", "data.workers=1")
    t.fit()
    errors = [json.loads(line) for line in (tmp_path / "run/data_errors.jsonl").read_text().splitlines()]
    assert [Path(error["path"]).name for error in errors] == ["empty.mp4", "cut.mp4"]
    assert t.step == 6


def test_too_many_failed_reads_stop_the_run(videos, tmp_path):
    rows = pd.read_csv(videos).iloc[:10]
    rows["path"] = [str(videos.parent / path) for path in rows["path"]]
    rows[["num_frames", "height", "width", "fps"]] = [20, 32, 40, 24.0]
    for i in range(5):
        (tmp_path / f"bad{i}.mp4").write_bytes(b"bad")
        rows.loc[i, "path"] = str(tmp_path / f"bad{i}.mp4")
    rows.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match=r"reads failed, a larger share than data.max_broken=0.2"):
        trainer(tmp_path / "t.csv", tmp_path / "run", "trainer.max_steps=100", "data.batch_size=8").fit()


def test_validation_scores_held_out_clips_with_the_averaged_weights(videos, tmp_path):
    rows = pd.read_csv(videos).assign(split=["train"] * 8 + ["val"] * 4)
    rows["path"] = [str(videos.parent / path) for path in rows["path"]]
    rows.to_csv(tmp_path / "t.csv", index=False)
    t = trainer(
        tmp_path / "t.csv", tmp_path / "run", "validation.every=1", "validation.frames=5", "validation.clips=2",
        "logger=tensorboard", "trainer.ema.decay=0.9", "validation.metrics=[psnr,ssim,tpsnr]",
    )  # fmt: skip
    t.fit()
    assert all(math.isfinite(value) for _, value in trace(tmp_path / "run", "val/tpsnr"))
    scores = trace(tmp_path / "run", "val/psnr")
    assert [step for step, _ in scores] == [0, 1, 2]
    with t.ema.applied(), eval_mode(t.network):
        clip = t.data.held_out[0].to("cpu")
        rec = t.network(clip.video, sample=False).video
    eight = ((rec.clamp(-1, 1) + 1) * 127.5).round() / 255
    mse = (eight - t.data.held_out[0].video / 255).square().mean((0, 1, 3, 4))
    assert t.validate()["val/psnr"] != 0
    expected = (-10 * mse.log10()).mean().item()
    from vae3d.training.vae_validation import validate

    with t.ema.applied(), eval_mode(t.network):
        first = validate(t.network, t.data.held_out, t.metrics, t.device, 1)[0]
    assert first.result.scores["psnr"].value == pytest.approx(expected, abs=1e-3)
    assert {label: video.shape for label, video in first.panels.items()} == dict.fromkeys(
        ("original", "latent", "2D VAE alone", "reconstruction"), (5, 16, 16, 3)
    )
    assert t.network.temporal_vae.encoder.training
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_bf16_autocast_keeps_fp32_weights(videos, tmp_path):
    t = trainer(videos, tmp_path, "trainer.precision=bf16")
    t.fit()
    assert all(p.dtype == torch.float32 for p in t.network.parameters())
    assert all(math.isfinite(loss) for _, loss in trace(tmp_path))


def test_profile_leaves_a_table_and_a_trace(videos, tmp_path):
    images = ["stage=finetune", "stage.init_from=random", "data.frames.min=1", "data.frames.max=1"]
    trainer(videos, tmp_path, "debug=profile", "trainer.max_steps=5", *images, name="spatial").fit()
    assert "aten::" in (tmp_path / "profile.txt").read_text()
    assert json.loads((tmp_path / "profile.json").read_text())["traceEvents"]


class OnePixelCritic(NoAdversary):
    """The smallest adversary: a linear discriminator on one pixel, to hold the seam of the training step."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.updates = 0

    def update_phase(self, step):
        return UpdatePhase(model=step % 2 == 0, discriminator=step % 2 == 1)

    def generator_loss(self, clip, out, recon, step):
        loss = -(out.video[:, :, 0, 0, 0] * self.weight.detach()).mean()
        return loss, {"adversary/generator": loss}

    def discriminator_loss(self, clip, out, step):
        assert not out.video.requires_grad
        loss = ((out.video - clip.video)[:, :, 0, 0, 0] * self.weight).mean()
        return loss, {"adversary/discriminator": loss}

    def average_gradients(self):
        return self.weight.grad.norm()

    def step(self, grad_norm):
        assert grad_norm == self.weight.grad.norm()
        self.updates += 1
        self.weight.grad = None

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]


def test_an_adversary_takes_its_turns_without_touching_the_generator(videos, tmp_path):
    t = trainer(videos, tmp_path, "trainer.max_steps=4", "trainer.save_every=0")
    t.adversary = OnePixelCritic()
    for step in range(4):
        before = weights(t)
        result = t.train_step(next(iter([[clip] for clip in t.data.clips(step, step + 1)])))
        changed = any(not torch.equal(v, before[k]) for k, v in weights(t).items())
        assert changed == (step % 2 == 0)
        assert ("adversary/discriminator" in result.metrics) == (step % 2 == 1)
    assert t.adversary.updates == 2


def test_gradients_are_clipped_unless_grad_clip_is_null(videos, tmp_path):
    """By what is left in them: each update is that of SGD with a rate of 1."""
    moved = {}
    for grad_clip in (0.01, None):
        settings = {"optim.grad_clip": grad_clip, "optim.lr": 1.0, "trainer.max_steps": 1}
        t = quick.trainer(videos, tmp_path / str(grad_clip), **settings)
        t.strategy.optimizer = torch.optim.SGD(t.strategy.parameters, lr=1.0)
        before = [p.detach().clone() for p in t.strategy.parameters]
        result = t.train_step(next(iter([[clip] for clip in t.data.clips(0, 1)])))
        change = [after.detach() - old for after, old in zip(t.strategy.parameters, before, strict=True)]
        moved[grad_clip] = torch.cat([part.flatten() for part in change]).norm().item()
        assert result.metrics["grad_norm"] > 0.02
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3)
    assert moved[None] == pytest.approx(result.metrics["grad_norm"], rel=1e-3)
