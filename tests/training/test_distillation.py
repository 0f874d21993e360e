"""A student takes its latents and features from a frozen teacher."""

from __future__ import annotations

import pytest
import torch

import vae3d
from tests import tiny
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d import loading
from vae3d.adversarial.base import UpdatePhase
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.checkpoints.state import ResumeError
from vae3d.commands import step_cost, train
from vae3d.config.issues import ConfigError
from vae3d.losses.distillation import FeatureDistillation, LatentDistillation
from vae3d.training.step_status import StepMetrics
from vae3d.training.teacher import (
    Distillation,
    StudentWithProjections,
    TeacherError,
    capture_activations,
    one_per_latent,
)
from vae3d.types import ClipBatch, Delta, Reconstruction, TeacherTargets

FACTORS = ["model.latents_mean=[1,2,3,4]", "model.latents_std=[2,2,2,2]"]
STUDENT = [
    "stage=finetune", "stage.init_from=random", "loss=distill", "teacher=vae", "teacher.precision=fp32",
    "data.frames.min=3", "data.frames.max=5", "data.frames.step=2", "model.channels=4",
]  # fmt: skip
FEATURES = ["teacher.features={decoder.middle.2: decoder.middle.2}", "loss.terms.features.weight=0.1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a tiny Wan VAE's export."""
    folder = tmp_path_factory.mktemp("teacher")
    overrides = [*tiny.MODEL["wan"], *FACTORS]
    model = tiny.model("wan", *FACTORS, seed=3)
    write_export(Checkpoint(loading.model_config("wan", *overrides), model.state_dict(), folder, "export"), folder)
    return folder


def trainer(videos, teacher, folder, *overrides, meta_check=False):
    config = tiny.training("wan", videos, *STUDENT, f"teacher.path={teacher}", *overrides, meta_check=meta_check)
    return train.build_trainer(config, folder)


def clip_of(frames=5, batch=2, side=16) -> ClipBatch:
    torch.manual_seed(1)
    video = torch.rand(batch, 3, frames, side, side) * 2 - 1
    return ClipBatch(video, torch.arange(batch), [""] * batch)


def test_the_lesson_is_the_teachers_mode_in_the_students_convention(teacher):
    network, student = vae3d.load(teacher), tiny.model("wan")
    clip = clip_of()
    z = network.encode(clip.video).mode()
    assert torch.equal(Distillation(network, student).compute_targets(clip).targets.z, z)
    student.latent = "normalized"
    assert torch.equal(Distillation(network, student).compute_targets(clip).targets.z, network.normalize(z))


def test_half_precision_leaves_the_mean_and_deviation_of_latents_alone(teacher):
    network, student = vae3d.load(teacher), tiny.model("wan")
    network.latents_std.fill_(2.8184)  # which bf16 would make 2.8125
    student.latent = "normalized"
    given = Distillation(network, student, dtype=torch.bfloat16)
    assert next(network.parameters()).dtype == torch.bfloat16
    assert network.latents_std.dtype == torch.float32
    assert float(network.latents_std.flatten()[0]) == pytest.approx(2.8184)
    assert given.compute_targets(clip_of()).targets.z.dtype == torch.float32


def test_a_raw_student_of_normalized_latents_is_refused(teacher):
    network = vae3d.load(teacher)
    network.latent = "normalized"
    with pytest.raises(TeacherError, match=r"the model's are raw; set model.latent=normalized"):
        Distillation(network, tiny.model("wan"))


def test_sampled_lessons_depend_on_the_clip_alone(teacher):
    given = Distillation(vae3d.load(teacher), tiny.model("wan"), sample=True, seed=7)
    both = clip_of()
    one = ClipBatch(both.video[1:], both.positions[1:], [""])
    drawn = given.compute_targets(both).targets.z
    torch.testing.assert_close(drawn[1:], given.compute_targets(one).targets.z)
    assert not torch.equal(drawn, vae3d.load(teacher).encode(both.video).mode())


@pytest.mark.parametrize(("decode", "shares"), [("teacher", {1.0}), ("own", {0.0}), ("mixed", None)])
def test_the_student_decodes_what_it_is_told(teacher, decode, shares):
    given = Distillation(vae3d.load(teacher), tiny.model("wan"), decode=decode)
    clip = given.compute_targets(clip_of())
    distilled = [given.latents(clip, step) is not None for step in range(100)]
    assert sum(distilled) / 100 in shares if shares else 0.3 < sum(distilled) / 100 < 0.7
    assert distilled == [given.latents(clip, step) is not None for step in range(100)]


def test_a_student_comes_nearer_to_its_teacher_which_stays_as_it_is(videos, teacher, tmp_path):
    more = ["trainer.max_steps=25", "trainer.save_every=25", "optim.lr=3e-3", "debug=overfit", "data.frames.min=5"]
    t = trainer(videos, teacher, tmp_path, *more, *FEATURES, meta_check=True)
    before = {name: tensor.clone() for name, tensor in t.distillation.teacher.state_dict().items()}
    clip = next(iter(t.data.clips(0, 1)))
    first, wanted = t.train_step([clip]).metrics, ("loss/latent", "loss/l1", "loss/features")
    nearer = False
    while not nearer and t.step < 25:
        metrics = t.train_step([clip]).metrics
        nearer = all(metrics[name] < 0.9 * first[name] for name in wanted)
    assert nearer
    assert all(torch.equal(tensor, before[name]) for name, tensor in t.distillation.teacher.state_dict().items())
    assert not any(p.requires_grad for p in t.distillation.teacher.parameters())
    assert not t.distillation.teacher.training


def test_encoder_and_decoder_learn_apart_where_the_teachers_latents_are_decoded(teacher):
    """No gradient of pixels reaches the encoder, none of latents the decoder."""
    student = tiny.model("wan")
    given = Distillation(vae3d.load(teacher), student)
    clip = given.compute_targets(clip_of())
    out = student(clip.video, latents=given.latents(clip, 0), encode=True)
    (out.video - clip.video).square().mean().backward(retain_graph=True)
    assert all(p.grad is None for p in student.encoder.parameters())
    student.zero_grad()
    LatentDistillation()(clip, out).map.mean().backward()
    assert all(p.grad is None for p in student.decoder.parameters())
    assert any(p.grad is not None for p in student.encoder.parameters())


def test_a_resumed_student_goes_on_bit_for_bit_with_its_projections(videos, teacher, tmp_path):
    runs = []
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        for last in stops:
            t = trainer(
                videos, teacher, tmp_path / name, f"trainer.max_steps={last}", *FEATURES, "teacher.decode=mixed"
            )
            t.fit()
        runs.append((t.network.state_dict(), t.projections.state_dict(), t.optimizer.state_dict()["state"]))
    for whole, parts in zip(runs[0][:2], runs[1][:2], strict=True):
        assert whole
        assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert runs[0][2].keys() == runs[1][2].keys()
    exported = vae3d.load(tmp_path / "whole")
    assert not any("projections" in name for name in exported.state_dict())


def test_other_features_make_another_run(videos, teacher, tmp_path):
    trainer(videos, teacher, tmp_path, *FEATURES).fit()
    with pytest.raises(ResumeError, match=r"teacher.features.decoder.middle.2: 'decoder.middle.2' in the checkpoint"):
        trainer(videos, teacher, tmp_path)


def test_what_is_counted_is_the_step_of_a_training(videos, teacher, tmp_path):
    t = trainer(
        videos, teacher, tmp_path, *FEATURES, "loss.logvar=0.5", "stage.latent_noise=0.3", "trainer.precision=bf16"
    )
    counted = step_cost.TrainingStep(t.config, torch.device("cpu"), vae3d.load(teacher))
    counted.student.load_state_dict(t.strategy.model.state_dict())
    clip = clip_of()
    t.forward_backward([clip], UpdatePhase(model=True, discriminator=False), 0, StepMetrics())
    counted.passes(clip, step=0)
    groups = [optimizer.param_groups for optimizer in (t.optimizer, counted.optimizer)]
    assert [group["part"] for group in groups[0]] == ["all", "projections", "logvar"]
    for mine, theirs in zip(*groups, strict=True):
        assert {name: theirs[name] for name in ("part", "lr_scale", "weight_decay")}.items() <= mine.items()
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            assert torch.equal(p.grad, q.grad)


def test_sampled_latents_of_a_teacher_are_counted(videos, teacher):
    config = tiny.training("wan", videos, *STUDENT, f"teacher.path={teacher}", "teacher.sample=true")
    needs = step_cost.vae_needs(config, 1, lambda: tiny.model("wan", *FACTORS))
    assert needs.stays["teacher"] > 0


@pytest.mark.parametrize("features", [[], FEATURES], ids=["plain", "features"])
def test_training_and_validation_turn_autocast_on_by_themselves(videos, teacher, tmp_path, features):
    t = trainer(videos, teacher, tmp_path, *features, "trainer.precision=bf16")
    for network in (t.network, t.strategy.model):
        with torch.autocast("cpu", enabled=False):  # as inside of DeepSpeed's engine
            assert network(clip_of().video).video.dtype == torch.bfloat16
    t.log.close()


def test_features_are_taken_where_latents_stand_for_frames():
    frames = torch.arange(8.0).view(1, 1, 8, 1, 1)
    assert one_per_latent(frames, 2).flatten().tolist() == [3.0, 7.0]
    assert one_per_latent(frames[:, :, :5], 2).flatten().tolist() == [0.0, 4.0]
    assert one_per_latent(frames[:, :, :1], 1).flatten().tolist() == [0.0]
    with pytest.raises(TeacherError, match="8 frames of features do not fit 3"):
        one_per_latent(frames, 3)
    assert one_per_latent(torch.arange(9.0).view(1, 1, 9, 1, 1), 3).flatten().tolist() == [0.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("name", "module", "size"),
    [("wan", "decoder.middle.2", "chunk_latents"), ("spatial", "module.decoder.mid_block", "frame_batch")],
)
def test_features_of_chunks_are_those_of_each_clip(name, module, size):
    network, video = tiny.model(name), clip_of().video
    found = []
    for chunks, clips in ((None, [video]), (1, [video]), (None, video.split(1))):
        setattr(network, size, chunks)
        each = []
        for clip in clips:
            with capture_activations(network, [module], len(clip)) as features:
                network(clip, sample=False)
            each.append(features(module))
        found.append(torch.cat(each))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-5)


