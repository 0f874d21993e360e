from __future__ import annotations

import json
import pickle

import pytest
import torch
from diffusers import AutoencoderKL as Reference
from safetensors.torch import load_file, save_file

import vae3d
from tests import tiny
from vae3d.checkpoints import export, ldm
from vae3d.checkpoints.export import WRITERS, size_notes, write_diffusers, write_export, write_ldm, write_opensora
from vae3d.checkpoints.formats import Checkpoint, CheckpointError, read_checkpoint
from vae3d.checkpoints.opensora import to_published
from vae3d.checkpoints.published import rename_keys
from vae3d.io import FileError
from vae3d.loading import initialize, model_config
from vae3d.models.registry import config_of

KEYS = json.loads((tiny.ROOT / "tests/keys/sd_vae.json").read_text())
# 32 groups: a bare file does not tell its number of groups, all published ones have 32.
WIDE = ["model.channels=[32,32]", "model.groups=32", "model.layers=1"]
PIPELINE = [
    "model.spatial.channels=[32,32]",
    "model.spatial.layers=1",
    "model.temporal.channels=32",
    "model.temporal.multipliers=[1,1,2]",
    "model.temporal.downsample=[true,true]",
    "model.temporal.layers=1",
]


def checkpoint(name: str, overrides: list[str], folder) -> Checkpoint:
    torch.manual_seed(0)
    return Checkpoint(model_config(name, *overrides), vae3d.build(name, *overrides).state_dict(), folder, "export")


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_ldm_keys_and_shapes_are_the_published_ones_and_come_back_bit_exact():
    state = {key: torch.randn(shape) for key, (_, shape, _) in KEYS.items()}
    converted = ldm.to_ldm(state)
    assert {k: list(v.shape) for k, v in converted.items()} == {k: shape for k, _, shape in KEYS.values()}
    for key, (theirs, _, _) in KEYS.items():
        assert torch.equal(converted[theirs].flatten(), state[key].flatten())
    assert_equal_states(ldm.from_ldm(converted), state)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae.", "module.", "_orig_mod."])
@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_2d_files_are_recognised_by_their_keys(tmp_path, layout, prefix, suffix):
    saved = checkpoint("spatial", WIDE, tmp_path)
    inner = {k.removeprefix("module."): v for k, v in saved.state.items()}
    state = {f"{prefix}{k}": v for k, v in (ldm.to_ldm(inner) if layout == "ldm" else inner).items()}
    file = tmp_path / f"file{suffix}"
    if suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, file)
    else:
        torch.save({"state_dict": state, "epoch": 3}, file)
    model = vae3d.load(file)
    assert_equal_states(model.state_dict(), saved.state)
    assert read_checkpoint(file).layout == layout


def test_files_of_old_diffusers_name_their_attention_otherwise(tmp_path):
    saved = checkpoint("spatial", WIDE, tmp_path)
    state = {k.removeprefix("module."): v for k, v in saved.state.items()}
    state = rename_keys(state, ldm.OLD_ATTENTION, inverse=True)
    assert any(".query." in key for key in state)
    save_file(state, tmp_path / "old.safetensors")
    assert_equal_states(vae3d.load(tmp_path / "old.safetensors").state_dict(), saved.state)


def test_a_stable_diffusion_checkpoint_gives_its_vae_and_says_what_it_left_out(tmp_path):
    saved = checkpoint("spatial", WIDE, tmp_path)
    inner = ldm.to_ldm({k.removeprefix("module."): v for k, v in saved.state.items()})
    state = {f"first_stage_model.{k}": v for k, v in inner.items()}
    state |= {"model.diffusion_model.out.weight": torch.zeros(3), "first_stage_model.loss.logvar": torch.zeros(())}
    torch.save({"state_dict": state}, tmp_path / "sd.ckpt")
    read = read_checkpoint(tmp_path / "sd.ckpt")
    assert_equal_states(read.state, saved.state)
    assert any("skipped, not part of the VAE: loss, model" in note for note in read.notes)
    assert any("scaling factor" in note for note in read.notes)


