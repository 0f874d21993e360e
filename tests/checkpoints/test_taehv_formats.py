"""TAEHV files: which variant they hold, what is written beside them, and decoders that do less than their weights."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

import vae3d
from tests import tiny
from tests.checkpoints.test_formats import assert_equal_states
from tests.models.test_taehv import TOY, toy
from vae3d.checkpoints.export import WRITERS, write_export, write_final_model
from vae3d.checkpoints.formats import Checkpoint, CheckpointError, read_checkpoint
from vae3d.checkpoints.taehv import read_info
from vae3d.loading import initialize
from vae3d.models.taehv import TAEHV, VARIANTS

SIXTEEN = [name for name, kind in VARIANTS.items() if kind.latent_channels == 16]


def saved(variant: str, path, **changes: object) -> Checkpoint:
    config = {"_target_": "vae3d.models.taehv.TAEHV", "variant": variant, **TOY, **changes}
    config["decoder_channels"] = list(config["decoder_channels"])
    return Checkpoint(config, toy(variant, **changes).state_dict(), path, "")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_written_file_names_its_variant(tmp_path, variant, suffix):
    constants = {name: [0.5] * VARIANTS[variant].latent_channels for name in ("latents_mean", "latents_std")}
    checkpoint = saved(variant, tmp_path, **(constants if VARIANTS[variant].latent == "raw" else {}))
    file = tmp_path / f"weights{suffix}"
    WRITERS["taehv"](checkpoint, file)
    read = read_checkpoint(file)
    assert (read.layout, read.notes) == ("taehv", [])
    model = vae3d.load(file)
    assert_equal_states(model.state_dict(), checkpoint.state)
    assert (model.variant, model.latent) == (variant, VARIANTS[variant].latent)
    assert model.spec.latents_std == tuple(checkpoint.config.get("latents_std") or [1.0] * model.spec.channels)
    info = read_info(file)
    kind = VARIANTS[variant]
    assert (info["frame_rule"], info["latent"], info["decoder"]) == (kind.rule, kind.latent, kind.decoder)
    assert info["vae3d"] == vae3d.__version__


def test_an_export_names_it_too(tmp_path):
    checkpoint = saved("taecvx", tmp_path, latent="normalized")
    write_export(checkpoint, tmp_path / "export")
    assert read_info(tmp_path / "export/model.safetensors")["latent"] == "normalized"
    model = vae3d.load(tmp_path / "export")
    assert (model.variant, model.latent) == ("taecvx", "normalized")
    (tmp_path / "export/model.yaml").unlink()  # the metadata of the weights remains
    assert vae3d.load(tmp_path / "export/model.safetensors").latent == "normalized"


def test_the_final_model_is_plain_and_names_its_variant(tmp_path):
    checkpoint = saved("taecvx", tmp_path)
    checkpoint.state = {key: tensor.half() for key, tensor in checkpoint.state.items()}
    write_final_model(checkpoint, tmp_path / "run")
    plain = torch.load(tmp_path / "run/final_model.pth", weights_only=True)
    assert {tensor.dtype for tensor in plain.values()} == {torch.float32}
    assert_equal_states(plain, checkpoint.state)
    assert json.loads((tmp_path / "run/model.json").read_text())["variant"] == "taecvx"
    for name in ("final_model.pth", "final_model.safetensors"):
        assert vae3d.load(tmp_path / "run" / name).variant == "taecvx"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "final_model.pth", "final_model.safetensors", "model.json"
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in SIXTEEN])
def test_shapes_identify_most_variants(tmp_path, variant, dtype):
    state = {key: tensor.to(dtype) for key, tensor in toy(variant).state_dict().items()}
    save_file(state, tmp_path / "anything.safetensors")
    assert read_checkpoint(tmp_path / "anything.safetensors").notes == []
    model = vae3d.load(tmp_path / "anything.safetensors")
    assert model.variant == variant
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("variant", SIXTEEN)
@pytest.mark.parametrize("name", ["{}.pth", "vae_{}_fp16.pth"])
def test_a_name_identifies_the_others_with_a_note(tmp_path, variant, name):
    file = tmp_path / name.format(variant)
    torch.save(toy(variant).state_dict(), file)
    (note,) = read_checkpoint(file).notes
    assert f"{variant} because of its name" in note
    assert vae3d.load(file).variant == variant


@pytest.mark.parametrize("name", ["final_model.pth", "taehv_to_taecvx.pth"])
def test_an_ambiguous_file_is_refused_until_the_user_names_its_variant(tmp_path, name):
    file = tmp_path / name
    torch.save(toy("taecvx").state_dict(), file)
    with pytest.raises(CheckpointError, match=r"taehv, taecvx, taew2_1, taeos1_3, .*variant='taehv'.* taehv\.pth"):
        vae3d.load(file)
    assert vae3d.load(file, variant="taecvx").variant == "taecvx"
    assert initialize(toy("taew2_1"), str(file))  # the model has a variant
    assert tiny.status("convert", file, tmp_path / "x.pth", "--to", "taehv") == 2
    assert tiny.status("convert", file, tmp_path / "x.pth", "--to", "taehv", "--variant", "taecvx") == 0
    assert vae3d.load(tmp_path / "x.pth").variant == "taecvx"


def test_a_start_from_another_variant_or_other_latents_is_said(tmp_path):
    vae3d.save(toy("taew2_1"), tmp_path)
    assert len(initialize(toy("taew2_1"), str(tmp_path))) == 1
    (line,) = initialize(toy("taehv"), str(tmp_path))[1:]
    assert "model.variant was taew2_1" in line
    assert "taehv" in line
    lines = initialize(toy("taecvx"), str(tmp_path))[1:]
    assert ["model.variant" in lines[0], "model.latent was normalized" in lines[1]] == [True, True]


def test_what_the_user_says_wins(tmp_path):
    named = tmp_path / "taehv.pth"
    torch.save(toy("taehv").state_dict(), named)
    assert read_checkpoint(named, "taew2_1").notes == []
    assert vae3d.load(named, variant="taew2_1").variant == "taew2_1"
    WRITERS["taehv"](saved("taecvx", tmp_path), tmp_path / "info.safetensors")
    read = read_checkpoint(tmp_path / "info.safetensors", "taehv")
    assert ["taecvx" in note and "taehv" in note for note in read.notes] == [True]
    assert (read.config["variant"], read.config["latent"]) == ("taehv", "normalized")


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("taew2_2", "16 latent channels and patches of 1,.* cannot be taew2_2, but taehv or taecvx"),
        ("wan", "variant is 'wan'; use one of taehv"),
    ],
)
def test_a_variant_that_does_not_fit_is_refused(tmp_path, variant, message):
    torch.save(toy("taehv").state_dict(), tmp_path / "taehv.pth")
    with pytest.raises(CheckpointError, match=message):
        vae3d.load(tmp_path / "taehv.pth", variant=variant)


@pytest.mark.parametrize(("fact", "error"), [("frame_rule", "rule 'odd'.*'cogvideox'"), ("latent", "latent is 'odd'")])
def test_unknown_frame_rules_and_latents_are_refused(tmp_path, fact, error):
    WRITERS["taehv"](saved("taecvx", tmp_path), tmp_path / "weights.pth")
    info = json.loads((tmp_path / "weights.json").read_text())
    (tmp_path / "weights.json").write_text(json.dumps({**info, fact: "odd"}))
    with pytest.raises(CheckpointError, match=error):
        vae3d.load(tmp_path / "weights.pth")


def test_a_broken_or_foreign_json_beside_a_file(tmp_path):
    torch.save(toy("taehv").state_dict(), tmp_path / "taehv.pth")
    (tmp_path / "model.json").write_text('{"variant": "of something else"}')
    assert vae3d.load(tmp_path / "taehv.pth").variant == "taehv"
    (tmp_path / "taehv.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"taehv.json: is not JSON"):
        vae3d.load(tmp_path / "taehv.pth")


@pytest.mark.parametrize(("name", "own"), [("taehv", "of variant taew2_1"), ("wan", "a vae3d.models.wan.WanVAE")])
def test_converting_gives_a_model_no_other_variant(tmp_path, capsys, name, own):
    vae3d.save(tiny.model(name), tmp_path / "a")
    assert tiny.status("convert", tmp_path / "a", tmp_path / "b", "--to", "export", "--variant", "taecvx") == 2
    assert f"is {own}; leave out --variant" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a"]


def test_converting_replaces_no_file_beside_the_target(tmp_path, capsys):
    vae3d.save(tiny.model("taehv"), tmp_path / "a")
    (tmp_path / "mine.json").write_text("{}")
    assert tiny.status("convert", tmp_path / "a", tmp_path / "mine.pth", "--to", "taehv") == 2
    assert "mine.json" in capsys.readouterr().err
    assert tiny.status("convert", tmp_path / "a", tmp_path / "folder.pth", "--to", "export") == 2
    assert "layout export is a folder" in capsys.readouterr().err
    assert (tmp_path / "mine.json").read_text() == "{}"
    assert sorted(os.listdir(tmp_path)) == ["a", "mine.json"]


def test_networks_that_only_look_alike_are_refused(tmp_path):
    torch.save(toy("taehv1_5").state_dict(), tmp_path / "lighttaehy1_5.pth")
    with pytest.raises(CheckpointError, match="LeakyReLU"):
        vae3d.load(tmp_path / "lighttaehy1_5.pth")
    odd = toy("taehv").state_dict() | {"encoder.17.weight": torch.zeros(20, 4, 3, 3)}
    torch.save(odd, tmp_path / "taehv.pth")
    with pytest.raises(CheckpointError, match=r"20 latent channels and patches of 1, .* no variant"):
        vae3d.load(tmp_path / "taehv.pth")


@pytest.mark.parametrize(
    ("flags", "places"), [([True, False], [19]), ([False, True], [13]), ([False, False], [13, 19]), ([True, True], [])]
)
def test_a_smaller_decoder_keeps_the_last_frames_of_every_group(tmp_path, flags, places):
    checkpoint = saved("taew2_1", tmp_path)
    WRITERS["taehv"](checkpoint, tmp_path / "full.safetensors")
    model = vae3d.load(tmp_path / "full.safetensors", decoder_time_upscale=flags)
    own = model.state_dict()
    for key, tensor in checkpoint.state.items():
        shrunk = key in [f"decoder.{place}.conv.weight" for place in places]
        assert torch.equal(own[key], tensor[-len(tensor) // 2 :] if shrunk else tensor)


def test_a_decoder_cannot_grow(tmp_path):
    small = saved("taew2_1", tmp_path, decoder_time_upscale=[False, False, True])
    WRITERS["taehv"](small, tmp_path / "small.pth")
    assert vae3d.load(tmp_path / "small.pth").time_upscale == 2  # as it was written
    with pytest.raises(CheckpointError, match=r"decoder.13.conv.weight makes fewer frames"):
        vae3d.load(tmp_path / "small.pth", decoder_time_upscale=[True, True])
    with pytest.raises(CheckpointError, match=r"decoder_time_upscale: stage 0 of taew2_1"):
        vae3d.load(tmp_path / "small.pth", decoder_time_upscale=[True, True, True])


def test_space_flags_change_no_weights_of_a_base_decoder_and_are_refused_for_super(tmp_path):
    WRITERS["taehv"](saved("taew2_1", tmp_path), tmp_path / "base.pth")
    assert vae3d.load(tmp_path / "base.pth", decoder_space_upscale=[True, True, False]).space_shrink == 2
    WRITERS["taehv"](saved("taew2_2_super", tmp_path), tmp_path / "super.pth")
    with pytest.raises(CheckpointError, match=r"decoder_space_upscale: the super decoder"):
        vae3d.load(tmp_path / "super.pth", decoder_space_upscale=[True, True, False])


def test_only_these_networks_have_this_layout(tmp_path):
    other = Checkpoint({"_target_": "vae3d.models.spatial.SpatialVAE"}, {}, tmp_path, "")
    with pytest.raises(CheckpointError, match="the taehv layout is for"):
        WRITERS["taehv"](other, tmp_path / "x.pth")


@pytest.mark.parametrize("variant", ["taew2_1", "taew2_2_super"])
def test_a_smaller_decoder_is_read_back_with_its_shape(tmp_path, variant):
    shape = {"decoder_channels": [8, 6, 4, 4], "decoder_blocks": [2, 1, 3], "decoder_hidden": [6, 12, 4]}
    model = TAEHV(variant=variant, channels=4, **shape)
    vae3d.save(model, tmp_path / "x.safetensors", layout="taehv")
    read = vae3d.load(tmp_path / "x.safetensors")
    assert {name: list(read.init_arguments[name]) for name in shape} == shape
    torch.testing.assert_close(dict(read.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
