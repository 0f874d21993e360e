"""Key layouts of the Wan VAEs: official, diffusers', VideoX-Fun's; and the files of a fine-tune."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensorMode

import vae3d
from tests import tiny
from tests.checkpoints.test_formats import assert_equal_states
from tests.models import wan
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d import loading
from vae3d.checkpoints import export
from vae3d.checkpoints.export import FLAT_LAYOUTS, WRITERS, to_layout, write_export, write_flat
from vae3d.checkpoints.formats import Checkpoint, CheckpointError, read_checkpoint
from vae3d.checkpoints.wan import from_diffusers, to_diffusers
from vae3d.commands import train
from vae3d.loading import initialize

LAYOUTS = {"wan": "VAE.pth", "videox_fun": "VAE.safetensors", "diffusers": "folder", "export": "export"}


def checkpoint(style: str, folder, **changes: object) -> Checkpoint:
    config = {"_target_": "vae3d.models.wan.WanVAE", **wan.STYLES[style], **changes}
    return Checkpoint(config, wan.model(style, **changes).state_dict(), folder, "")


@pytest.fixture(params=wan.STYLES)
def saved(request, tmp_path):
    channels = wan.STYLES[request.param]["latent_channels"]
    constants = {"latents_mean": [0.1 * i for i in range(channels)], "latents_std": [1.0 + i for i in range(channels)]}
    return checkpoint(request.param, tmp_path, **constants)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised_and_comes_back_bit_exact(tmp_path, saved, layout):
    path = tmp_path / LAYOUTS[layout]
    WRITERS[layout](saved, path)
    read = read_checkpoint(path)
    assert read.layout == {"videox_fun": "wan", "diffusers": "wan_diffusers"}.get(layout, layout)
    folded = ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias") if layout in ("wan", "videox_fun") else ()
    assert read.state.keys() == saved.state.keys()
    assert_equal_states(*({k: v for k, v in s.items() if k not in folded} for s in (read.state, saved.state)))
    model = vae3d.load(path)
    stats = {
        "latents_mean": model.spec.latents_mean,
        "latents_std": model.spec.latents_std,
    }  # which only some layouts hold; below
    assert model.spec == replace(loading.instantiate(saved.config).spec, **stats)
    if layout in ("diffusers", "export"):
        assert model.latents_mean.flatten().tolist() == pytest.approx(saved.config["latents_mean"])
        assert model.latents_std.flatten().tolist() == pytest.approx(saved.config["latents_std"])
        assert read.notes == []
    else:  # bare weights; these are not of the published kind
        assert model.latents_std.flatten().tolist() == [1.0] * model.spec.channels
        assert "mean and standard deviation; 0 and 1 are used" in read.notes[0]
    assert_same_normalized_latents(saved, model)


def assert_same_normalized_latents(saved: Checkpoint, model: torch.nn.Module) -> None:
    ours = loading.instantiate(saved.config).eval()
    ours.load_state_dict(saved.state)
    video = wan.clip(ours, 5)
    with torch.no_grad():
        z, w = ours.encode(video), model.encode(video)
        torch.testing.assert_close(model.normalize(w.mean), ours.normalize(z.mean), rtol=1e-4, atol=1e-4)
        std, theirs = (0.5 * z.logvar).exp() / ours.latents_std, (0.5 * w.logvar).exp() / model.latents_std
        torch.testing.assert_close(theirs, std, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.decode(w.mean), ours.decode(z.mean), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["wan", "videox_fun"])
def test_measured_constants_are_folded_for_programs_that_apply_the_published_ones(tmp_path, layout):
    measured = {"latents_mean": [0.1 * i for i in range(16)], "latents_std": [1.0 + 0.2 * i for i in range(16)]}
    saved = checkpoint("wan", tmp_path, latent_channels=16, **measured)
    WRITERS[layout](saved, tmp_path / "vae.pth")
    assert "normalised latents stay the same" in saved.notes[0]
    model = vae3d.load(tmp_path / "vae.pth")
    assert model.latents_mean.flatten().tolist() == pytest.approx(loading.model_config("wan")["latents_mean"])
    assert_same_normalized_latents(saved, model)
    write_flat(saved, {"wan": "native"}.get(layout, layout), tmp_path / "flat.pt")
    assert_equal_states(read_checkpoint(tmp_path / "flat.pt").state, model.state_dict())


def test_constants_are_folded_into_weights_on_a_gpu(tmp_path):
    saved = checkpoint("wan", tmp_path, latents_std=[2.0] * wan.STYLES["wan"]["latent_channels"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {name: torch.empty(tensor.shape, device="cuda") for name, tensor in saved.state.items()}
    folded = export._with_published_constants(replace(saved, state=state), "wan")
    assert {name for name in state if folded[name] is not state[name]} == {
        "conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias",
    }  # fmt: skip


def test_published_constants_leave_the_weights_as_they_are(tmp_path):
    published = {name: loading.model_config("wan")[name] for name in ("latents_mean", "latents_std")}
    saved = checkpoint("wan", tmp_path, latent_channels=16, **published)
    WRITERS["wan"](saved, tmp_path / "vae.pth")
    assert_equal_states(read_checkpoint(tmp_path / "vae.pth").state, saved.state)
    assert saved.notes == []


@pytest.mark.parametrize(
    ("theirs", "prefix", "suffix"),
    [
        (False, "", ".pth"), (False, "model.", ".safetensors"), (False, "vae.model.", ".pt"),
        (True, "", ".safetensors"), (True, "module.", ".pth"),
    ],
)  # fmt: skip
def test_files_are_recognised_by_their_keys(tmp_path, prefix, suffix, theirs):
    """Single files of official and of diffusers' keys, bare or inside a wrapper."""
    saved = checkpoint("wan", tmp_path)
    state = to_diffusers(saved.state) if theirs else saved.state
    state = {prefix + key: tensor for key, tensor in state.items()}
    file = tmp_path / f"file{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    assert read_checkpoint(file).layout == ("wan_diffusers" if theirs else "wan")
    assert_equal_states(vae3d.load(file).state_dict(), saved.state)


