"""TAEHV as the student: of Wan's normalised latents, of CogVideoX's raw ones, of Open-Sora 1.2's chunks."""

from __future__ import annotations

import json
import re

import pytest
import torch

import vae3d
from tests import tiny
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d import loading
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.commands import train
from vae3d.commands.closing import closing
from vae3d.config.issues import ConfigError
from vae3d.training.teacher import Distillation
from vae3d.types import ClipBatch

WAN = ["model.channels=4", "model.multipliers=[1,1,1,1]", "model.downsample=[false,true,true]", "model.layers=1"]
WAN += ["model.latents_mean=[0.5" + ",0.5" * 15 + "]", "model.latents_std=[2" + ",2" * 15 + "]"]
STUDENT = ["stage=finetune", "stage.init_from=random", "loss=distill", "teacher=vae", "teacher.precision=fp32"]


def exported(folder, name, *overrides):
    torch.manual_seed(0)
    config = loading.model_config(name, *overrides)
    write_export(Checkpoint(config, loading.instantiate(config).state_dict(), folder, "export"), folder)
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("wan"), "wan", *WAN)


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = 4
    model = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * blocks, up_block_types=("CogVideoXUpBlock3D",) * blocks,
        block_out_channels=(4,) * blocks, layers_per_block=1, norm_num_groups=2, latent_channels=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("CogVideoX") / "vae"
    model.save_pretrained(folder)
    return folder.parent


def test_a_student_of_wan_gets_latents_as_the_diffusion_model_sees_them(wan):
    teacher, student = vae3d.load(wan), tiny.model("taehv")
    clip = ClipBatch(torch.rand(1, 3, 9, 16, 16) * 2 - 1, torch.zeros(1, dtype=torch.long), [""])
    targets = Distillation(teacher, student).compute_targets(clip).targets
    assert torch.equal(targets.z, (teacher.encode(clip.video).mode() - 0.5) / 2)
    assert targets.z.shape == student.encode(clip.video).mean.shape


def test_features_of_a_wan_decoder_reach_those_of_a_tiny_one(videos, wan, tmp_path):
    """Two stages of two networks with other frame rates; the published names."""
    pairs = "{decoder.5: decoder.middle.2, decoder.11: decoder.upsamples.3}"
    more = [f"teacher.path={wan}", f"teacher.features={pairs}", "loss.terms.features.weight=1", "debug=overfit"]
    more += [
        "data.frames.min=9",
        "data.frames.max=9",
        "optim.lr=3e-3",
        "trainer.max_steps=20",
        "trainer.publish.final_model=true",
    ]
    t = train.build_trainer(tiny.training("taehv", videos, *STUDENT, *more), tmp_path)
    clip = next(iter(t.data.clips(0, 1)))
    losses = [t.train_step([clip]).metrics["loss/features"] for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert len(t.projections) == 2
    t.checkpointer.save(t.step)
    expected = (
        json.loads((tmp_path / "final_model.json").read_text()) if (tmp_path / "final_model.json").exists() else None
    )
    expected = expected or json.loads((tmp_path / "model.json").read_text())
    assert (expected["variant"], expected["latent"], expected["frame_rule"]) == ("taew2_1", "normalized", "trimmed")
    assert re.search(rf"^published +{tmp_path}/final_model.pth$", closing(t, 0, 1.0, []), re.MULTILINE)
    final = vae3d.load(tmp_path / "final_model.pth").state_dict()
    assert all(torch.equal(tensor, final[name]) for name, tensor in vae3d.load(tmp_path).state_dict().items())


def clip_of_zeros(frames):
    return ClipBatch(torch.zeros(1, 3, frames, 16, 16), torch.zeros(1, dtype=torch.long), [""])


def cog(videos, cogvideox, *more):
    return tiny.training(
        "taehv", videos, *STUDENT, "model.variant=taecvx", f"teacher.path={cogvideox}", *more, meta_check=True
    )


def test_twelve_frames_of_cogvideox_are_refused_with_those_that_fit(videos, cogvideox):
    with pytest.raises(ConfigError) as error:
        cog(videos, cogvideox, "data.frames.min=12", "data.frames.max=12")
    assert "the model does not take 12 frames; nearest are 8, 9, 16, 17" in str(error.value)
    with pytest.raises(ConfigError) as error:  # which a student of Wan would take
        cog(videos, cogvideox, "model.variant=taew2_1", "data.frames.min=13", "data.frames.max=13")
    assert "teacher and model do not both take 13 frames of 16x16 whole" in str(error.value)
    assert "(teacher 16x4x2x2, model 16x4x2x2); nearest are 1, 9, 17, 25" in str(error.value)


@pytest.mark.parametrize("frames", [9, 8])
def test_a_student_of_cogvideox_trains_on_whole_clips(videos, cogvideox, tmp_path, frames):
    t = train.build_trainer(cog(videos, cogvideox, f"data.frames.min={frames}", f"data.frames.max={frames}"), tmp_path)
    t.fit()
    assert t.step == 2
    clip = clip_of_zeros(frames)
    distilled = t.distillation.compute_targets(clip).targets.z  # CogVideoX's student decodes raw latents
    assert torch.equal(distilled, t.distillation.teacher.encode(clip.video).mode())


def test_a_student_of_open_sora_has_its_latents_chunk_by_chunk(videos, tmp_path):
    small = ["model.temporal.multipliers=[1,1,2]", "model.spatial.channels=[8,8,8,8]"]
    teacher = exported(tmp_path / "opensora", "opensora_v1_2", *tiny.MODEL["opensora_v1_2"], *small)
    more = ["model.variant=taeos1_2", f"teacher.path={teacher}", "data.frames.min=18", "data.frames.max=18"]
    t = train.build_trainer(tiny.training("taehv", videos, *STUDENT, *more), tmp_path / "run")
    t.fit()
    assert t.network.latent_shape(18, 16, 16) == t.distillation.teacher.latent_shape(18, 16, 16) == (4, 6, 2, 2)


@pytest.mark.parametrize(
    ("trained", "warns"), [({"all": 1.0}, True), ({"encoder": 1.0, "decoder": 1.0}, True), ({"decoder": 1.0}, False)]
)
def test_without_a_teacher_a_warning_says_what_becomes_of_the_latents(videos, tmp_path, caplog, trained, warns):
    given = ["stage=finetune", "stage.init_from=random", "loss=recon_kl", "data.frames.max=5", "data.frames.min=5"]
    config = tiny.training("taehv", videos, *given)
    config.stage.train = trained
    train.build_trainer(config, tmp_path).log.close()
    assert ("no teacher (teacher=none)" in caplog.text) == warns
