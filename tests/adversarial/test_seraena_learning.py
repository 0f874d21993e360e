"""Seraena on a toy: blurred noise, and a generator that can sharpen it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.adversarial import toy


@pytest.mark.parametrize("settings", [{}, {"norm": "group"}, {"context": "nearest", "frames": 1}], ids=str)
def test_the_discriminator_tells_sharp_from_blurred_and_its_corrections_sharpen(settings):
    """A generator with one parameter, the share of lost detail that it restores: 0 is blurred, 1 is the clip."""
    adversary = toy.seraena(lr=2e-3, buffer_length=200, **settings)
    detail = torch.tensor(0.3, requires_grad=True)
    gaps, details = [], []
    alone = 130 if settings.get("norm") == "group" else 60  # steps of the discriminator, which learns slower so
    for step in range(alone + 60):
        clip, out = toy.pair(seed=step, batch=4, frames=3)
        blurred = toy.blur(clip.video)
        out.video = blurred + detail * (clip.video - blurred)
        loss, metrics = adversary.generator_loss(clip, out, F.mse_loss(out.video, clip.video), step)
        if step >= alone:
            (gradient,) = torch.autograd.grad(loss, detail)
            detail.data -= 0.2 * gradient
        adversary.discriminator_loss(clip, out, step)[0].backward()
        adversary.step(float(adversary.average_gradients()))
        gaps.append(metrics["seraena/score_gap"].item())
        details.append(detail.item())
    assert abs(gaps[0]) < 0.1
    assert sum(gaps[alone - 10 : alone]) / 10 > 1
    assert sum(details[-10:]) / 10 == pytest.approx(1.0, abs=0.1)
    assert abs(sum(gaps[-10:]) / 10) < 0.1