def test_bare_files_of_the_published_width_have_the_published_constants(tmp_path):
    small = checkpoint("wan", tmp_path, latent_channels=16)
    torch.save(small.state, tmp_path / "Wan2.1_VAE.pth")
    read = read_checkpoint(tmp_path / "Wan2.1_VAE.pth")
    assert read.config["latents_mean"] == loading.model_config("wan")["latents_mean"]
    assert "of the published weights are used" in read.notes[0]
    model = wan.model(latent_channels=16)  # of 0 and 1: it loads, since the file says nothing of them
    assert "starts from" in initialize(model, str(tmp_path / "Wan2.1_VAE.pth"))[0]


def test_diffusers_opens_the_folder_and_computes_the_same(tmp_path, saved):
    WRITERS["diffusers"](saved, tmp_path / "vae")
    theirs, info = AutoencoderKLWan.from_pretrained(
        tmp_path / "vae", local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
    )
    assert not any(info.values()), info
    ours = loading.instantiate(saved.config).eval()
    ours.load_state_dict(saved.state)
    video = wan.clip(ours, 5)
    with torch.no_grad():
        expected = theirs.encode(video).latent_dist.mean
        torch.testing.assert_close(ours.encode(video).mean, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.decode(expected), theirs.decode(expected).sample, rtol=0, atol=1e-5)
    assert list(theirs.config.latents_mean) == saved.config["latents_mean"]
    assert theirs.config.scale_factor_spatial == ours.spec.space_stride
    theirs.save_pretrained(tmp_path / "again")  # what diffusers writes is read
    assert_equal_states(vae3d.load(tmp_path / "again").state_dict(), saved.state)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "again").rename(tmp_path / "pipeline/vae")
    assert vae3d.load(tmp_path / "pipeline").latents_mean.flatten().tolist() == pytest.approx(
        saved.config["latents_mean"]
    )


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
def test_one_of_mean_and_standard_deviation_alone_is_refused(tmp_path, name):
    WRITERS["diffusers"](checkpoint("wan", tmp_path), tmp_path / "vae")
    config_json = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps({**config_json, name: None}))
    with pytest.raises(CheckpointError, match="both latents_mean and latents_std"):
        read_checkpoint(tmp_path / "vae")