def test_diffusers_folder_opens_there_and_comes_back(tmp_path):
    saved = checkpoint("spatial", [*WIDE, "model.scaling_factor=0.5", "model.quant_convs=false"], tmp_path)
    write_diffusers(saved, tmp_path / "pipeline/vae")
    theirs = Reference.from_pretrained(tmp_path / "pipeline/vae")
    assert theirs.config.scaling_factor == 0.5
    ours = vae3d.load(tmp_path / "pipeline")  # the folder above `vae`, as pipelines have it
    assert ours.scaling_factor == 0.5
    assert_equal_states(ours.state_dict(), saved.state)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        latents = theirs.encode(x).latent_dist.mean
        torch.testing.assert_close(ours.encode(x[:, :, None]).mean[:, :, 0], latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.decode(latents[:, :, None])[:, :, 0], theirs.decode(latents).sample)


def test_a_folder_that_diffusers_wrote_loads(tmp_path):
    theirs = Reference(
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=6,
        norm_num_groups=8,
        scaling_factor=0.3,
        shift_factor=0.1,
    )
    theirs.save_pretrained(tmp_path)
    ours = vae3d.load(tmp_path)
    assert (ours.scaling_factor, ours.shift_factor, ours.spec.channels) == (0.3, 0.1, 6)
    assert_equal_states(ours.module.state_dict(), theirs.state_dict())


def test_ldm_file_round_trips(tmp_path):
    saved = checkpoint("spatial", WIDE, tmp_path)
    write_ldm(saved, tmp_path / "vae.safetensors")
    assert "decoder.up.1.block.0.conv1.weight" in load_file(tmp_path / "vae.safetensors")
    assert_equal_states(vae3d.load(tmp_path / "vae.safetensors").state_dict(), saved.state)


@pytest.mark.parametrize("where", ["folder", "file"])
def test_opensora_layout_is_recognised(tmp_path, where):
    saved = checkpoint("temporal_vae", [*PIPELINE, "model.spatial.scaling_factor=0.18215"], tmp_path)
    saved.state["latents_std"] += 1.5
    save_file(to_published(saved.state), tmp_path / "model.safetensors")
    if where == "folder":
        (tmp_path / "config.json").write_text(json.dumps({"micro_frame_size": 9}))
    model = vae3d.load(tmp_path if where == "folder" else tmp_path / "model.safetensors")
    assert_equal_states(model.state_dict(), saved.state)
    assert model.spatial_vae.scaling_factor == 0.18215
    assert model.micro_frames == (9 if where == "folder" else 17)
    assert vae3d.load(tmp_path, micro_frames=None).micro_frames is None


def test_scalar_scale_and_shift_of_training_files_are_spread_over_the_channels(tmp_path):
    saved = checkpoint("temporal_vae", PIPELINE, tmp_path)
    state = {**to_published(saved.state), "scale": torch.tensor(2.0), "shift": torch.tensor(0.5)}
    torch.save(state, tmp_path / "model.pt")
    model = vae3d.load(tmp_path / "model.pt")
    assert torch.equal(model.latents_std, torch.full((1, 4, 1, 1, 1), 2.0))
    assert torch.equal(model.latents_mean, torch.full((1, 4, 1, 1, 1), 0.5))


@pytest.mark.parametrize(
    ("key", "value"), [("scale", torch.ones(5)), ("shift", torch.ones(0)), ("scales", torch.ones(4))]
)
def test_a_scale_or_shift_that_does_not_fit_is_named(tmp_path, key, value):
    saved = checkpoint("temporal_vae", PIPELINE, tmp_path)
    torch.save({**to_published(saved.state), key: value}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=rf"model\.pt.*\s.*{key}|model\.pt: {key}"):
        vae3d.load(tmp_path / "model.pt")


