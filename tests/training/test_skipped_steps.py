"""Steps whose loss or gradient is not finite: skipped by all ranks, without a trace in the weights."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from tests.training.test_trainer import fresh_accelerate, trainer, weights  # noqa: F401
from vae3d.training.failures import SpikeError


def test_a_step_that_is_not_finite_changes_nothing(videos, tmp_path):
    t = trainer(videos, tmp_path, "trainer.max_steps=3", "trainer.save_every=0")
    clips = list(t.data.clips(0, 2))
    t.train_step(clips[:1])
    before, ema = weights(t), {k: v.clone() for k, v in t.ema.shadow.items()}
    bad = clips[1].to("cpu")
    bad.video[0, 0, 0, 0, 0] = math.nan
    assert not t.train_step([bad]).applied
    assert all(torch.equal(v, before[k]) for k, v in weights(t).items())
    assert all(torch.equal(v, ema[k]) for k, v in t.ema.shadow.items())
    assert all(p.grad is None or not p.grad.any() for p in t.network.parameters())
    assert t.step == 2
    assert t.train_step([clips[1]]).applied


def scaled(t, fused=False):
    """The loss scaler that `t` is given: a CPU's in place of the GPU's, whose state machine is the same."""
    t.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    t.accelerator.state._mixed_precision = "fp16"
    t.accelerator.native_amp = True
    optimizer = torch.optim.AdamW([{**group, "fused": fused} for group in t.optimizer.param_groups], fused=fused)
    t.strategy.optimizer = AcceleratedOptimizer(optimizer, scaler=scaler)
    t.accelerator._optimizers = [t.optimizer]
    return scaler


@pytest.mark.parametrize("fused", [False, True])
def test_the_fp16_scaler_survives_steps_that_are_not_finite(videos, tmp_path, fused):
    t = trainer(videos, tmp_path, "trainer.max_steps=9", "trainer.save_every=0")
    scaler = scaled(t, fused)
    sound, bad, overflow, again = (clip.to("cpu") for clip in t.data.clips(0, 4))
    assert t.train_step([sound]).applied
    before, ema = weights(t), {k: v.clone() for k, v in t.ema.shadow.items()}

    bad.video[0, 0, 0, 0, 0] = math.nan  # the loss is NaN: all skip the step before the scaler hears of it
    assert not t.train_step([bad]).applied
    assert scaler.get_scale() == 4.0

    hook = t.network.temporal_vae.quant_conv.conv.weight.register_hook(lambda grad: grad * math.inf)
    assert not t.train_step([overflow]).applied  # only the scaled gradient is: the scaler skips it
    hook.remove()
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(v, before[k]) for k, v in weights(t).items())
    assert all(torch.equal(v, ema[k]) for k, v in t.ema.shadow.items())
    assert t.train_step([again]).applied


def test_fp16_gradients_that_overflow_without_scaling_stop_the_run(videos, tmp_path):
    t = trainer(
        videos, tmp_path, "trainer.max_steps=9", "trainer.save_every=0", "trainer.spike.max_consecutive_skips=2"
    )
    scaler = scaled(t)
    t.network.temporal_vae.quant_conv.conv.weight.register_hook(lambda grad: grad * math.inf)
    clips = [clip.to("cpu") for clip in t.data.clips(0, 4)]
    for clip in clips[:3]:  # at 4, 2 and, of two that are counted, at 1
        assert not t.train_step([clip]).applied
    with pytest.raises(SpikeError, match="2 steps in a row were skipped"):
        t.train_step(clips[3:])
    assert scaler.get_scale() == 0.25


def test_nothing_but_steps_that_are_not_finite_stop_the_run(videos, tmp_path):
    t = trainer(videos, tmp_path, "trainer.max_steps=9", "trainer.spike.max_consecutive_skips=2")
    with torch.no_grad():
        t.network.temporal_vae.quant_conv.conv.weight.fill_(math.inf)
    with pytest.raises(SpikeError, match="2 steps in a row were skipped"):
        t.fit()