def test_renaming_is_one_to_one_both_ways(saved):
    renamed = to_diffusers(saved.state)
    assert len(renamed) == len(saved.state)
    assert_equal_states(from_diffusers(renamed), saved.state)


def test_an_export_keeps_what_the_weights_do_not_tell(tmp_path):
    write_export(checkpoint("wan", tmp_path, pad_w="circular", pad_h="pole", chunk_latents=2), tmp_path / "e")
    model = vae3d.load(tmp_path / "e")
    assert (model.borders.width, model.borders.height, model.chunk_latents) == ("circular", "pole", 2)
    assert vae3d.load(tmp_path / "e", pad_h="zeros").borders.height == "zeros"
    for layout, name in (("wan", "VAE.pth"), ("videox_fun", "fun.pth"), ("diffusers", "d"), ("qwen_image", "q")):
        saved = read_checkpoint(tmp_path / "e")
        WRITERS[layout](saved, tmp_path / name)
        notes = [note for note in saved.notes if "published" not in note]
        assert [note.partition(" ")[0] for note in notes] == ["pad_w=circular", "pad_h=pole"]
    assert vae3d.load(tmp_path / "VAE.pth").borders.width == "zeros"
    assert vae3d.load(tmp_path / "VAE.pth", pad_w="circular").borders.width == "circular"


@pytest.mark.parametrize("name", ["temporal_vae", "spatial"])
def test_files_of_other_networks_are_refused_with_what_they_are(tmp_path, name):
    if name == "temporal_vae":
        state, layout = tiny.model(name).state_dict(), "opensora"
        torch.save(state, tmp_path / "file.pt")
        path = tmp_path / "file.pt"
    else:
        path, layout = tmp_path / "kl", "diffusers"
        AutoencoderKL(block_out_channels=(32,), latent_channels=4).save_pretrained(path)
    with pytest.raises(CheckpointError) as error:
        initialize(wan.model(), str(path))
    message = str(error.value)
    assert f"({layout}) does not fit the model" in message
    assert f"holds a{'n OpenSoraVAE' if name == 'temporal_vae' else ' SpatialVAE'}, " in message
    assert "stage.init_from needs a WanVAE" in message
    assert "missing in the file" not in message


def test_wan22_is_not_wan21(tmp_path):
    WRITERS["wan"](checkpoint("wan22", tmp_path), tmp_path / "VAE.pth")
    with pytest.raises(
        CheckpointError, match=r"\(wan\) does not fit the model:\n.* decoder.upsamples.0.residual.0"
    ) as why:
        initialize(wan.model(), str(tmp_path / "VAE.pth"))
    assert str(why.value).endswith("set model=wan22")
    with pytest.raises(CheckpointError) as why:  # of another width, for which there is no such hint
        initialize(wan.model("wan22", channels=4), str(tmp_path / "VAE.pth"))
    assert "set model" not in str(why.value)


@pytest.mark.parametrize("style", wan.STYLES)
def test_a_smaller_decoder_is_written_under_its_own_keys_and_not_for_programs_that_cannot_build_it(tmp_path, style):
    saved = checkpoint(style, tmp_path, decoder_widths=[8, 8, 4, 4])
    for layout in ("native", "videox_fun"):
        write_flat(saved, layout, tmp_path / "flat.pt")
        assert len(torch.load(tmp_path / "flat.pt", weights_only=True)) == len(saved.state)
    for layout in ("wan", "videox_fun", "diffusers"):
        with pytest.raises(CheckpointError, match=rf"decoder_widths=\[8, 8, 4, 4\], which the {layout} layout"):
            WRITERS[layout](saved, tmp_path / layout)
    with pytest.raises(CheckpointError, match=r"the diffusers layout .*; use native"):
        write_flat(saved, "diffusers", tmp_path / "flat.pt")


