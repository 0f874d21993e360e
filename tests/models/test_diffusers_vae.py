"""VAEs of diffusers: recognised by config.json, equal to diffusers, for any number of frames and any size."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import vae3d
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import CheckpointError, read_checkpoint
from vae3d.errors import UserError
from vae3d.io import FileError
from vae3d.models.diffusers_vae import DiffusersVAE
from vae3d.models.interface import VideoAutoencoder

KINDS = COGVIDEOX, HUNYUAN = "AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo"
TINY = {"block_out_channels": [8, 8, 8, 8], "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def clip(frames: int, height: int = 16, width: int = 8, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of tiny models with random weights, by kind, as a pipeline has them."""
    folders = {}
    for kind in KINDS:
        torch.manual_seed(0)
        folders[kind] = tmp_path_factory.mktemp(kind)
        getattr(diffusers, kind)(**TINY).eval().save_pretrained(folders[kind] / "vae")
    return folders


@pytest.fixture(scope="module", params=KINDS)
def pair(request, saved):
    theirs = getattr(diffusers, request.param).from_pretrained(saved[request.param] / "vae", local_files_only=True)
    return vae3d.load(saved[request.param]), theirs.eval()


def test_a_pipeline_or_its_vae_is_loaded_and_keeps_the_protocol(saved, pair):
    ours, _ = pair
    assert isinstance(ours, DiffusersVAE)
    assert isinstance(ours, VideoAutoencoder)
    assert not ours.training
    direct = vae3d.load(saved[ours.kind] / "vae")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), direct.parameters(), strict=True))
    assert (ours.spec.channels, ours.spec.time_stride, ours.spec.space_stride) == (4, 4, 8)
    members = [id(p) for modules in ours.trainable_parts().values() for module in modules for p in module.parameters()]
    assert sorted(members) == sorted(id(p) for p in ours.parameters())
    assert ours.stream(16, 16).chunks(50) == ([8] * 6 + [2] if ours.kind == COGVIDEOX else [50])
    assert [len(weight) for weight in ours.last_layers()] == [3]


@torch.no_grad()
def test_valid_frames_are_those_that_diffusers_gives_back(pair):
    """diffusers returns other clips with another number of frames: CogVideoX 12 as 9 and 13 as 16."""
    ours, theirs = pair
    for frames in range(1, 22):
        video = clip(frames, 8, 8)
        posterior = theirs.encode(video).latent_dist
        pixels = theirs.decode(posterior.mode()).sample
        assert ours.frames_valid(frames) == (pixels.shape[2] == frames), frames
        if not ours.frames_valid(frames):
            continue
        found = ours.encode(video)
        torch.testing.assert_close(found.mean, posterior.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.logvar, posterior.logvar, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.decode(posterior.mode()), pixels, rtol=0, atol=1e-6)
    valid = [frames for frames in range(1, 22) if ours.frames_valid(frames)]
    assert valid == ([1, 8, 9, 16, 17] if ours.kind == COGVIDEOX else [1, 5, 9, 13, 17, 21])


@torch.no_grad()
def test_any_number_of_frames_and_any_size_go_in_and_come_out(pair):
    ours, theirs = pair
    for frames in (1, 2, 7, 8, 10, 12, 13, 18):
        video = clip(frames, 13, 17)
        out = ours(video, sample=False)
        full = next(n for n in range(frames, 99) if ours.frames_valid(n))
        padded = torch.nn.functional.pad(video, (0, 7, 0, 3, 0, full - frames), mode="replicate")
        expected = theirs.decode(theirs.encode(padded).latent_dist.mode()).sample[:, :, :frames, :13, :17]
        torch.testing.assert_close(out.video, expected, rtol=0, atol=1e-6)
        assert out.z.shape[1:] == ours.latent_shape(frames, 13, 17)


def test_latents_are_drawn_or_given(pair):
    ours, _ = pair
    video = clip(9, batch=2)
    with torch.no_grad():
        posterior = ours.encode(video)
        draws = [torch.Generator().manual_seed(i) for i in range(2)]
        drawn = ours(video, generator=draws, pixels=False)
        assert drawn.video is None
        again = posterior.sample([torch.Generator().manual_seed(i) for i in range(2)])
        torch.testing.assert_close(drawn.z, again)
        given = ours(video, latents=posterior.mode())
        assert given.posterior is None
        torch.testing.assert_close(given.video, ours(video, sample=False).video)
        assert ours(video, latents=posterior.mode(), encode=True, pixels=False).posterior is not None


@pytest.mark.parametrize(("kind", "frames"), [(COGVIDEOX, 18), (COGVIDEOX, 9), (HUNYUAN, 18), (HUNYUAN, 12)])
def test_a_number_of_frames_that_does_not_fit_the_latents_is_refused(saved, kind, frames):
    ours = vae3d.load(saved[kind])
    z = torch.zeros(1, 4, 5, 1, 1)  # of 17 frames
    with pytest.raises(ValueError, match=f"num_frames is {frames}, which does not fit 5 latent frames"):
        ours.decode(z, frames)


