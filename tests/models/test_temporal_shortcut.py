"""A temporal VAE that starts from the trivial code, on any VAE of single frames."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vae3d
from tests import tiny
from vae3d.checkpoints.export import WRITERS
from vae3d.checkpoints.formats import Checkpoint, CheckpointError
from vae3d.commands import train
from vae3d.models.opensora import OpenSoraVAE
from vae3d.models.registry import config_of
from vae3d.models.taehv import TAEHV
from vae3d.models.taesd import TAESD
from vae3d.models.temporal import TemporalVAE

SMALL = {"channels": 8, "multipliers": (1, 1), "downsample": (True,), "layers": 1, "groups": 4}


def temporal(latents: int, **changes: object) -> TemporalVAE:
    return TemporalVAE(in_channels=4, latent_channels=latents, **{**SMALL, **changes}, shortcut=True).eval()


def clip(frames: int) -> Tensor:
    return torch.randn(2, 4, frames, 3, 5, generator=torch.Generator().manual_seed(frames))


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_it_starts_as_the_mean_of_frames(frames):
    x = clip(frames)
    model = temporal(4)
    posterior = model.encode(x)
    missing = frames % 2
    padded = torch.cat([x[:, :, :1]] * missing + [x], 2)
    means = (padded[:, :, ::2] + padded[:, :, 1::2]) / 2
    assert torch.allclose(posterior.mean, means, atol=1e-6)
    assert posterior.logvar.max() < -5
    repeated = means.repeat_interleave(2, 2)[:, :, missing:]
    assert torch.allclose(model.decode(posterior.mean, frames), repeated, atol=1e-6)


def test_with_as_many_latents_as_numbers_it_starts_as_the_identity():
    x = clip(6)
    model = temporal(8)
    assert torch.allclose(model.decode(model.encode(x).mean, 6), x, atol=1e-6)


def test_every_part_learns_from_there():
    model = temporal(4).train()
    x = clip(6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    losses = []
    for _ in range(20):
        loss = (model.decode(model.encode(x).mean, 6) - x).abs().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_latents_that_do_not_divide_the_frames_are_refused():
    with pytest.raises(ValueError, match="latent_channels, 3"):
        temporal(3)


def test_a_vae_of_single_frames_serves_as_spatial():
    spatial = TAESD(variant="taesd")
    model = OpenSoraVAE(spatial, temporal(8)).eval()
    video = torch.rand(1, 3, 6, 19, 24) * 2 - 1
    with torch.no_grad():
        out = model(video, sample=False)
        assert torch.allclose(out.video, spatial(video).video, atol=1e-4)  # its latents pass through
    assert (model.spec.time_stride, model.spec.space_stride, model.spec.channels) == (2, 8, 8)
    again = vae3d.loading.build_model(config_of(model), "x")
    assert isinstance(again.spatial_vae, TAESD)


@pytest.mark.parametrize(
    ("spatial", "word"),
    [
        (lambda: TAEHV(variant="taew2_1", channels=8, decoder_channels=(16, 8, 8, 8)), "compresses time"),
        (lambda: TAESD(variant="taef1"), "in_channels is 4"),
    ],
)
def test_another_spatial_vae_is_refused(spatial, word):
    with pytest.raises(ValueError, match=word):
        OpenSoraVAE(spatial(), temporal(8))


def test_the_original_code_opens_the_published_network_only(tmp_path):
    model = OpenSoraVAE(TAESD(variant="taesd"), temporal(8))
    checkpoint = Checkpoint(config_of(model), model.state_dict(), tmp_path, "export")
    with pytest.raises(CheckpointError, match="spatial _target_"):
        WRITERS["opensora"](checkpoint, tmp_path / "out")


def test_stage_1_trains_it_in_the_latents_of_taef2(videos, tmp_path):
    config = tiny.training(
        "temporal_taef2", videos, "stage=stage1", "stage.init_from=random", "data.frames.min=5",
        "data.frames.max=5", "data.frames.images=0",
    )  # fmt: skip
    trainer = train.build_trainer(config, tmp_path / "run")
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    assert trainer.fit()
    moved = {name.split(".")[0] for name, p in trainer.network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"temporal_vae"}
    assert vae3d.load(tmp_path / "run").temporal_vae.shortcut
