"""The pull towards the weights of the start: its gradient, its anchor across a resume, its place in the step."""

from __future__ import annotations

import shutil

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from tests.training.quick import trainer
from tests.training.test_trainer import fresh_accelerate, trace, weights  # noqa: F401
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.checkpoints.state import ResumeError, latest_state, load_state
from vae3d.training.proximal import Proximal


@pytest.fixture
def start(videos, tmp_path):
    """Settings of a run that is pulled towards the export in tmp_path/start."""
    t = trainer(videos, tmp_path / "first")
    write_export(Checkpoint(t.config.model, t.network.state_dict(), tmp_path, ""), tmp_path / "start")
    return {"stage.init_from": str(tmp_path / "start"), "optim.proximal": 50.0}


def drifted() -> tuple[torch.nn.Module, Proximal]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[2].requires_grad_(False)
    proximal = Proximal(model, weight=0.3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model, proximal


def test_gradient_and_value_are_those_of_the_sum_over_trainable_parameters():
    model, proximal = drifted()
    torch.manual_seed(0)
    before = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3), torch.nn.Linear(4, 4))
    pairs = list(zip(model[:2].parameters(), before.parameters(), strict=True))
    term = 0.3 * sum((p - p0.detach()).square().sum() for p, p0 in pairs)
    (term + sum(p.sum() for p, _ in pairs)).backward()
    expected = [p.grad for p, _ in pairs]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    proximal.add_gradient()
    for (p, _), gradient in zip(pairs, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=0, atol=1e-6)
    assert torch.equal(model[2].weight.grad, torch.ones(4, 4))
    assert proximal.value().item() == pytest.approx(term.item(), rel=1e-6)


def test_one_weight_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
        proximal = Proximal(model, weight=1e-4)
        model.weight.fill_(5.0)
    proximal.add_gradient()  # no gradient yet: nothing to pull
    assert model.weight.grad is None
    model.weight.grad = torch.ones(1, 1)
    proximal.add_gradient()
    assert model.weight.grad.item() == pytest.approx(1.0 + 2 * 1e-4 * 3.0)
    assert proximal.value().item() == pytest.approx(1e-4 * 9.0)


def test_without_weight_there_is_no_anchor():
    off = Proximal(torch.nn.Linear(2, 2), weight=0.0)
    off.add_gradient()
    assert (off.anchor, off.digest) == ({}, None)


def test_the_digest_differs_between_anchors():
    model, proximal = drifted()
    assert proximal.digest == drifted()[1].digest
    assert Proximal(model, weight=0.3).digest != proximal.digest
    assert len(proximal.digest) == 64


def test_the_anchor_survives_a_resume(videos, tmp_path, start):
    """2 + 2 steps are 4, bit for bit, and what the second start was pulled to is not where the first one ended."""
    four = {**start, "trainer.max_steps": 4}
    whole = trainer(videos, tmp_path / "whole", **four)
    whole.fit()
    trainer(videos, tmp_path / "parts", **start).fit()
    resumed = trainer(videos, tmp_path / "parts", **four)
    assert all(torch.equal(a, whole.proximal.anchor[name]) for name, a in resumed.proximal.anchor.items())
    resumed.fit()
    a, b = (load_state(latest_state(tmp_path / run / "checkpoints")) for run in ("whole", "parts"))
    assert a["proximal"]["anchor"] == b["proximal"]["anchor"] == whole.proximal.digest
    torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
    pulls = trace(tmp_path / "parts", "prox")
    assert pulls == trace(tmp_path / "whole", "prox")
    assert 0 < pulls[0][1] < pulls[1][1]

    free = trainer(videos, tmp_path / "free", **{**four, "optim.proximal": 0.0})
    free.fit()
    expected = weights(whole)
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in weights(free).items())
    assert trace(tmp_path / "free", "prox") == []


def test_a_resume_is_refused_when_the_file_of_the_start_has_changed(videos, tmp_path, start):
    trainer(videos, tmp_path / "run", **start).fit()
    shutil.copytree(tmp_path / "start", tmp_path / "copy")
    moved = {**start, "stage.init_from": str(tmp_path / "copy")}
    again = trainer(videos, tmp_path / "run", **moved)  # the same weights elsewhere are the same anchor
    assert again.step == 2
    again.log.close()
    t = trainer(videos, tmp_path / "other", **{"run.seed": 9})
    write_export(Checkpoint(t.config.model, t.network.state_dict(), tmp_path, ""), tmp_path / "start")
    with pytest.raises(ResumeError, match=r"optim\.proximal.* stage\.init_from.*SHA-256"):
        trainer(videos, tmp_path / "run", **start)
    assert trainer(videos, tmp_path / "run", **{**start, "optim.proximal": 0.0}).step == 2


def test_random_weights_are_an_anchor_too(videos, tmp_path):
    trainer(videos, tmp_path, **{"optim.proximal": 0.1}).fit()
    assert trainer(videos, tmp_path, **{"optim.proximal": 0.1}).step == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_pull_is_added_once_after_unscaling(videos, tmp_path, start, accumulate):
    """A loss scaler that multiplies by a power of two changes no bit, with accumulated micro-batches as without."""
    common = {**start, "trainer.accumulate": accumulate, "trainer.save_every": 0, "optim.grad_clip": 0.5}
    plain, scaled = (trainer(videos, tmp_path / name, **common) for name in ("plain", "scaled"))
    scaled.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10)
    scaled.accelerator.state._mixed_precision = "fp16"
    scaled.accelerator.native_amp = True
    scaled.strategy.optimizer = AcceleratedOptimizer(scaled.optimizer.optimizer, scaler=scaler)
    scaled.accelerator._optimizers = [scaled.optimizer]
    for t in (plain, scaled):
        clips = list(t.data.clips(0, 2))
        for first in range(0, 2 * accumulate, accumulate):
            assert t.train_step(clips[first : first + accumulate]).applied
    torch.testing.assert_close(weights(scaled), weights(plain), rtol=0, atol=0)
