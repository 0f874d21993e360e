"""Checkpoints as they lie on disk after a training or a download: wrappers, parts, folders, factors, config.json."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from safetensors.torch import save_file

import vae3d
from tests import tiny
from tests.checkpoints.test_formats import WIDE, assert_equal_states, checkpoint
from tests.models import wan
from vae3d.checkpoints import ldm
from vae3d.checkpoints.export import write_diffusers, write_export
from vae3d.checkpoints.formats import Checkpoint, CheckpointError, read_checkpoint
from vae3d.checkpoints.location import find_weights, split_part
from vae3d.config.check import path_issues
from vae3d.errors import UserError
from vae3d.loading import open_codec

KL = {
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Checkpoint:
    return checkpoint("spatial", WIDE, tmp_path_factory.mktemp("saved"))


def inner(saved: Checkpoint, prefix: str = "", scale: float = 1.0) -> dict[str, torch.Tensor]:
    """diffusers' keys behind a prefix; scale makes copies differ."""
    return {prefix + key.removeprefix("module."): tensor * scale for key, tensor in saved.state.items()}


WRAPPED = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "step": 5},
    "module": lambda s: {"module": s},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "params": lambda s: {"params": s},
    "generator": lambda s: {"generator": s, "discriminator": {"main.0.weight": torch.zeros(2)}},
    "nested": lambda s: {"checkpoint": {"model": {"state_dict": s}}},
    "list": lambda s: [{"args": 1}, s],
    "tuple": lambda s: (s, 7),
    "halves": lambda s: {
        half: {k.removeprefix(f"{half}."): v for k, v in s.items() if k.startswith(f"{half}.")}
        for half in ("encoder", "decoder", "quant_conv", "post_quant_conv")
    },
    "compiled": lambda s: {"_orig_mod." + k: v for k, v in s.items()},
    "compiled blocks": lambda s: {k.replace("encoder.", "encoder._orig_mod."): v for k, v in s.items()},
    "fsdp": lambda s: {"model._fsdp_wrapped_module." + k: v for k, v in s.items()},
    "itself": lambda s: (w := {"model": s}, w.update(again=w))[0],
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_are_looked_into(tmp_path, saved, name):
    torch.save(WRAPPED[name](inner(saved)), tmp_path / "x.pt")
    assert_equal_states(vae3d.load(tmp_path / "x.pt").state_dict(), saved.state)


