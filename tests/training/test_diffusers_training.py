"""Autoencoders of diffusers by model.path: fine-tuned, put back into a pipeline, found in the hub's cache."""

from __future__ import annotations

import json
import shutil

import diffusers
import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

import vae3d
from tests import tiny
from tests.models import diffusers_tiny
from vae3d.commands import train
from vae3d.commands.cli import check_training
from vae3d.config.validate import training_issues
from vae3d.errors import UserError
from vae3d.loading import initialize
from vae3d.models.diffusers_vae import DiffusersVAE
from vae3d.models.taehv import TAEHV, VARIANTS
from vae3d.models.wan import WanVAE
from vae3d.pixels import no_value_checks

SMALL = [
    "data.height=8", "data.width=8", "data.batch_size=2", "data.workers=0", "trainer.precision=fp32",
    "trainer.max_steps=2", "trainer.log_every=1", "trainer.save_every=2", "validation.every=0", "logger=none",
    "optim.lr=1e-3", "optim.warmup_steps=0", "trainer.robust.preflight=false", "data.frames.min=5", "data.frames.max=5",
    "loss=recon_kl",
]  # fmt: skip


class Autoencode(diffusers.DiffusionPipeline):
    """The part of a pipeline that is of interest here."""

    def __init__(self, vae) -> None:
        super().__init__()
        self.register_modules(vae=vae)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def pipeline(kind: str, folder):
    Autoencode(diffusers_tiny.model(kind).vae).save_pretrained(folder)
    return folder


def configured(videos, *overrides: str):
    cfg = tiny.compose("experiment=diffusers_finetune", *SMALL, f"data.source.path={videos}", *overrides)
    return training_issues(cfg)


@pytest.mark.parametrize("kind", ["AutoencoderKLWan", "AutoencoderKLLTXVideo"])
def test_a_vae_is_fine_tuned_and_put_back_into_its_pipeline(kind, videos, tmp_path):
    folder, run = pipeline(kind, tmp_path / "pipeline"), tmp_path / "run"
    before = Autoencode.from_pretrained(folder).vae
    config, issues = configured(videos, f"model.path={folder}")
    assert not issues
    assert config.model["kind"] == kind
    assert "path" not in config.model
    trainer = train.build_trainer(config, run)
    trainer.fit()
    assert trainer.step == 2
    shutil.rmtree(folder / "vae")
    assert tiny.status("convert", run, folder / "vae", "--to", "diffusers") == 0

    ours, theirs = vae3d.load(run).double(), Autoencode.from_pretrained(folder).vae.eval()
    assert type(theirs) is type(before)
    after = theirs.state_dict()
    for key, tensor in before.state_dict().items():  # decoder_only: the latents stay
        changed = key.startswith(("decoder.", "post_quant_conv.")) and tensor.numel() > 1
        assert torch.equal(tensor, after[key]) != changed or "running" in key, key
    theirs, video = theirs.double(), diffusers_tiny.clip(kind).double()
    with torch.no_grad():
        z = theirs.encode(video).latent_dist.mode()
        torch.testing.assert_close(ours.encode(video).mode(), z, rtol=0, atol=1e-6)
        more = {"temb": z.new_zeros(1)} if kind == "AutoencoderKLLTXVideo" else {}
        torch.manual_seed(0)
        expected = theirs.decode(z, **more).sample
        torch.testing.assert_close(ours.decode(z).clamp(-1, 1), expected.clamp(-1, 1), rtol=0, atol=1e-6)