@pytest.mark.parametrize(("style", "channels"), [("wan", 1), ("wan", 4), ("wan22", 1), ("wan22", 4)])
def test_files_of_a_run_may_have_other_channels_of_pixels(tmp_path, style, channels):
    """Depth and RGBA: the averaged weights of a run, and diffusers' folders, which hold the number."""
    saved = checkpoint(style, tmp_path, pixel_channels=channels)
    write_flat(saved, "videox_fun", tmp_path / "vae_depth_final_ema.pt")
    WRITERS["diffusers"](saved, tmp_path / "vae")
    for path in (tmp_path / "vae_depth_final_ema.pt", tmp_path / "vae"):
        model = vae3d.load(path)
        assert (model.pixel_channels, model.patch) == (channels, 2 if style == "wan22" else 1)
        assert_equal_states(model.state_dict(), saved.state)
    theirs = AutoencoderKLWan.from_pretrained(tmp_path / "vae", local_files_only=True)
    assert theirs.config.in_channels == channels * model.patch**2
    with pytest.raises(CheckpointError, match=f"{channels} channels of pixels, which the videox_fun layout"):
        WRITERS["videox_fun"](saved, tmp_path / "VAE.pth")


@pytest.mark.parametrize("channels", [3, 4])
def test_weights_of_qwen_image_open_train_and_go_back(tmp_path, channels):
    """3 channels: Qwen-Image and -Edit. 4: Qwen-Image-Layered, whose VAE codes RGBA."""
    saved = checkpoint("wan", tmp_path, pixel_channels=channels, latents_mean=[0.1] * 4, latents_std=[1.5] * 4)
    WRITERS["qwen_image"](saved, tmp_path / "vae")
    theirs = AutoencoderKLQwenImage.from_pretrained(tmp_path / "vae", local_files_only=True).eval()
    assert (theirs.config.input_channels, theirs.config.latents_std) == (channels, [1.5] * 4)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = loading.instantiate(saved.config).eval()
    assert "starts from" in initialize(ours, str(tmp_path / "theirs"))[0]
    assert_equal_states(ours.state_dict(), saved.state)
    video = torch.cat([wan.clip(ours, 5), wan.clip(ours, 5, seed=1)], 1)[:, :channels]
    with torch.no_grad():
        z = theirs.encode(video).latent_dist.mode()
        torch.testing.assert_close(ours.encode(video).mode(), z, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.decode(z).clamp(-1, 1), theirs.decode(z).sample, rtol=0, atol=1e-5)
    if channels == 4:
        with pytest.raises(CheckpointError, match=r"conv1.weight \[8, 4, 3, 3, 3\](?s:.*)set model.pixel_channels=4"):
            initialize(wan.model(), str(tmp_path / "theirs"))


@pytest.mark.parametrize(
    ("style", "changes", "message"),
    [
        ("wan22", {}, "network of Wan2.1, which has no patch=2, shortcuts=True, decoder_channels=16; use the layout"),
        ("wan", {"pixel_channels": 1}, "has 1 channels of pixels, which the qwen_image layout does not know"),
    ],
)
def test_networks_that_are_not_qwen_images_are_refused(tmp_path, style, changes, message):
    with pytest.raises(CheckpointError, match=message):
        WRITERS["qwen_image"](checkpoint(style, tmp_path, **changes), tmp_path / "vae")
    assert not (tmp_path / "vae").exists()


@pytest.mark.parametrize("layout", ["diffusers", "qwen_image"])
def test_frames_that_diffusers_does_not_code_are_noted(tmp_path, layout):
    for downsample, frames in (([False, False, True], 2), ([False, True, True], 4), ([True, True, True], 8)):
        saved = checkpoint("wan", tmp_path, downsample=downsample)
        WRITERS[layout](saved, tmp_path / f"{frames}")
        assert [f"has {frames}" in note for note in saved.notes] == ([] if frames == 4 else [True])


