"""An image VAE with a linear path beside its networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import tiny
from vae3d.checkpoints.export import WRITERS
from vae3d.checkpoints.formats import Checkpoint, CheckpointError
from vae3d.commands import train
from vae3d.models.registry import config_of
from vae3d.models.spatial import SpatialVAE
from vae3d.training.linear_code import fit_shortcut
from vae3d.types import ClipBatch


def model(latents: int, **changes: object) -> SpatialVAE:
    """f4."""
    size = {"channels": (8, 8, 8), "layers": 1, "groups": 4, "attention": False}
    return SpatialVAE(**{**size, "latent_channels": latents, "shortcut": True, **changes}).eval()


def images(count: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, 1, 16, 16, generator=generator) * 2 - 1


@torch.no_grad()
def through(vae: SpatialVAE, video: Tensor) -> Tensor:
    return vae.decode(vae.encode(video).mean)


def test_with_three_latents_it_starts_as_the_mean_colour_of_patches():
    video = images()
    means = torch.nn.functional.avg_pool2d(video[:, :, 0], 4)
    assert torch.allclose(model(3).encode(video).mean[:, :, 0], means, atol=1e-6)
    assert torch.allclose(
        through(model(3), video)[:, :, 0], means.repeat_interleave(4, 2).repeat_interleave(4, 3), atol=1e-6
    )


@pytest.mark.parametrize("quant_convs", [True, False])
def test_with_as_many_latents_as_pixels_it_starts_as_the_identity(quant_convs):
    video = torch.cat([images(), images()], 2)
    vae = model(48, quant_convs=quant_convs)
    assert torch.allclose(through(vae, video), video, atol=1e-5)
    assert vae.encode(video).logvar.max() < -5


def test_sides_that_are_no_multiple_of_the_stride_are_padded():
    vae, video = model(48), images()[..., :14, :15]
    assert torch.allclose(through(vae, video)[..., :14, :15], video, atol=1e-5)


def test_fitted_it_keeps_what_the_images_hold():
    basis = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    codes = torch.randn(8, 16, 5, generator=torch.Generator().manual_seed(2)) * 0.1
    patches = (codes @ basis).view(8, 4, 4, 3, 4, 4)  # of five dimensions
    video = patches.permute(0, 3, 1, 4, 2, 5).reshape(8, 3, 1, 16, 16)
    vae = model(5)
    clips = [ClipBatch(clip[None], torch.tensor([i]), [str(i)]) for i, clip in enumerate(video)]
    assert (through(vae, video) - video).square().mean() > 0.1 * video.var()
    assert "100.00%" in fit_shortcut(vae, clips)
    assert torch.allclose(through(vae, video), video, atol=1e-3)


def test_a_run_trains_both_ends_of_it(videos, tmp_path):
    config = tiny.training(
        "spatial", videos, "model.shortcut=true", "stage=finetune", "stage.init_from=random", "stage.fit_shortcut=2",
        "loss=recon_kl", "data.frames.min=1", "data.frames.max=1",
    )  # fmt: skip
    trainer = train.build_trainer(config, tmp_path / "run")
    before = [p.detach().clone() for p in (trainer.network.shortcut_in.weight, trainer.network.shortcut_out.weight)]
    assert trainer.fit()
    assert not torch.equal(before[0], trainer.network.shortcut_in.weight)
    assert not torch.equal(before[1], trainer.network.shortcut_out.weight)


@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
def test_layouts_of_published_networks_refuse_it(layout, tmp_path):
    vae = model(4)
    with pytest.raises(CheckpointError, match="shortcut"):
        WRITERS[layout](Checkpoint(config_of(vae), vae.state_dict(), tmp_path, "export"), tmp_path / "out.safetensors")