SEVERAL = {
    "ema": lambda a, b: {"model": a, "ema": b},
    "lightning": lambda a, b: {"state_dict": {f"model.{k}": v for k, v in a.items()} | {f"ema.{k}": v for k, v in b.items()}},
    "teacher": lambda a, b: {"state_dict": a | {f"ema.net.{k}": v for k, v in b.items()}},
    "list": lambda a, b: [a, {"ema": b}],
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_vaes_one_is_chosen_by_part(tmp_path, saved, name):
    file = tmp_path / "last.ckpt"
    torch.save(SEVERAL[name](inner(saved), inner(saved, scale=2.0)), file)
    with pytest.raises(CheckpointError, match=r"holds 2 VAEs: .*ema.*; .*part=") as error:
        vae3d.load(file)
    chosen = {"part": "ema"} if name != "teacher" else {"part": "ema.net"}
    for model in (vae3d.load(file, **chosen), vae3d.load(f"{file}::ema")):
        assert torch.equal(model.state_dict()["module.quant_conv.bias"], 2 * saved.state["module.quant_conv.bias"])
    other = str(error.value).split("VAEs: ")[1].split(" ")[0]
    assert_equal_states(vae3d.load(file, part=other).state_dict(), saved.state)
    with pytest.raises(CheckpointError, match=r"part=student .*none of its VAEs; use one of"):
        vae3d.load(file, part="student")


def test_a_student_and_its_teacher_of_another_layout_are_two(tmp_path, saved):
    teacher = {f"teacher.{k}": v for k, v in wan.model("wan").state_dict().items()}
    torch.save({"state_dict": inner(saved, "student.") | teacher}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"state_dict\.teacher \(wan\), state_dict\.student \(diffusers\)"):
        vae3d.load(tmp_path / "x.ckpt")
    assert read_checkpoint(tmp_path / "x.ckpt", part="teacher").layout == "wan"
    assert_equal_states(vae3d.load(tmp_path / "x.ckpt", part="student").state_dict(), saved.state)


def test_every_command_takes_a_part(tmp_path, saved):
    file = tmp_path / "last.ckpt"
    torch.save({"model": inner(saved), "ema": inner(saved, scale=2.0)}, file)
    assert [*path_issues({"checkpoint": f"{file}::ema", "teacher.path": f"{file}::ema"})] == []
    (issue,) = path_issues({"checkpoint": f"{file}x::ema"})
    assert (issue.key, issue.value) == ("checkpoint", f"{file}x::ema")
    arguments = [f"{file}::ema", str(tmp_path / "out"), "--to", "export", "--scaling_factor", "0.5"]
    assert tiny.status("convert", *arguments) == 0
    assert vae3d.load(tmp_path / "out").scaling_factor == 0.5
    with pytest.raises(CheckpointError, match="is an export, which holds one model; leave out the part 'ema'"):
        vae3d.load(tmp_path / "out", part="ema")
    (tmp_path / "a::b").write_text("")
    assert split_part(tmp_path / "a::b") == (tmp_path / "a::b", None)


# Folders

FOLDERS = {
    "fp16": (["diffusion_pytorch_model.fp16.safetensors"], 0),
    "fp32 before fp16": (["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"], 1),
    "index of a variant": (["diffusion_pytorch_model.safetensors.index.fp16.json", "README.md"], 0),
    "bin index": (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], 0),
    "official Wan2.1": (
        ["config.json", "diffusion_pytorch_model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"], 3,
    ),
    "official Wan2.2": (
        ["diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model-00001-of-00003.safetensors", "Wan2.2_VAE.pth"], 2,
    ),
    "pipeline": (["model_index.json", "model.safetensors", "unet/x.bin", "vae/diffusion_pytorch_model.bin"], 3),
    "Stable Diffusion": (["v1-5-pruned.ckpt", "v1-5.safetensors", "vae/diffusion_pytorch_model.safetensors"], 2),
    "a lone file": (["ae.sft", "README.md"], 0),
    "Open-Sora": (["config.json", "model.safetensors"], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_the_vae_of_a_downloaded_folder_is_found(tmp_path, name):
    names, expected = FOLDERS[name]
    for file in names:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    assert find_weights(tmp_path) == tmp_path / names[expected]


@pytest.mark.parametrize(
    "names",
    [
        ["Wan2.1_VAE.pth", "Wan2.2_VAE.pth"],
        ["taew2_1.pth", "taehv.pth"],
        ["model.fp16.safetensors", "model.bf16.safetensors"],
    ],
)
def test_a_folder_with_a_choice_asks(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError, match="give one of them") as error:
        find_weights(tmp_path)
    assert all(name in str(error.value) for name in names)


def test_a_hub_id_gets_the_command_that_downloads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (error,) = map(str, path_issues({"checkpoint": "stabilityai/sd-vae-ft-mse"}))
    assert "hf download stabilityai/sd-vae-ft-mse --local-dir sd-vae-ft-mse, then give sd-vae-ft-mse" in error
    with pytest.raises(CheckpointError, match=r'hf download .*1\.3B --include "\*vae\*" "\*VAE\*"'):
        vae3d.load("Wan-AI/Wan2.1-T2V-1.3B")
    Path("owner").mkdir()
    for path in ("owner/name", "runs/name", "weights/name", "out/name", "/a/b", "stabilityai/vae.pt", "a/b/c"):
        with pytest.raises(CheckpointError, match=r"no such file or folder$"):
            vae3d.load(path)


@pytest.mark.parametrize("folder", ["", "weights/", "my weights/"])
def test_the_published_file_of_wan_gets_the_command_that_downloads_it_to_where_it_is_missing(
    tmp_path, monkeypatch, folder
):
    monkeypatch.chdir(tmp_path)
    (error,) = map(str, path_issues({"stage.init_from": f"{folder}Wan2.2_VAE.pth"}))
    command = shlex.split(error[error.index("hf download") :])
    assert command[2:] == ["Wan-AI/Wan2.2-TI2V-5B", "Wan2.2_VAE.pth", "--local-dir", folder.rstrip("/") or "."]


def test_sharded_files_and_their_index_open(tmp_path, saved):
    state = inner(saved)
    halves = [dict(list(state.items())[i::2]) for i in range(2)]
    for number, half in enumerate(halves):
        torch.save(half, tmp_path / f"diffusion_pytorch_model-{number}.bin")
    places = {key: f"diffusion_pytorch_model-{number}.bin" for number, half in enumerate(halves) for key in half}
    index = tmp_path / "diffusion_pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    for path in (tmp_path, index):
        assert_equal_states(vae3d.load(path).state_dict(), saved.state)


# Latent factors


def test_a_config_without_scaling_factor_means_the_default_of_diffusers(tmp_path):
    AutoencoderKL(**KL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    default = config.pop("scaling_factor")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert vae3d.load(tmp_path).scaling_factor == default == 0.18215


def test_a_lone_file_does_not_say_its_factor_and_reconstructs_nevertheless(tmp_path, saved):
    save_file(inner(saved), tmp_path / "vae.safetensors")
    model = vae3d.load(tmp_path / "vae.safetensors")
    video = torch.rand(1, 3, 1, 8, 8)
    with torch.no_grad():
        z = model.encode(video).mode()
        assert model(video).video.shape == video.shape
    for call in (model.normalize, model.denormalize):
        with pytest.raises(UserError, match=r"scaling_factor .* not known; .*0\.18215"):
            call(z)
    with pytest.raises(UserError, match="scaling factor of the latents is not known"):
        open_codec(tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="scaling factor is not known; give --scaling_factor"):
        write_diffusers(read_checkpoint(tmp_path / "vae.safetensors"), tmp_path / "out")
    loaded = vae3d.load(tmp_path / "vae.safetensors", scaling_factor=0.3611, shift_factor=0.1159)
    torch.testing.assert_close(loaded.normalize(z), (z - 0.1159) * 0.3611)
    write_export(read_checkpoint(tmp_path / "vae.safetensors"), tmp_path / "export")
    assert vae3d.load(tmp_path / "export").scaling_factor is None


@pytest.mark.parametrize(
    ("beside", "channels", "factors"),
    [
        ("cond_stage_model.transformer.x", 4, (0.18215, 0.0)),
        ("conditioner.embedders.0.x", 4, (0.13025, 0.0)),
        ("model.diffusion_model.joint_blocks.0.x", 16, (1.5305, 0.0609)),
        ("model.diffusion_model.double_blocks.0.x", 16, (0.3611, 0.1159)),
        ("model.diffusion_model.double_blocks.0.x", 4, (None, 0.0)),
        ("something.else", 4, (None, 0.0)),
    ],
)
def test_a_whole_checkpoint_says_which_model_its_vae_is_of(tmp_path, beside, channels, factors):
    network = ["model.channels=[32,32,32,32]", "model.layers=1", f"model.latent_channels={channels}"]
    whole = checkpoint("spatial", network, tmp_path)
    state = {f"first_stage_model.{key}": tensor for key, tensor in ldm.to_ldm(inner(whole)).items()}
    save_file({k: v.contiguous() for k, v in state.items()} | {beside: torch.zeros(1)}, tmp_path / "x.safetensors")
    config = read_checkpoint(tmp_path / "x.safetensors").config
    assert (config["scaling_factor"], config["shift_factor"] or 0.0) == factors


# config.json


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "relu"}, "act_fn is relu, and must be silu"),
        ({"block_out_channels": [32, 64]}, "block_out_channels is"),
        ({"layers_per_block": 2}, "layers_per_block is 2"),
        ({"latent_channels": 16}, "latent_channels is 16"),
        ({"in_channels": 4}, "in_channels is 4"),
        ({"down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]}, "down_block_types is"),
        ({"use_quant_conv": False}, "use_quant_conv is False"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        ({"new_option": 3}, "new_option=3 is not supported"),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "does not build a AsymmetricAutoencoderKL from this config"),
        ({"act_fn": "swish", "sample_size": 9, "force_upcast": False, "shift_factor": None, "_name": 1}, None),
    ],
)
def test_every_key_of_a_config_is_used_checked_or_refused(tmp_path, change, message):
    AutoencoderKL(**KL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    if message is None:
        vae3d.load(tmp_path)
    else:
        with pytest.raises(CheckpointError, match=message):
            vae3d.load(tmp_path)


@pytest.mark.parametrize("multipliers", [[2, 4], [2, 2], [1, 2]])
def test_wan_whose_first_level_is_wider_than_its_first_convolution_opens(tmp_path, multipliers):
    torch.manual_seed(0)
    size = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "temperal_downsample": [True]}
    theirs = AutoencoderKLWan(
        **size, dim_mult=multipliers, latents_mean=[0.1] * 4, latents_std=[2.0] * 4, scale_factor_temporal=2,
        scale_factor_spatial=2,
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = vae3d.load(tmp_path)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.no_grad():
        z = theirs.encode(video).latent_dist.mean
        torch.testing.assert_close(ours.encode(video).mean, z, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.decode(z).clamp(-1, 1), theirs.decode(z).sample, rtol=0, atol=1e-5)
    write_diffusers(read_checkpoint(tmp_path), tmp_path / "again")
    assert_equal_states(vae3d.load(tmp_path / "again").state_dict(), ours.state_dict())


def test_the_config_of_a_diffusion_model_beside_the_official_file_is_not_its_own(tmp_path):
    torch.save(wan.model("wan").state_dict(), tmp_path / "Wan2.1_VAE.pth")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 5120, "latents_mean": [7]}))
    save_file({"blocks.0.weight": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert read_checkpoint(tmp_path).layout == "wan"
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLQwenImage"}))
    with pytest.raises(CheckpointError, match=r"AutoencoderKLQwenImage.* does not fit the model"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", [torch.int32, torch.bool, torch.complex64])
def test_weights_of_whole_or_complex_numbers_are_refused(tmp_path, saved, kind):
    torch.save({key: tensor.to(kind) for key, tensor in inner(saved).items()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="tensors not floating-point: module"):
        vae3d.load(tmp_path / "x.pt")


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
@pytest.mark.parametrize("name", ["model.yaml", "config.json"])
def test_a_configuration_that_is_no_file_is_not_passed_over(tmp_path, saved, name, kind):
    if name == "model.yaml":
        write_export(saved, tmp_path)
    else:
        write_diffusers(saved, tmp_path)
    file = tmp_path / name
    file.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda path: path.symlink_to(path.name)}[kind](file)
    with pytest.raises(CheckpointError, match=name):
        vae3d.load(tmp_path)


@pytest.mark.parametrize("path", ["/dev/zero", "pipe.pth", "loop.pth"])
def test_a_path_that_is_neither_file_nor_folder_is_called_so(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.pth")
    Path("loop.pth").symlink_to("loop.pth")
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        vae3d.load(path)


def test_a_path_that_is_too_long_is_one_error():
    with pytest.raises(CheckpointError, match="no such file or folder"):
        vae3d.load("/tmp/" + "x" * 5000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(1, 16, 4, 8, 8), "is a single tensor, such as latents"),
        ({"1.weight": torch.zeros(2), "3.conv.0.weight": torch.zeros(2), "3.conv.4.weight": torch.zeros(2)}, "TAESD"),
    ],
)
def test_latents_and_a_taesd_are_called_what_they_are(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        vae3d.load(tmp_path / "x.pt")