def test_written_opensora_folder_computes_the_same_under_the_published_factor(tmp_path, monkeypatch):
    """The original code always multiplies by 0.18215; another factor is folded into the weights."""
    monkeypatch.setattr(export, "_require_published_size", lambda config: None)  # a tiny one serves here
    overrides = [*PIPELINE, "model.spatial.scaling_factor=0.13025", "model.micro_frames=null"]
    saved = checkpoint("temporal_vae", overrides, tmp_path)
    write_opensora(saved, tmp_path / "published")
    ours, theirs = vae3d.build("temporal_vae", *overrides), vae3d.load(tmp_path / "published")
    ours.load_state_dict(saved.state)
    assert theirs.spatial_vae.scaling_factor == 0.18215
    assert theirs.micro_frames is None
    video = torch.randn(1, 3, 6, 8, 8)
    with torch.no_grad():
        a, b = (model(video, generator=torch.Generator().manual_seed(3)) for model in (ours, theirs))
    torch.testing.assert_close(b.spatial.latent, a.spatial.latent, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.video, a.video, rtol=1e-4, atol=1e-5)


def test_opensora_layout_is_refused_for_a_network_that_its_code_cannot_build(tmp_path):
    with pytest.raises(CheckpointError, match=r"spatial channels is \[32, 32\], not \[128, 256, 512, 512\]"):
        write_opensora(checkpoint("temporal_vae", PIPELINE, tmp_path), tmp_path / "published")


def test_layouts_are_for_their_own_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"the diffusers layout is for .*SpatialVAE"):
        write_diffusers(checkpoint("temporal_vae", PIPELINE, tmp_path), tmp_path / "x")


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["spatial", "temporal_vae"])
def test_export_round_trips_with_its_configuration(tmp_path, name):
    torch.manual_seed(0)
    model = tiny.model(name)
    write_export(Checkpoint(model_config(name, *tiny.MODEL[name]), model.state_dict(), tmp_path, ""), tmp_path, step=7)
    loaded = vae3d.load(tmp_path)
    assert_equal_states(loaded.state_dict(), model.state_dict())
    assert not loaded.training


def test_newest_export_of_a_run_is_taken(tmp_path):
    for step in (5, 20):
        saved = checkpoint("spatial", WIDE, tmp_path)
        saved.state["module.quant_conv.bias"].fill_(step)
        write_export(saved, tmp_path / f"exports/step-{step:07d}")
    assert vae3d.load(tmp_path).module.quant_conv.bias[0] == 20


def test_everything_that_does_not_fit_is_named(tmp_path):
    saved = checkpoint("spatial", WIDE, tmp_path)
    state = dict(saved.state)
    del state["module.encoder.conv_in.bias"]
    state["module.extra.weight"] = torch.zeros(1)
    state["module.quant_conv.bias"] = torch.zeros(3)
    write_export(Checkpoint(saved.config, state, tmp_path, ""), tmp_path / "export")
    with pytest.raises(CheckpointError) as error:
        vae3d.load(tmp_path / "export")
    message = str(error.value)
    assert "1 tensor missing in the file: module.encoder.conv_in.bias" in message
    assert "1 tensor unknown to the model: module.extra.weight" in message
    assert "module.quant_conv.bias [3] [8]" in message


def test_weights_for_another_model_are_refused(tmp_path):
    write_export(checkpoint("spatial", WIDE, tmp_path), tmp_path)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        vae3d.load(tmp_path, tiny.model("spatial"))


def test_a_file_that_holds_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('it ran')",))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=2))
    with pytest.raises(FileError, match=r"evil\.pt: is a pickle that torch.save did not write"):
        vae3d.load(tmp_path / "evil.pt")