def test_a_path_without_a_served_autoencoder_is_an_error_of_model_path(videos, tmp_path):
    def error(*overrides: str) -> str:
        _, (issue,) = configured(videos, "stage.init_from=random", *overrides)
        assert issue.key == "model.path"
        return str(issue)

    assert "required" in error()
    assert "no such file" in error(f"model.path={tmp_path}/nowhere")
    assert "config.json" in error(f"model.path={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "_class_name" in error(f"model.path={tmp_path}")


@pytest.mark.parametrize(("kind", "reason"), [("VQModel", "discrete codes"), ("AutoencoderKLMagic", "use one of")])
def test_a_class_that_is_not_served_is_an_error_before_anything_starts(videos, tmp_path, kind, reason):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
    cfg = tiny.compose(
        "experiment=diffusers_finetune", *SMALL, f"data.source.path={videos}", f"model.path={tmp_path}",
        "stage.init_from=random",
    )  # fmt: skip
    with pytest.raises(UserError, match=f"{kind}.*{reason}"):
        check_training(cfg)


# The autoencoder of diffusers that a TAEHV's latents are of; Open-Sora 1.3's is not in diffusers.
TEACHERS = {
    "taehv": ("AutoencoderKLHunyuanVideo", {}, 5),
    "taecvx": ("AutoencoderKLCogVideoX", {}, 9),
    "taew2_1": ("AutoencoderKLWan", {}, 5),
    "taew2_2": ("AutoencoderKLWan", {"patch_size": 2, "in_channels": 12, "out_channels": 12}, 5),
    "taehv1_5": (
        "AutoencoderKLHunyuanVideo15", {"block_out_channels": [8, 8, 16, 16, 16], "spatial_compression_ratio": 16}, 5,
    ),
    "taeltx_2": ("AutoencoderKLLTX2Video", {"patch_size": 4}, 9),
    "taeltx2_3_wide": ("AutoencoderKLLTX2Video", {"patch_size": 4}, 9),
    "taeh3": (
        "AutoencoderKLMiniMaxH3",
        {"spatial_downsample_factors": [2, 2, 2, 2], "temporal_downsample_factors": [1, 2, 2, 1]}, 22,
    ),
}  # fmt: skip


def test_every_variant_has_a_teacher_of_its_strides():
    own = {"taeos1_2", "taeos1_3"}  # learn from vae3d's opensora_v1_2 and opensora_v1_3
    assert {variant.removesuffix("_super") for variant in VARIANTS} - own == TEACHERS.keys()


@pytest.mark.parametrize("variant", TEACHERS)
def test_a_teacher_of_diffusers_fits_the_variant(variant):
    kind, changes, frames = TEACHERS[variant]
    with torch.device("meta"):
        teacher = DiffusersVAE(kind, diffusers_tiny.CONFIGS[kind] | changes)
        student = TAEHV(variant=variant, channels=8, decoder_channels=[8, 8, 8, 8])
    assert (teacher.spec.time_stride, teacher.spec.space_stride) == (
        student.spec.time_stride,
        student.spec.space_stride,
    )
    for count in range(1, 60):
        if teacher.frames_valid(count):
            assert student.frames_valid(count)
            assert teacher.latent_shape(count, 64, 96)[1:] == student.latent_shape(count, 64, 96)[1:]
    assert teacher.frames_valid(frames)
    with torch.device("meta"), no_value_checks():
        assert teacher.encode(torch.zeros(1, 3, frames, 64, 64)).mode().shape[2] == student.latent_frames(frames)


def test_a_repository_is_found_in_the_hubs_cache_only(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--ltx"
    pipeline("AutoencoderKLLTXVideo", repository / "snapshots/123")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("123")
    config, issues = configured(videos, "model.path=owner/ltx")
    assert not issues
    assert config.stage.init_from == "owner/ltx"
    model = vae3d.load("owner/ltx")
    assert isinstance(model, DiffusersVAE)
    assert model.spec.space_stride == model.vae.spatial_compression_ratio
    _, issues = configured(videos, "model.path=owner/other")
    assert {issue.key for issue in issues} == {"model.path", "stage.init_from"}
    assert "hf download owner/other" in str(issues[0])


def test_qwen_images_vae_also_starts_a_wan(tmp_path):
    """The same network, for what only WanVAE has: panoramas, exact tiles."""
    theirs = diffusers.AutoencoderKLQwenImage(**diffusers_tiny.CONFIGS["AutoencoderKLWan"]).eval()
    diffusers_tiny.randomised(theirs).save_pretrained(tmp_path)
    ours = WanVAE(
        channels=4, multipliers=(1, 1, 1, 1), layers=1, latent_channels=4, pad_w="circular", **diffusers_tiny.STATS
    )
    assert any("starts from" in line for line in initialize(ours, str(tmp_path)))
    adapted = vae3d.load(tmp_path, pad_w="circular")
    panorama = diffusers_tiny.clip("AutoencoderKLWan").repeat(1, 1, 1, 1, 3)
    with torch.no_grad():
        circular, expected = ours(panorama, sample=False), adapted(panorama, sample=False)
        torch.testing.assert_close(circular.z, expected.z, rtol=0, atol=1e-5)
        torch.testing.assert_close(circular.video, expected.video, rtol=0, atol=1e-5)
    ours = vae3d.load(tmp_path, WanVAE(channels=4, multipliers=(1, 1, 1, 1), layers=1, latent_channels=4))
    video = diffusers_tiny.clip("AutoencoderKLWan")
    with torch.no_grad():
        z = theirs.encode(video).latent_dist.mode()
        torch.testing.assert_close(ours.encode(video).mode(), z, rtol=0, atol=1e-5)
    assert isinstance(vae3d.load(tmp_path), DiffusersVAE)