def test_features_of_a_fused_layer_have_the_same_gradients_with_gradient_checkpointing():
    """Recomputed blocks of such a layer ran otherwise than in forward, and torch refused them."""
    name, gradients = "decoder.middle.0.residual.6", []
    for checkpointing in (False, True):
        network = tiny.model("wan", f"model.gradient_checkpointing={checkpointing}")
        width = network.get_submodule(name).out_channels
        out = StudentWithProjections(network, {name: (width, 2)})(clip_of().video, sample=False)
        out.features[name].sum().backward()
        gradients.append(network.decoder.conv1.weight.grad)
    torch.testing.assert_close(*gradients)


def test_losses_against_a_teacher_have_their_formulas():
    own, distilled = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1, 1), torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1)
    clip = clip_of(frames=1, batch=1)
    clip.targets = TeacherTargets(distilled, {"a": distilled, "b": own})
    out = Reconstruction(None, Delta(own), own, features={"a": own, "b": own + 1})
    assert LatentDistillation("mse")(clip, out).map.mean() == 2.5
    assert LatentDistillation("l1")(clip, out).map.mean() == 1.5
    assert LatentDistillation("l1")(clip, out).numel == 2
    assert FeatureDistillation()(clip, out).map.mean() == (2.5 + 1.0) / 2
    with pytest.raises(ValueError, match="norm is 'l3'; give one of mse, l1"):
        LatentDistillation("l3")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["teacher.path=/nowhere"], "teacher.path=/nowhere: no such file or folder"),
        (["teacher.path=???"], "teacher.path: required; set teacher.path=PATH"),
        (["teacher.path=null"], "distillation needs a teacher; set teacher=vae teacher.path=..., or the weights of its terms to 0"),
        (["data.frames.min=4", "data.frames.max=4"], "nearest are"),
        (["model.latent_channels=3", "model.latents_mean=null", "model.latents_std=null"], "teacher.path: the teacher has 4 latent channels and the model 3"),
        (["teacher.features={decoder.middle.9: decoder.middle.2}"], "the model has no module decoder.middle.9; in decoder.middle there are 0, 1, 2"),
        (["teacher.features={decoder.middle.2: decoder.mid}"], "the teacher has no module decoder.mid; in decoder there are conv1, middle, upsamples, head"),
        (["teacher.features={decoder.middle.2: decoder.head}", "loss.terms.features.weight=1"], "teacher.features.decoder.middle.2: the model's features are 2x2x2 where the teacher's decoder.head are 2x4x4"),
        (["teacher.features={decoder.middle.2: decoder.middle.2}"], "teacher.features: no loss term reads them"),
        (["loss.terms.features.weight=1"], "feature distillation needs teacher.features"),
        (["teacher.decode=both"], "teacher.decode=both: must be teacher, own or mixed"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_teacher_is_told_before_training(videos, teacher, overrides, reason):
    with pytest.raises(ConfigError) as error:
        tiny.training("wan", videos, *STUDENT, f"teacher.path={teacher}", *overrides, meta_check=True)
    assert reason in str(error.value)
