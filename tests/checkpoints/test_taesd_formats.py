"""TAESD files: pairs of an encoder and a decoder, diffusers' AutoencoderTiny; both ways and strictly."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

import vae3d
from tests.checkpoints.test_formats import assert_equal_states
from tests.models.test_taesd import toy
from vae3d.checkpoints.export import WRITERS
from vae3d.checkpoints.formats import Checkpoint, CheckpointError, read_checkpoint
from vae3d.models.taesd import TAESD, VARIANTS


def saved(variant: str, path) -> Checkpoint:
    state = {key: tensor.float() for key, tensor in toy(variant).state_dict().items()}
    return Checkpoint({"_target_": "vae3d.models.taesd.TAESD", "variant": variant}, state, path, "")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_written_pair_is_read_from_either_file_or_the_folder(tmp_path, variant):
    checkpoint = saved(variant, tmp_path)
    WRITERS["taesd"](checkpoint, tmp_path)
    for path in (tmp_path, *tmp_path.glob("*.pth")):
        model = vae3d.load(path)
        assert model.variant == variant
        assert_equal_states(model.state_dict(), checkpoint.state)


def test_the_pair_has_the_published_keys(tmp_path):
    WRITERS["taesd"](saved("taesd", tmp_path), tmp_path)
    encoder, decoder = (
        torch.load(tmp_path / f"taesd_{part}.pth", weights_only=True) for part in ("encoder", "decoder")
    )
    assert {"0.weight", "1.conv.4.bias", "2.weight", "14.bias"} <= encoder.keys()
    assert {"1.weight", "3.conv.0.weight", "7.weight", "19.bias"} <= decoder.keys()
    assert len(encoder) == len(decoder) == 67


@pytest.mark.parametrize("variant", ["taesd", "taef1"])
def test_diffusers_opens_what_is_written_and_the_other_way_round(tmp_path, variant):
    checkpoint = saved(variant, tmp_path)
    WRITERS["diffusers"](checkpoint, tmp_path / variant)
    theirs = AutoencoderTiny.from_pretrained(tmp_path / variant)
    image = torch.rand(1, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        expected = theirs.decode(theirs.encode(image).latents).sample  # its forward rounds latents to 8 bits
        ours = vae3d.load(tmp_path / variant).eval()(image[:, :, None]).video[:, :, 0]
    assert torch.allclose(ours, expected, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    read = read_checkpoint(tmp_path / "again")
    assert read.layout == "taesd_diffusers"
    assert_equal_states(read.state, checkpoint.state)


def test_fp8_weights_are_read_as_they_are(tmp_path):
    checkpoint = saved("taesd", tmp_path)
    WRITERS["diffusers"](checkpoint, tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    small = {key: tensor.to(torch.float8_e4m3fn) if tensor.dim() == 4 else tensor for key, tensor in state.items()}
    save_file(small, tmp_path / "taesd_xl.fp8.safetensors")
    read = read_checkpoint(tmp_path / "taesd_xl.fp8.safetensors")
    assert read.config["variant"] == "taesdxl"
    assert torch.equal(read.state["encoder.0.weight"], small["encoder.layers.0.weight"].float())


def test_a_pair_whose_name_says_nothing_is_read_with_a_note(tmp_path):
    folder = tmp_path / "weights"
    WRITERS["taesd"](saved("taef1", tmp_path), folder)
    for part in ("encoder", "decoder"):
        (folder / f"taef1_{part}.pth").rename(folder / f"{part}.pth")
    read = read_checkpoint(folder / "decoder.pth")
    assert read.config["variant"] == "taesd3"
    assert "taef1" in read.notes[0]
    assert vae3d.load(folder, variant="taef1").variant == "taef1"
    with pytest.raises(CheckpointError, match="taesana"):
        vae3d.load(folder, variant="taesana")


def test_half_a_pair_names_the_other(tmp_path):
    WRITERS["taesd"](saved("taesd", tmp_path), tmp_path)
    (tmp_path / "taesd_encoder.pth").unlink()
    with pytest.raises(CheckpointError, match=r"taesd_encoder\.pth"):
        vae3d.load(tmp_path)
    (tmp_path / "taesd_decoder.pth").rename(tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"NAME_encoder\.pth"):
        vae3d.load(tmp_path)


def test_a_tensor_too_few_is_named(tmp_path):
    WRITERS["taesd"](saved("taesd", tmp_path), tmp_path)
    file = tmp_path / "taesd_decoder.pth"
    state = torch.load(file, weights_only=True)
    del state["18.conv.2.weight"]
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"decoder\.18\.conv\.2\.weight"):
        vae3d.load(tmp_path)


def test_a_config_json_of_another_network_is_refused(tmp_path):
    WRITERS["diffusers"](saved("taesd", tmp_path), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "act_fn": "gelu"}))
    with pytest.raises(CheckpointError, match="act_fn"):
        vae3d.load(tmp_path)


@pytest.mark.parametrize("variant", ["taef2", "taesana"])
def test_diffusers_has_no_network_for_the_other_variants(tmp_path, variant):
    with pytest.raises(CheckpointError, match=variant):
        WRITERS["diffusers"](saved(variant, tmp_path), tmp_path / "out")


def test_latents_of_another_space_are_noted(tmp_path):
    raw = saved("taesd", tmp_path)
    raw.config["latent"] = "raw"
    for layout in ("taesd", "diffusers"):
        raw.notes.clear()
        WRITERS[layout](raw, tmp_path / layout)
        assert [note.split()[0] for note in raw.notes] == ["latent=raw"]
        assert vae3d.load(tmp_path / layout).latent == "normalized"


@pytest.mark.parametrize("layout", ["taesd", "diffusers"])
def test_rgba_is_refused(tmp_path, layout):
    with pytest.raises(CheckpointError, match=f"4 channels of pixels, which the {layout} layout"):
        vae3d.save(TAESD(variant="taesd", pixel_channels=4), tmp_path / "rgba", layout=layout)


SMALLER = {"decoder_channels": [8, 6, 5, 4], "decoder_blocks": [2, 0, 1, 1], "decoder_hidden": [3, 6, 7, 4]}


@pytest.mark.parametrize("shape", [SMALLER, {"decoder_blocks": [0, 1, 1, 1]}, {"decoder_channels": [64, 64, 64, 32]}])
def test_a_smaller_decoder_is_read_back_with_its_shape(tmp_path, shape):
    model = TAESD(variant="taef2", **shape)
    vae3d.save(model, tmp_path / "pair", layout="taesd")
    vae3d.save(model, tmp_path / "export")
    for path in ("pair", "export"):
        read = vae3d.load(tmp_path / path)
        assert {name: list(read.init_arguments[name]) for name in shape} == shape
        assert_equal_states(read.state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match="like taesd3 with decoder_channels, decoder_hidden;"):
        vae3d.save(
            TAESD(variant="taesd3", decoder_channels=[8] * 4, decoder_hidden=[8] * 4),
            tmp_path / "diffusers",
            layout="diffusers",
        )
