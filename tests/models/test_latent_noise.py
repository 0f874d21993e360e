"""Noise on the decoder's input."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.models.test_diffusers_vae import HUNYUAN, TINY
from tests.training import quick
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d.models import interface
from vae3d.models.diffusers_vae import DiffusersVAE
from vae3d.models.interface import add_latent_noise

MODELS = ("spatial", "temporal_vae", "opensora_v1_2", "wan", "wan22", "taehv", "hunyuan")


def model_of(name: str) -> torch.nn.Module:
    if name != "hunyuan":
        return tiny.model(name)
    torch.manual_seed(0)
    return DiffusersVAE(HUNYUAN, TINY)


def generators(*positions: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(position) for position in positions]


def test_noise_is_a_share_of_each_clips_deviation():
    z = torch.randn(3, 8, 2, 16, 16) * torch.tensor([1.0, 5.0, 0.0]).view(3, 1, 1, 1, 1) + 7
    sigma = [torch.rand(1, generator=g) for g in generators(1, 2, 3)]
    error = add_latent_noise(z, 0.5, generators(1, 2, 3)) - z
    for index, scale in enumerate((1.0, 5.0)):
        assert error[index].std().item() == pytest.approx(0.5 * scale * sigma[index].item(), rel=0.05)
        assert error[index].mean().item() == pytest.approx(0, abs=0.05 * scale)
    assert torch.equal(error[2], torch.zeros_like(error[2]))
    assert add_latent_noise(z, 0.0, None) is z
    shares = torch.stack([(add_latent_noise(z[:1], 0.5, generators(i)) - z[:1]).std() / z[0].std() for i in range(200)])
    assert 0.22 < shares.mean() < 0.28  # uniform from 0 to 0.5
    assert shares.max() < 0.52


@pytest.mark.parametrize("name", MODELS)
def test_every_model_decodes_disturbed_latents(name):
    model = model_of(name)
    video = torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        plain = model(video, generator=generators(1, 2))
        off = model(video, generator=generators(1, 2), noise=0.0)
        noisy, again = (model(video, generator=generators(1, 2), noise=0.5) for _ in range(2))
        alone = model(video[1:], generator=generators(2), noise=0.5)
        given = model(video, latents=plain.z, generator=generators(3, 4), noise=0.5)
    assert torch.equal(plain.video, off.video)
    assert torch.equal(noisy.video, again.video)
    assert torch.equal(noisy.z, plain.z)
    assert (noisy.video - plain.video).abs().max() > 1e-4
    torch.testing.assert_close(alone.video, noisy.video[1:], rtol=0, atol=1e-4)  # processors round batches differently
    expected = model.decode(add_latent_noise(plain.z, 0.5, generators(3, 4)), 5)
    torch.testing.assert_close(given.video, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["spatial", "temporal_vae", "wan", "taehv"])
def test_the_encoder_still_learns(name):
    model = tiny.model(name)
    model(torch.rand(1, 3, 5, 16, 16), noise=0.5).video.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_larger_latents_are_no_way_out():
    """Scaling latents does not change the relative noise, so its gradient with respect to the scale is zero."""
    scale = torch.tensor(3.0, requires_grad=True)
    z = torch.randn(2, 4, 1, 8, 8)
    (add_latent_noise(z * scale, 0.5, generators(1, 2)) / scale).square().sum().backward()
    assert scale.grad.abs() < 1e-3


def test_training_has_noise_and_validation_none(videos, tmp_path, monkeypatch):
    noises = []
    monkeypatch.setattr(
        interface,
        "add_latent_noise",
        lambda z, noise, generator: noises.append(noise) or add_latent_noise(z, noise, generator),
    )
    settings = {"stage.latent_noise": 0.4, "validation.every": 2, "validation.frames": 1, "validation.clips": 1}
    t = quick.trainer(videos, tmp_path, **settings)
    noises.clear()  # of the check's own pass
    clips = t.data.clips(0, 1)
    t.train_step([next(clips)])
    assert noises == [0.4]
    assert len(t.validate_clips(t.metrics)) == 1
    assert noises == [0.4, 0.0]


def test_noise_is_a_function_of_seed_and_position(videos, tmp_path):
    runs = [
        quick.trainer(videos, tmp_path / str(run), **{"stage.latent_noise": noise, "trainer.save_every": 0})
        for run, noise in enumerate((0.4, 0.4, 0.0))
    ]
    for t in runs:
        t.fit()
    first, second, without = (t.network.state_dict() for t in runs)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, without[name]) for name, tensor in first.items())