@pytest.mark.parametrize(
    "target",
    [
        "subprocess.run",
        "vae3d.models.spatial.nn.Linear",
        "vae3d.models.spatial.nn.modules.module.torch.load",
        "vae3d.models.absent.Model",
        "vae3d.models.spatial.Absent",
        "",
    ],
)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_export_cannot_name_foreign_code(tmp_path, target, depth):
    saved = checkpoint("spatial", WIDE, tmp_path)
    config = {"_target_": target, "args": "true"}
    for _ in range(depth):
        config = saved.config | {"channels": [config]}
    write_export(Checkpoint(config, saved.state, tmp_path, ""), tmp_path)
    key = r"model\.channels\[0\] is " if depth else rf"model\._target_ is '{target}'"
    with pytest.raises(CheckpointError, match=key):
        vae3d.load(tmp_path)


def test_single_settings_of_a_checkpoint_can_be_changed(tmp_path):
    saved = checkpoint("temporal_vae", PIPELINE, tmp_path)
    write_export(saved, tmp_path)
    model = vae3d.load(tmp_path, micro_frames=9, spatial={"frame_batch": 2})
    assert (model.micro_frames, model.spatial_vae.frame_batch) == (9, 2)
    with pytest.raises(
        CheckpointError, match=r"spatial\.frame_batsh is not an argument .*did you mean spatial\.frame_batch"
    ):
        vae3d.load(tmp_path, spatial={"frame_batsh": 2})


def bad_files(folder):
    (folder / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    (folder / "cut.pt").write_bytes(b"PK\x03\x04 cut")
    (folder / "notes.txt").write_text("hello")
    torch.save({"a": 1}, folder / "empty.pt")
    save_file({"net.weight": torch.zeros(2)}, folder / "other.safetensors")
    save_file({"encoder.down_blocks.0.resnets.0.norm1.weight": torch.zeros(2)}, folder / "part.safetensors")
    (folder / "nothing").mkdir()
    (folder / "denoiser").mkdir()
    save_file({"blocks.0.weight": torch.zeros(2)}, folder / "denoiser/model.safetensors")
    (folder / "denoiser/diffusion.yaml").write_text("{}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "absent: no such file or folder"),
        ("cut.safetensors", "cut.safetensors: is a safetensors file cut short"),
        ("cut.pt", "cut.pt: is a damaged or incomplete file of torch.save"),
        ("notes.txt", "notes.txt: is no weight file .* begins with b'hello'"),
        ("empty.pt", "empty.pt: holds no tensors"),
        ("other.safetensors", "no known layout .* its keys begin with net.weight"),
        ("part.safetensors", "looks like diffusers, but '.*' is not in it"),
        ("nothing", "holds no weights .* found nothing"),
        ("denoiser", "denoiser/model.safetensors: is a diffusion model, .* vae3d sample"),
    ],
)
def test_unusable_checkpoints_are_refused_with_the_reason(tmp_path, name, message):
    bad_files(tmp_path)
    with pytest.raises((CheckpointError, FileError), match=message):
        vae3d.load(tmp_path / name)


def test_a_part_starts_from_its_own_checkpoint_or_from_a_whole_one(tmp_path):
    spatial = checkpoint("spatial", tiny.MODEL["spatial"], tmp_path)
    write_export(spatial, tmp_path / "spatial")
    model = tiny.model("temporal_vae", seed=5)
    temporal_before = {k: v.clone() for k, v in model.temporal_vae.state_dict().items()}
    initialize(model, {"spatial_vae": str(tmp_path / "spatial")})
    assert_equal_states(model.spatial_vae.state_dict(), spatial.state)
    assert_equal_states(model.temporal_vae.state_dict(), temporal_before)

    whole = checkpoint("temporal_vae", tiny.MODEL["temporal_vae"], tmp_path)
    write_export(whole, tmp_path / "whole")
    initialize(model, {"temporal_vae": str(tmp_path / "whole")})
    assert torch.equal(model.temporal_vae.quant_conv.conv.weight, whole.state["temporal_vae.quant_conv.conv.weight"])