@pytest.mark.parametrize(
    "key",
    [
        "conv2.weight", "encoder.conv1.weight", "decoder.upsamples.3.time_conv.bias",
        "encoder.downsamples.3.residual.2.weight",
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_a_tensor_that_is_missing_is_named(tmp_path, layout, key):
    saved = checkpoint("wan", tmp_path)
    del saved.state[key]
    path = tmp_path / LAYOUTS[layout]
    WRITERS[layout](saved, path)
    for model in (None, wan.model()):
        with pytest.raises(CheckpointError, match=re.escape(key)):
            vae3d.load(path, model)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    saved = checkpoint("wan", tmp_path)
    saved.state["conv2.bias"] = torch.zeros(7)
    WRITERS["wan"](saved, tmp_path / "VAE.pth")
    with pytest.raises(CheckpointError, match=r"of another shape \(file, model\): conv2.bias \[7\] \[4\]"):
        vae3d.load(tmp_path / "VAE.pth")


def test_layouts_are_for_their_own_model(tmp_path):
    spatial = Checkpoint(loading.model_config("spatial", *tiny.MODEL["spatial"]), {}, tmp_path, "export")
    for layout in ("wan", "videox_fun"):
        with pytest.raises(CheckpointError, match=rf"the {layout} layout is for vae3d\.models\.wan\.WanVAE"):
            WRITERS[layout](spatial, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"the ldm layout is for vae3d\.models\.spatial\.SpatialVAE"):
        WRITERS["ldm"](checkpoint("wan", tmp_path), tmp_path / "x.safetensors")
    for layout in ("videox_fun", "diffusers"):
        with pytest.raises(CheckpointError, match="only the Wan VAEs have the key layouts"):
            to_layout(tiny.model("spatial").state_dict(), layout)
    assert not (tmp_path / "x.pth").exists()


def test_the_script_converts_to_every_layout_and_back(tmp_path):
    saved = checkpoint("wan", tmp_path)
    last = tmp_path / "start"
    write_export(saved, last)
    for layout, name in LAYOUTS.items():
        target = tmp_path / layout / name
        target.parent.mkdir()
        assert tiny.status("convert", last, target, "--to", layout) == 0
        last = target
    assert_equal_states(vae3d.load(last).state_dict(), saved.state)
    prefixed = load_file(tmp_path / "videox_fun/VAE.safetensors")
    assert prefixed.keys() == {f"model.{key}" for key in saved.state}


class Wrapper(torch.nn.Module):
    """As other programs hold the official network: under the attribute `model`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny.model("wan", seed=9)


def test_the_final_file_of_a_run_loads_strictly_where_the_network_is_called_model(rooms, tmp_path, monkeypatch):
    erp = ["data=erp_rooms", f"data.source.root={rooms}", "data.width=32", "data.frames.min=3", "data.frames.max=3"]
    publish = ["trainer.publish.prefix=vae_rgb", "trainer.publish.layout=videox_fun"]
    config = tiny.training(
        "wan", rooms, "stage=slow_encoder", "stage.init_from=random", "loss=erp_lite", *erp, *publish
    )
    t = train.build_trainer(config, tmp_path)
    t.fit()
    monkeypatch.chdir(tmp_path)
    vae = Wrapper()
    state_dict = torch.load("vae_rgb_final_ema.pt", map_location="cpu", weights_only=True)
    vae.load_state_dict(state_dict)
    assert_equal_states(vae.model.state_dict(), vae3d.load(tmp_path).state_dict())
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == [
        "vae_rgb_ema_step2.pt", "vae_rgb_final_ema.pt", "vae_rgb_step2.pt",
    ]  # fmt: skip
    assert_equal_states(vae3d.load("vae_rgb_ema_step2.pt").state_dict(), vae.model.state_dict())
    assert set(FLAT_LAYOUTS) == {"native", "videox_fun", "diffusers"}
