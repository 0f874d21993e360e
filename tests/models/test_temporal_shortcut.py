"""A temporal VAE that starts from the trivial code, on any VAE of single frames."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vae3d
from tests import tiny
from vae3d import distributed
from vae3d.checkpoints.export import WRITERS
from vae3d.checkpoints.formats import Checkpoint, CheckpointError
from vae3d.commands import train
from vae3d.config.issues import ConfigError
from vae3d.data.media import DataError
from vae3d.errors import UserError
from vae3d.latents.scale import pixel_effect
from vae3d.models.opensora import OpenSoraVAE
from vae3d.models.registry import config_of
from vae3d.models.taehv import TAEHV
from vae3d.models.taesd import TAESD
from vae3d.models.temporal import TemporalVAE
from vae3d.seeding import seed_of
from vae3d.training.linear_code import fit_shortcut
from vae3d.training.vae_trainer import VaeTrainer
from vae3d.types import ClipBatch

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


def test_with_latents_for_half_of_the_frequencies_it_keeps_the_lower_half():
    model = temporal(8, multipliers=(1, 1, 1), downsample=(True, True))
    steady = torch.linspace(0, 1, 8).view(1, 1, 8, 1, 1).expand(1, 4, 8, 3, 5)
    rapid = torch.tensor([1.0, -1.0] * 4).view(1, 1, 8, 1, 1).expand(1, 4, 8, 3, 5)

    def error(x: Tensor) -> float:
        return (model.decode(model.encode(x).mean, 8) - x).square().mean().item()

    assert error(steady) < 1e-3 < 0.5 < error(rapid)


@pytest.mark.parametrize("latents", [3, 20])
def test_any_number_of_latents_is_possible(latents):
    x = clip(6)
    model = temporal(latents)
    assert model.decode(model.encode(x).mean, 6).shape == x.shape


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


def fitted(spatial: TAESD, latents: int, clips: list[ClipBatch]) -> tuple[OpenSoraVAE, str]:
    model = OpenSoraVAE(spatial, temporal(latents))
    return model, fit_shortcut(model, clips)


def batches(count: int) -> list[ClipBatch]:
    generator = torch.Generator().manual_seed(0)
    videos = torch.rand(count, 1, 3, 5, 16, 16, generator=generator) * 2 - 1
    return [ClipBatch(video, torch.tensor([i]), [str(i)]) for i, video in enumerate(videos)]


def test_a_fitted_shortcut_is_the_principal_components_in_pixels():
    """By hand: whitened latents, and the error that the discarded components leave."""
    torch.manual_seed(0)
    spatial, clips = TAESD(variant="taesd"), batches(6)
    model, line = fitted(spatial, 3, clips)
    with torch.no_grad():
        groups = torch.cat([model.temporal_vae.frame_groups(model.encode_spatial(clip.video)) for clip in clips])
        z = torch.cat([model.encode(clip.video).mean for clip in clips])
    rows = groups.transpose(0, 1).flatten(1).double()
    z = z.transpose(0, 1).flatten(1).double()
    assert torch.allclose(z.mean(1), torch.zeros(3, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(z @ z.T / z.shape[1], torch.eye(3, dtype=torch.float64), atol=1e-3)

    effect = torch.zeros(4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed_of(0, "linear code"))
    for clip in clips:
        middle = model.encode_spatial(clip.video)[:, :, 2:3].detach().requires_grad_()
        video = model.decode_spatial(middle)
        (video * torch.randn(video.shape, generator=generator)).sum().backward()
        effect += middle.grad.double().square().mean((0, 2, 3, 4))
    scaled = (rows - rows.mean(1, keepdim=True)) * effect.sqrt().repeat_interleave(2)[:, None]
    variances = torch.linalg.svdvals(scaled) ** 2
    kept = (variances[:3].sum() / variances.sum()).item()
    assert f"{kept:.2%}" in line


def test_with_all_components_a_fitted_shortcut_is_the_identity():
    torch.manual_seed(0)
    spatial, clips = TAESD(variant="taesd"), batches(8)
    model, line = fitted(spatial, 8, clips)
    with torch.no_grad():
        out = model(clips[0].video, sample=False)
        assert torch.allclose(out.spatial.latent_rec, out.spatial.latent, atol=1e-3)
    assert "100.00%" in line


def test_a_shortcut_cannot_be_fitted_to_nothing():
    with pytest.raises(UserError, match="no clip"):
        fitted(TAESD(variant="taesd"), 4, [])


def test_weights_that_are_not_finite_are_refused():
    spatial = TAESD(variant="taesd")
    torch.nn.init.constant_(spatial.decoder[-1].weight, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        fitted(spatial, 4, batches(1))


def test_the_effect_on_pixels_of_a_linear_decoder_is_its_weights():
    weight = torch.randn(3, 4, 1, 1, 1)
    z = torch.zeros(2, 4, 50, 8, 8)
    generator = torch.Generator().manual_seed(0)
    effect = pixel_effect(lambda z: torch.nn.functional.conv3d(z, weight), z, generator)
    assert torch.allclose(effect.float(), weight.square().sum((0, 2, 3, 4)), rtol=0.1)


FIT = [
    "stage=stage2", "stage.init_from=random", "stage.fit_shortcut=2", "data.frames.min=5", "data.frames.max=5",
    "data.frames.images=0", "loss=latent_mse",
]  # fmt: skip


def test_a_run_fits_the_shortcut_before_step_1_and_not_when_it_resumes(videos, tmp_path):
    def build(steps: int) -> VaeTrainer:
        changes = ["trainer.save_every=1", f"trainer.max_steps={steps}"]
        return train.build_trainer(tiny.training("temporal_taef2", videos, *FIT, *changes), tmp_path / "run")

    first = build(1)
    code = first.network.temporal_vae.shortcut_in.weight.detach().clone()
    start = TemporalVAE(**{k: v for k, v in first.config.model["temporal"].items() if k != "_target_"})
    assert not torch.allclose(code, start.shortcut_in.weight)
    assert first.fit()
    trained = first.network.temporal_vae.shortcut_in.weight.detach().clone()
    assert not torch.equal(trained, code)
    again = build(2)
    assert torch.equal(again.network.temporal_vae.shortcut_in.weight, trained)


def test_a_fit_without_clips_fails_on_every_rank(videos, tmp_path, monkeypatch):
    """The others wait for the first rank's result, which may be that no clip can be read."""

    def none(*_):
        raise DataError("no clip")

    sent = []
    monkeypatch.setattr(train, "longest_clips", none)
    monkeypatch.setattr(distributed, "broadcast_object", lambda found: (sent.append(found), found)[1])
    with pytest.raises(DataError, match="no clip"):
        train.build_trainer(tiny.training("temporal_taef2", videos, *FIT), tmp_path)
    assert "no clip" in str(sent)


def test_a_shortcut_is_fitted_only_where_there_is_one(videos):
    with pytest.raises(ConfigError, match=r"stage\.fit_shortcut=2: needs .*shortcut"):
        tiny.training("temporal_taef2", videos, *FIT, "model.temporal.shortcut=false", meta_check=True)
    with pytest.raises(ConfigError, match=r"stage\.fit_shortcut=2: .*optim\.proximal"):
        tiny.training("temporal_taef2", videos, *FIT, "optim.proximal=0.1", meta_check=True)


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