WITH_STATS = {
    "wan": tiny.MODEL["wan"][:-2],
    "taesd": ["model.variant=taef2"],
    "taehv": ["model.variant=taecvx", *tiny.MODEL["taehv"][1:]],
    "opensora_v1_3": [key for key in tiny.MODEL["opensora_v1_3"] if "latents_" not in key],
}


@pytest.mark.parametrize("name", WITH_STATS)
def test_a_mean_and_deviation_of_latents_that_would_be_lost_are_refused(tmp_path, name):
    def built(mean, std):
        stats = (f"model.latents_mean={[mean] * channels}", f"model.latents_std={[std] * channels}")
        return vae3d.build(name, *WITH_STATS[name], *stats)

    null = ("model.latents_mean=null", "model.latents_std=null")
    channels = vae3d.build(name, *WITH_STATS[name], *null).spec.channels
    vae3d.save(built(0.3, 3.0), tmp_path / "e")
    with pytest.raises(CheckpointError) as error:
        initialize(built(0.3, 1.0), str(tmp_path / "e"))
    assert f"model.latents_std=[{','.join(['3.0'] * channels)}]" in str(error.value)
    assert "model.latents_mean=" not in str(error.value)
    *_, line = initialize(built(0.3, 1.0), str(tmp_path / "e"), any_scale=True)  # where training measures its own
    assert "latents_std" in line
    initialize(built(0.3, 3.0), str(tmp_path / "e"))
    vae3d.save(vae3d.build(name, *WITH_STATS[name], *null), tmp_path / "none")
    initialize(built(0.3, 3.0), str(tmp_path / "none"))  # which has none to lose


@pytest.mark.parametrize(
    ("name", "layout", "overrides", "lost"),
    [
        ("taehv", "taehv", ["model.decoder_space_upscale=[true,true,false]"], "decoder_space_upscale"),
        ("taesd", "taesd", ["model.variant=taef2", f"model.latents_std={[3.0] * 32}"], "latents_std"),
        ("diffusers", "diffusers", ["model.pad_w=circular"], "pad_w=circular"),
    ],
)
def test_settings_that_a_layout_does_not_hold_are_notes(tmp_path, name, layout, overrides, lost):
    for more in ([], overrides):
        model = tiny.model(name, *more)
        saved = Checkpoint(config_of(model), model.state_dict(), tmp_path, "export")
        WRITERS[layout](saved, tmp_path / f"{len(more)}.safetensors")
        sizes = [note for note in saved.notes if "published class" in note]
        assert [note.startswith(lost) for note in saved.notes if note not in sizes] == [True] * bool(more)
        assert ["decoder_channels=[" in note for note in sizes] == [True] * (name == "taehv")


def test_published_sizes_of_tiny_autoencoders_are_no_note(tmp_path):
    published = {"variant": "taew2_1", "channels": 64, "decoder_channels": None}
    assert size_notes(Checkpoint(published, {}, tmp_path, "export")) == []
    (note,) = size_notes(Checkpoint({**published, "channels": 32}, {}, tmp_path, "export"))
    assert "channels=32" in note


def test_the_mean_and_deviation_of_the_2d_latents_are_compared_too(tmp_path):
    def built(std):
        return vae3d.build("temporal_taef2", *tiny.MODEL["temporal_taef2"], f"model.spatial.latents_std={[std] * 32}")

    vae3d.save(built(2.0), tmp_path / "e")
    with pytest.raises(CheckpointError, match=r"set model\.spatial\.latents_std=\[2\.0,"):
        initialize(built(1.0), str(tmp_path / "e"))


def test_weights_made_for_another_latent_scale_are_refused(tmp_path):
    write_export(checkpoint("temporal_vae", tiny.MODEL["temporal_vae"], tmp_path), tmp_path)
    with pytest.raises(CheckpointError, match=r"scaling_factor is 0.13025 in the checkpoint and 0.18215 in the model"):
        initialize(tiny.model("opensora_v1_2"), str(tmp_path))
