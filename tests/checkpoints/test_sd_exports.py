"""What a run with a 2D VAE leaves opens in diffusers, and goes to latent-diffusion's keys and back, at every size."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL as Reference
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file

import vae3d
from tests import tiny
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.loading import model_config

# stride, latent channels, quant convolutions, attention
SIZES = [
    (4, 4, True, True),
    (8, 4, True, True),
    (8, 4, True, False),
    (8, 16, False, True),
    (16, 16, False, False),
    (16, 32, True, True),
]


def network(stride: int, channels: int, quant_convs: bool, attention: bool, groups: int = 32) -> list[str]:
    levels = {4: [32, 32, 64], 8: [32, 32, 64, 64], 16: [32, 32, 32, 64, 64]}[stride]
    return [
        f"model.channels={levels}", "model.layers=1", f"model.latent_channels={channels}", f"model.groups={groups}",
        f"model.quant_convs={quant_convs}", f"model.attention={attention}", "model.scaling_factor=0.4",
        "+model.shift_factor=0.05",
    ]  # fmt: skip


def run_of(overrides: list[str], folder) -> torch.nn.Module:
    """A run's folder with an export of random weights."""
    torch.manual_seed(0)
    model = vae3d.build("spatial", *overrides)
    config = model_config("spatial", *overrides)
    write_export(Checkpoint(config, model.state_dict(), folder, "export"), folder / "exports/step-0000005", step=5)
    return model


def convert(*arguments: object) -> int:
    return tiny.status("convert", *arguments)


@pytest.mark.parametrize("size", SIZES)
def test_a_run_opens_in_diffusers_and_reconstructs_equally(tmp_path, size):
    ours = run_of(network(*size, groups=8), tmp_path / "run")
    assert convert(tmp_path / "run", tmp_path / "vae", "--to", "diffusers") == 0
    theirs, info = Reference.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (theirs.config.scaling_factor, theirs.config.shift_factor) == (0.4, 0.05)
    images = torch.rand(2, 3, 32, 48, generator=torch.manual_seed(1)) * 2 - 1
    with torch.no_grad():
        z = theirs.encode(images).latent_dist.mode()
        out = ours(images[:, :, None], sample=False)
        assert z.shape[1:] == (size[1], 32 // size[0], 48 // size[0])
        # ours run channels-last, where convolutions sum in another order
        torch.testing.assert_close(out.z[:, :, 0], z, rtol=0, atol=2e-5)
        torch.testing.assert_close(out.video[:, :, 0], theirs.decode(z).sample, rtol=0, atol=2e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("size", SIZES)
def test_latent_diffusions_layout_round_trips_and_is_what_diffusers_takes_it_for(tmp_path, size, suffix):
    ours = run_of(network(*size), tmp_path / "run")
    file = tmp_path / f"vae{suffix}"
    assert convert(tmp_path / "run", file, "--to", "ldm") == 0
    state = load_file(file) if suffix == ".safetensors" else torch.load(file, weights_only=True)["state_dict"]
    assert {key.partition(".")[0] for key in state} <= {"encoder", "decoder", "quant_conv", "post_quant_conv"}
    assert ("quant_conv.weight" in state) == size[2]
    levels = len(ours.module.encoder.down_blocks)
    if size[2] and size[3]:  # diffusers looks for these without asking
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        theirs = convert_ldm_vae_checkpoint(dict(state), blocks)
        inner = vae3d.load(file).module.state_dict()
        assert theirs.keys() == inner.keys()
        assert all(torch.equal(theirs[key].reshape(tensor.shape), tensor) for key, tensor in inner.items())
    again, before = vae3d.load(file), ours.state_dict()
    after = again.state_dict()
    assert after.keys() == before.keys()
    folded = {f"module.{name}quant_conv.{kind}" for name in ("", "post_") for kind in ("weight", "bias")}
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor) or key in folded, key
    assert again.spec.space_stride == size[0]


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        (["model.scaling_factor=0.4"], "scale_factor=0.4"),
        (["model.scaling_factor=0.4", "+model.shift_factor=0.3"], "scale_factor=0.4"),
        (["model.scaling_factor=[0.5,2,1,0.1]", "+model.shift_factor=[1,0,-2,0.3]"], "scale_factor=1.0"),
    ],
)
def test_latent_diffusions_one_factor_gives_the_same_normalized_latents(tmp_path, capsys, factors, expected):
    """Its readers multiply by scale_factor and know no shift."""
    network = ["model.channels=[32,32]", "model.layers=1", *factors]
    ours = run_of(network, tmp_path / "run")
    assert convert(tmp_path / "run", tmp_path / "vae.safetensors", "--to", "ldm") == 0
    assert f"set {expected} " in capsys.readouterr().err
    theirs = vae3d.load(tmp_path / "vae.safetensors")
    video = torch.rand(1, 3, 2, 16, 16, generator=torch.manual_seed(1)) * 2 - 1
    with torch.no_grad():
        z, w = ours.encode(video), theirs.encode(video)
        scale = float(expected.split("=")[1])
        torch.testing.assert_close(w.mean * scale, ours.normalize(z.mean), rtol=1e-4, atol=1e-5)
        std = (0.5 * z.logvar).exp() / torch.tensor(ours.spec.latents_std)[:, None, None, None]
        torch.testing.assert_close((0.5 * w.logvar).exp() * scale, std, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs.decode(w.mean), ours.decode(z.mean), rtol=1e-4, atol=1e-5)


def test_a_shift_per_channel_without_quant_convolutions_is_refused(tmp_path, capsys):
    network = ["model.channels=[32,32]", "model.layers=1", "model.quant_convs=false", "model.scaling_factor=0.3611"]
    run_of([*network, "+model.shift_factor=[1,0,-2,0.3]"], tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "a.safetensors", "--to", "ldm") == 2
    assert "factor per channel and no quant convolutions" in capsys.readouterr().err
    run_of([*network, "+model.shift_factor=0.1159"], tmp_path / "b")  # as FLUX.1's code takes it
    assert convert(tmp_path / "b", tmp_path / "b.safetensors", "--to", "ldm") == 0
    assert "set scale_factor=0.3611 and shift_factor=0.1159" in capsys.readouterr().err


def test_latent_diffusion_would_compute_something_else_of_other_groups(tmp_path, capsys):
    run_of(network(8, 4, True, True, groups=8), tmp_path / "run")
    assert convert(tmp_path / "run", tmp_path / "vae.safetensors", "--to", "ldm") == 2
    assert "normalises in 8 groups and latent-diffusion's code in 32" in capsys.readouterr().err
    assert not (tmp_path / "vae.safetensors").exists()