def test_half_precision_stays_in_the_network(saved):
    ours = vae3d.load(saved[COGVIDEOX]).to(torch.bfloat16)
    with torch.no_grad():
        out = ours(clip(9), sample=False)
    assert out.video.dtype == torch.bfloat16
    assert out.z.dtype == torch.float32
    reference = vae3d.load(saved[COGVIDEOX])
    with torch.no_grad():
        torch.testing.assert_close(out.z, reference(clip(9), sample=False).z, rtol=0, atol=0.05)


# ---- what a diffusion model sees


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        (COGVIDEOX, {}, lambda z: z * 1.15258426),
        (COGVIDEOX, {"scaling_factor": 0.7, "invert_scale_latents": True}, lambda z: z * 0.7),
        (COGVIDEOX, {"scaling_factor": 2.0, "shift_factor": 0.5}, lambda z: (z - 0.5) * 2),
        (COGVIDEOX, {"scaling_factor": 1.0, "latents_mean": [1, 2, 3, 4], "latents_std": [2, 2, 2, 4]}, None),
        (HUNYUAN, {}, lambda z: z * 0.476986),
    ],
)
def test_latents_are_scaled_as_in_the_pipelines(kind, config, expected):
    ours = DiffusersVAE(kind, {**TINY, **config})
    z = torch.randn(2, 4, 3, 2, 2)
    if expected is None:
        mean, std = (torch.tensor(config[f"latents_{name}"])[:, None, None, None] for name in ("mean", "std"))
        torch.testing.assert_close(ours.normalize(z), (z - mean) / std)
    else:
        torch.testing.assert_close(ours.normalize(z), expected(z))
    torch.testing.assert_close(ours.denormalize(ours.normalize(z)), z)
    mean, std = (torch.tensor(x)[:, None, None, None] for x in (ours.spec.latents_mean, ours.spec.latents_std))
    torch.testing.assert_close(ours.normalize(z), (z - mean) / std)


# ---- files


def test_weights_in_several_files_are_the_same(saved, tmp_path):
    ours = vae3d.load(saved[HUNYUAN])
    ours.vae.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    found = vae3d.load(tmp_path).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in ours.state_dict().items())
    shards[0].unlink()
    with pytest.raises(FileError, match=rf"1 of its {len(shards)} files .*{shards[0].name}"):
        vae3d.load(tmp_path)
    (tmp_path / f"{WEIGHTS}.index.json").write_text("[]")
    with pytest.raises(FileError, match="no index of weight files"):
        vae3d.load(tmp_path)


@pytest.mark.smoke
def test_an_export_comes_back(saved, tmp_path):
    ours = vae3d.load(saved[COGVIDEOX])
    write_export(read_checkpoint(saved[COGVIDEOX]), tmp_path)
    found = vae3d.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(found.encode(clip(8)).mean, ours.encode(clip(8)).mean)


def copied(folder, tmp_path, **changes):
    shutil.copytree(folder / "vae", tmp_path / "vae")
    file = tmp_path / "vae/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return tmp_path / "vae"


def test_a_load_that_fails_says_why(saved, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder"):
        vae3d.load(tmp_path / "nowhere")
    folder = copied(saved[COGVIDEOX], tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", None)
        with pytest.raises(CheckpointError, match="is a model of diffusers, which is not installed: pip install diff"):
            vae3d.load(folder)
    state = load_file(folder / WEIGHTS)
    key = "encoder.conv_in.conv.weight"
    save_file({name: tensor for name, tensor in state.items() if name != key}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"1 tensor missing in the file: vae.{key}"):
        vae3d.load(folder)
    save_file(state, folder / WEIGHTS)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"a video VAE of diffusers; its config\.json must lie beside it"):
        vae3d.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"temporal_compression_ratio": 8},
            "temporal_compression_ratio is 8",
        ),
        (
            {"shift_factor": 1.0, "latents_mean": [0.0] * 4},
            "both shift_factor and latents_mean",
        ),
        ({"latents_std": [1.0] * 3}, "latents_mean and latents_std have 4 and 3 entries; give 4"),
        ({"block_out_channels": [8, 8, 8, 16]}, r"tensors of another shape \(file, model\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved, tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        vae3d.load(copied(saved[COGVIDEOX], tmp_path, **changes))


def test_other_kinds_are_refused_and_unknown_keys_told(caplog, monkeypatch):
    with pytest.raises(UserError, match=r"kind is 'AutoencoderKLMagic'; use one of .*AutoencoderKLCogVideoX, "):
        DiffusersVAE("AutoencoderKLMagic")
    DiffusersVAE(COGVIDEOX, {**TINY, "sample_size": 256, "_diffusers_version": "0.1"})
    assert "sample_size" in caplog.text
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(__version__="0.30.0"))
    with pytest.raises(UserError, match=f"diffusers 0.30.0 has no {HUNYUAN}: pip install --upgrade diffusers"):
        DiffusersVAE(HUNYUAN)
