"""The GAN in a training step: who learns from what, when, and what it costs. Each defect of the published loops that is
known to us has a test here that we do not have it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tests.adversarial import toy
from tests.training import quick
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d.adversarial.base import UpdatePhase
from vae3d.adversarial.gan import Gan
from vae3d.commands import meta_check
from vae3d.config import validate
from vae3d.config.check import check_rules
from vae3d.errors import UserError
from vae3d.training.failures import TooManyFailures
from vae3d.training.memory import PeakMemory
from vae3d.training.step_status import StepMetrics
from vae3d.types import ClipBatch

START = ["stage=finetune", "stage.init_from=random", "loss=recon_kl", "loss.reduction=mean"]
FRAMES = ["data.frames.min=2", "data.frames.max=2"]


@pytest.fixture(scope="module")
def config(videos):
    """A tiny 2D VAE with a GAN from the first step."""
    return tiny.training("spatial", videos, *START, *FRAMES, *tiny.GAN, "optim.eps=1e-3")


def with_gan(config, folder, **adversary):
    """A trainer of it. adversary: changed settings."""
    config = deepcopy(config)
    config.adversary.update(adversary)
    return quick.trainer(config, folder)


def clips_of(t, step=0):
    return list(t.data.clips(step, step + 1))


def gradients(network):
    return {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}


# ---- no leak in either direction


def passes_apart(t, adversary, clips):
    """Gradients of VAE and discriminator, each computed with separate copies."""
    model, critic = deepcopy(t.network), deepcopy(adversary.discriminator)
    weights = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    for clip in clips:
        clip, out = clip.to("cpu"), None
        out = model(clip.video, generator=clip.generators(0, "cpu"))
        loss, _ = t.objective(clip, out, 0)
        discriminator_criterion = deepcopy(critic).eval().requires_grad_(False)
        adversarial = -discriminator_criterion(toy.frames_of(out.video))[0].mean()
        last = model.module.decoder.conv_out.weight
        pull, push = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (loss, adversarial))
        whole = (loss + 0.5 * (pull / (push + 1e-4)) * adversarial) / len(clips)
        for (name, _), g in zip(weights.items(), torch.autograd.grad(whole, list(weights.values())), strict=True):
            total[name] += g
        critic.train()
        video = [toy.frames_of(v.detach()) for v in (clip.video, out.video)]
        of_real, of_fake = critic(torch.cat(video))[0].chunk(2)
        (0.5 * (F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean()) / len(clips)).backward()
    return total, gradients(critic)


def test_neither_network_has_a_gradient_of_the_others_pass(config, tmp_path):
    """Published defect: gradients leak between the two networks in the order of calls of train_autoencoderkl.py."""
    t = with_gan(config, tmp_path)
    t.train_step(clips_of(t))  # after which a leak would have left something
    clips = clips_of(t, 1) + clips_of(t, 2)
    expected = passes_apart(t, t.adversary, clips)
    t.forward_backward(clips, UpdatePhase(True, True), 1, StepMetrics())
    for found, apart in zip((gradients(t.network), gradients(t.adversary.discriminator)), expected, strict=True):
        assert found.keys() == apart.keys()
        for name, gradient in apart.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
            assert gradient.any(), name


@pytest.mark.parametrize("phase", [UpdatePhase(True, False), UpdatePhase(False, True)])
def test_a_network_whose_turn_it_is_not_gets_no_gradient(config, tmp_path, phase):
    t = with_gan(config, tmp_path)
    t.forward_backward(clips_of(t), phase, 1, StepMetrics())
    reached = [any(g is not None for g in gradients(n).values()) for n in (t.network, t.adversary.discriminator)]
    assert reached == list(phase)


def test_the_generators_pass_neither_iterates_powers_nor_moves_statistics():
    """Published defect: every forward pass in train mode, also the generator's, updates spectral norm's vectors."""
    for norm in ("spectral_group", "batch"):
        adversary = toy.gan(norm=norm)
        before = deepcopy(adversary.discriminator.state_dict())
        clip, out = toy.pair()
        for _ in range(3):
            adversary.generator_loss(clip, out, out.video.mean(), 0)
        assert toy.same(adversary.discriminator.state_dict(), before)
        adversary.discriminator_loss(clip, out, 0)[0].backward()
        assert toy.same(adversary.discriminator.state_dict(), before)  # kept aside until `step`
        adversary.step(float(adversary.average_gradients()))
        after = adversary.discriminator.state_dict()
        kept = [name for name, tensor in before.items() if torch.equal(after[name], tensor)]
        assert all(".5.parametrizations" in name for name in kept)  # of one row, which is found at once


def test_one_forward_pass_judges_clips_and_reconstructions():
    """So batch norms see both, and power iteration runs once."""
    adversary, shapes = toy.gan(), []
    adversary.discriminator.register_forward_pre_hook(lambda _, x: shapes.append(tuple(x[0].shape)))
    clip, out = toy.pair(batch=2, frames=3)
    adversary.discriminator_loss(clip, out, 0)
    assert shapes == [(12, 3, 16, 16)]


# ---- the adaptive weight in a step


def test_the_adaptive_weight_of_a_step_is_the_hand_computed_ratio(config, tmp_path):
    t = with_gan(config, tmp_path, weight=2.0)
    (clip,) = clips_of(t)
    clip = clip.to("cpu")
    out = t.network(clip.video, sample=False)
    loss, _ = t.objective(clip, out, 0)
    value = t.adversary.generator_criterion(toy.frames_of(clip.video), toy.frames_of(out.video))
    last = t.network.module.decoder.conv_out.weight
    pull, push = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (loss, value))
    found, metrics = t.adversary.generator_loss(clip, out, loss, 0)
    torch.testing.assert_close(metrics["gan/adaptive_weight"], pull / (push + 1e-4), rtol=1e-6, atol=0)
    torch.testing.assert_close(found, 2.0 * pull / (push + 1e-4) * value, rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics["gan/weight"], 2.0 * pull / (push + 1e-4), rtol=1e-6, atol=0)
    assert metrics["gan/clamped"] == 0.0
    fixed, metrics = with_gan(config, tmp_path / "fixed", weight=2.0, adaptive=False).adversary.generator_loss(
        clip, out, loss, 0
    )
    assert "gan/adaptive_weight" not in metrics
    assert fixed.item() == pytest.approx(2.0 * metrics["loss/gan"].item())


def test_an_adaptive_weight_without_a_layer_is_refused_before_training(config):
    encoder = deepcopy(config)
    encoder.stage.train = {"encoder": 1.0}
    encoder.stage.init_from = "published weights"
    (error,) = meta_check.issues(encoder)
    assert str(error).startswith(
        "adversary: a clip of 2 frames of 16x16 fails: no layer that ends at the pixels trains"
    )


def test_a_gan_that_begins_before_the_terms_on_pixels_is_refused_and_in_a_run_the_steps_are_saved(config, tmp_path):
    late = deepcopy(config)
    late.loss.terms["l1"].ramp = [3, 5]
    late.adversary |= {"start": 1}
    (error,) = meta_check.issues(late)
    assert (error.key, error.value) == ("adversary.start", 1)
    assert meta_check.issues(replace(late, adversary={**late.adversary, "start": 4})) == []
    with pytest.raises(UserError, match=r"adversary\.adaptive=true .*(\n.*)*all 1 finished steps are saved"):
        quick.trainer(late, tmp_path, **{"trainer.max_steps": 9}).fit()


def test_the_check_names_what_does_not_go_with_a_gan(config):
    def errors(**changes):
        changed = deepcopy(config)
        changed.trainer.strategy.deepspeed = {}
        for key, value in changes.items():
            node = {"precision": changed.trainer, "name": changed.trainer.strategy, "every": changed.trainer.ema}.get(
                key
            )
            changed.adversary.update({key: value}) if node is None else setattr(node, key, value)
        return [*check_rules(changed, validate.TRAINING_RULES), *meta_check.issues(changed)]

    assert errors() == errors(adaptive=False, alternate=True, precision="fp16") == []
    for changes, message in (
        ({"precision": "fp16"}, "adversary.adaptive=true: "),
        ({"name": "deepspeed"}, "adversary.adaptive=true: "),
        (
            {"name": "deepspeed", "adaptive": False, "alternate": True},
            "adversary.alternate=true: ",
        ),
        (
            {"alternate": True, "every": 2},
            "trainer.ema.every=2: ",
        ),
        (
            {"layers": 3},
            "adversary: a clip of 2 frames of 16x16 fails: the clip is 16x16; this discriminator needs 24 pixels",
        ),
        ({"norm": "layer"}, "adversary: cannot be built: adversary.norm is 'layer'; give one of"),
        ({"schedule": "sine"}, "adversary: cannot be built: adversary.schedule is 'sine'"),
    ):
        (error,) = errors(**changes)
        assert str(error).startswith(message)


# ---- when


def test_alternation_follows_the_requirements_table():
    adversary = toy.gan(start=50_001, alternate=True)
    vae, discriminator = UpdatePhase(True, False), UpdatePhase(False, True)
    table = {
        0: vae,
        1: vae,
        49_999: vae,
        50_000: vae,
        50_001: vae,
        50_002: discriminator,
        50_003: vae,
        50_004: discriminator,
    }
    assert {step: adversary.update_phase(step) for step in table} == table
    ahead = toy.gan(start=6, discriminator_start=4, alternate=True)
    assert [ahead.update_phase(step) for step in range(3, 8)] == [
        vae,
        UpdatePhase(True, True),
        UpdatePhase(True, True),
        vae,
        discriminator,
    ]


def updates(t, steps):
    """How often each network has been updated in so many steps."""
    for step in range(steps):
        before = deepcopy((t.network.state_dict(), t.adversary.discriminator.state_dict()))
        t.train_step(clips_of(t, step))
        after = t.network.state_dict(), t.adversary.discriminator.state_dict()
        yield tuple(not toy.same(a, b) for a, b in zip(before, after, strict=True))


def test_a_step_is_counted_once_and_the_discriminator_counts_its_own(config, tmp_path):
    """Published defect: a global step counts both optimizers' steps, which halves every interval."""
    t = with_gan(config, tmp_path, start=3, discriminator_start=1)
    assert list(updates(t, 5)) == [(True, False)] + 4 * [(True, True)]
    assert t.step == 5
    assert {int(state["step"]) for state in t.optimizer.state.values()} == {5}
    assert {int(state["step"]) for state in t.adversary.optimizer.state.values()} == {4}


def test_alternation_updates_one_network_per_step_of_the_trainer(config, tmp_path):
    t = with_gan(config, tmp_path, start=2, alternate=True, r1=1.0, penalty_every=2)
    assert list(updates(t, 6)) == [(True, False)] * 3 + [(False, True), (True, False), (False, True)]
    assert t.step == 6
    assert [t.adversary.apply_penalty(step) for step in (3, 5, 7, 9)] == [True, False, True, False]


def test_before_its_start_a_gan_costs_nothing():
    adversary = toy.gan(start=10, ramp=4, discriminator_start=6, weight=2.0)
    clip, out = toy.pair()
    adversary.discriminator, adversary.adaptive_weight = None, None  # which are not called, then
    for step in (0, 9, 10):
        assert adversary.generator_loss(clip, out, out.video.mean(), step) == (0, {})
    assert [adversary.update_phase(step).discriminator for step in (5, 6)] == [False, True]
    strengths = {step: adversary.weight_at(step) for step in (10, 11, 13, 14, 20)}
    assert strengths == {10: 0.0, 11: 0.5, 13: 1.5, 14: 2.0, 20: 2.0}


def test_no_gradient_is_asked_for_before_the_adaptive_weight_has_a_use(config, tmp_path, monkeypatch):
    t = with_gan(config, tmp_path, start=1)
    asked, last, grad = [], t.adversary.adaptive_weight.layer, torch.autograd.grad

    def counted(*given, **how):  # the norms of the network ask, too, for their own
        asked.extend([t.step] * (how.get("inputs") is last))
        return grad(*given, **how)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    for step in range(3):
        t.train_step(clips_of(t, step))
    assert asked == [1, 1, 2, 2]


def test_the_preflight_runs_both_updates_and_the_penalties(config, tmp_path):
    adversary = {"start": 1000, "alternate": True, "r1": 1.0, "r2": 1.0}
    seen = []
    t = with_gan(config, tmp_path, **adversary)
    for name in ("generator_loss", "penalties"):
        whole = getattr(t.adversary, name)
        setattr(t.adversary, name, lambda *a, name=name, whole=whole: (seen.append(name), whole(*a))[1])
    before = deepcopy(t.adversary.state_dict())
    t.preflight_enabled, t.config.trainer.max_steps = True, 1
    t.fit()
    assert seen[:2] == ["generator_loss", "penalties"]
    assert toy.same(t.adversary.state_dict(), before)


def test_the_preflight_takes_the_memory_of_both_optimizers(config, tmp_path):
    t = with_gan(config, tmp_path)
    with PeakMemory([]) as tried:
        t.preflight()
    t.train_step(clips_of(t, 0))
    with PeakMemory([]) as real:
        t.forward_backward(clips_of(t, 1), t.adversary.update_phase(1), 1, StepMetrics())
    moments = sum(2 * p.nbytes for network in (t.network, t.adversary.discriminator) for p in network.parameters())
    assert tried.peak == pytest.approx(real.peak + moments, rel=0.01)


def test_the_discriminators_learning_rate_is_of_its_own_steps(config, tmp_path):
    t = with_gan(
        config, tmp_path, start=4, discriminator_start=2, lr=0.1, warmup_steps=2, schedule="cosine", max_steps=8,
        betas=[0, 0.99],
    )  # fmt: skip
    assert t.adversary.optimizer.param_groups[0]["betas"] == (0.0, 0.99)
    rates = []
    for step in range(8):
        t.train_step(clips_of(t, step))
        rates.append(t.adversary.optimizer.param_groups[0]["lr"])
    assert rates[2:6] == pytest.approx([0.0, 0.05, 0.1, 0.1 * 0.5 * (1 + 2**-0.5)])


@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_discriminator_that_is_never_finite_stops_the_run(config, tmp_path, where, alternate):
    t = with_gan(config, tmp_path, alternate=alternate)
    t.discriminator_failures.limit = 3
    t.spikes.max_consecutive_skips = 20
    weight = next(t.adversary.discriminator.parameters())
    if where == "gradient":
        weight.register_hook(lambda gradient: gradient * torch.nan)
    else:
        weight.data.fill_(torch.nan)
        t.adversary.generator_loss = lambda *_: (torch.zeros(()), {})  # which alone would stop the run
    with pytest.raises(TooManyFailures, match=r"3 updates of the discriminator in a row.*max_consecutive_skips"):
        for step in range(9):
            t.train_step(clips_of(t, step))
    assert t.step == (6 if alternate else 3)


# ---- on what


def test_pixels_that_are_not_valid_count_as_reconstructed_perfectly():
    adversary = toy.gan(input="clips")
    clip, out = toy.pair()
    valid = torch.zeros_like(clip.video[:, :1], dtype=torch.bool)
    valid[..., 4:12, 4:12] = True
    clip = ClipBatch(clip.video, clip.positions, clip.paths, valid=valid)
    adversary.generator_loss(clip, out, out.video.mean(), 0)[0].backward()
    assert out.video.grad[valid.expand_as(out.video)].abs().min() > 0
    assert not out.video.grad[~valid.expand_as(out.video)].any()
    seen = []
    adversary.discriminator.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    adversary.discriminator_loss(clip, out, 0)
    fake = seen[0].chunk(2)[1]
    assert torch.equal(fake, torch.where(valid, out.video, clip.video))
    nothing = ClipBatch(clip.video, clip.positions, clip.paths, valid=torch.zeros_like(valid))
    assert adversary.discriminator_loss(nothing, out, 0)[1]["gan/pair_accuracy"] == 0


@pytest.mark.parametrize("settings", [{}, {"input": "clips"}, {"scales": 2, "r1": 1.0, "r2": 1.0}, {"criterion": "relativistic"},
                                      {"norm": "batch", "lecam": 0.1}, {"precision": "bf16"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("frames", [1, 5])
def test_black_and_constant_clips_of_any_length_stay_finite(settings, frames):
    adversary = toy.gan(**settings)
    for step, colour in enumerate((-1.0, 0.0, 1.0)):
        clip, out = toy.pair(frames=frames)
        clip.video.fill_(colour)
        out.video = torch.full_like(out.video, colour).requires_grad_()
        loss, metrics = adversary.generator_loss(clip, out, out.video.mean(), step)
        loss.backward()
        assert out.video.grad.isfinite().all()
        found, more = adversary.discriminator_loss(clip, out, step)
        found.backward()
        adversary.step(float(adversary.average_gradients()))
        assert all(value.isfinite() for value in (found, *metrics.values(), *more.values()))
    assert adversary.skipped == 0


def test_the_discriminator_sees_frames_or_clips():
    clip, out = toy.pair(frames=5)
    for kind, shape in (("frames", (20, 3, 16, 16)), ("clips", (4, 3, 5, 16, 16))):
        adversary, seen = toy.gan(input=kind), []
        adversary.discriminator.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
        adversary.discriminator_loss(clip, out, 0)
        assert seen[0].shape == shape
        first = seen[0][:5] if kind == "frames" else seen[0][0].transpose(0, 1)
        assert torch.equal(first, clip.video[0].transpose(0, 1))


def test_a_paired_criterion_compares_each_patch_with_its_own():
    adversary = toy.gan(criterion="relativistic", weight=1.0)
    clip, out = toy.pair()
    real, fake = (toy.frames_of(video) for video in (clip.video, out.video))
    frozen = deepcopy(adversary.discriminator).eval()
    gap = (frozen(real)[0] - frozen(fake)[0]).detach()
    loss, _ = adversary.generator_loss(clip, out, out.video.mean(), 0)
    torch.testing.assert_close(loss.detach(), F.softplus(gap).mean())


# ---- regularisers


def test_r1_and_r2_are_halved_scaled_and_lazy():
    clip, out = toy.pair(batch=1, frames=2)
    for step, due in ((2, True), (4, False), (5, True)):
        plain = toy.gan(start=2).discriminator_loss(clip, out, step)[0]
        adversary = toy.gan(start=2, r1=0.5, r2=3.0, penalty_every=3)
        loss, metrics = adversary.discriminator_loss(clip, out, step)
        assert ("gan/r1" in metrics, "gan/r2" in metrics) == (due, due)
        extra = 3 / 2 * (0.5 * metrics["gan/r1"] + 3.0 * metrics["gan/r2"]) if due else torch.tensor(0.0)
        torch.testing.assert_close(loss - plain, extra, rtol=1e-4, atol=1e-6)
    adversary.discriminator_criterion(toy.frames_of(clip.video), toy.frames_of(out.video.detach()))
    images = toy.frames_of(clip.video).requires_grad_()
    after = deepcopy(adversary.discriminator).eval()
    for name, buffer in after.named_buffers():
        buffer.copy_(adversary._buffers[name])
    (gradient,) = torch.autograd.grad(after(images)[0].sum(), images)
    patches = after(images)[0][0].numel()
    found = adversary.penalties(toy.frames_of(clip.video), toy.frames_of(out.video.detach()))["gan/r1"]
    torch.testing.assert_close(found, gradient.square().sum((1, 2, 3)).mean() / patches)


def test_penalties_are_taken_in_fp32_where_the_discriminator_computes_in_bf16():
    clip, out = toy.pair()
    metrics = [toy.gan(r1=1.0, r2=1.0, precision=p).discriminator_loss(clip, out, 0)[1] for p in ("fp32", "bf16")]
    assert metrics[0]["gan/discriminator_loss"] != metrics[1]["gan/discriminator_loss"]
    assert all(metrics[0][name] == metrics[1][name] for name in ("gan/r1", "gan/r2"))


def test_a_penalty_teaches_the_discriminator():
    clip, out = toy.pair()
    steep = {}
    for r1 in (0.0, 100.0):
        adversary = toy.gan(norm="none", r1=r1, lr=1e-2, penalty_every=1)
        for step in range(20):
            adversary.discriminator_loss(clip, out, step)[0].backward()
            adversary.step(float(adversary.average_gradients()))
        adversary.r1 = 1.0
        steep[r1] = adversary.discriminator_loss(clip, out, 0)[1]["gan/r1"].item()
    assert steep[100.0] < 0.1 * steep[0.0]


def test_lecam_sees_the_averages_of_the_steps_before_and_then_moves_them():
    adversary = toy.gan(lecam=0.5, lecam_decay=0.9, scales=2)
    expected = torch.zeros(2, 2)
    for step in range(3):
        means = []
        for i in range(2):  # micro-batches
            clip, out = toy.pair(seed=2 * step + i)
            loss, metrics = adversary.discriminator_loss(clip, out, step)
            loss.backward()
            torch.testing.assert_close(loss.detach(), metrics["gan/discriminator_loss"] + 0.5 * metrics["gan/lecam"])
            means.append(adversary._logit_means[-1])
            torch.testing.assert_close(adversary.averages, expected)
        adversary.step(float(adversary.average_gradients()))
        expected = 0.9 * expected + 0.1 * torch.stack(means).mean(0)
        torch.testing.assert_close(adversary.averages, expected)
    assert adversary.averages.abs().min() > 0


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": "pixels"}, "adversary.input is 'pixels'; give one of frames, clips"),
        ({"criterion": "wasserstein"}, "adversary.criterion is 'wasserstein'; give one of hinge, vanilla,"),
        ({"precision": "fp16"}, "adversary.precision is 'fp16'; give one of fp32, bf16"),
        ({"weight": -1.0}, "adversary.weight is -1.0; give a finite number from 0"),
        ({"scales": 0}, "adversary.scales is 0; give an integer from 1"),
        ({"penalty_every": 0}, "adversary.penalty_every is 0; give an integer from 1"),
        ({"lecam_decay": 1.0}, "adversary.lecam_decay is 1.0; give a finite number from 0 to 0.99"),
        ({"adaptive_max": 0.0}, "adversary.adaptive_max is 0.0; give a finite number from 1e-30"),
        ({"grad_clip": 0.0}, "adversary.grad_clip is 0.0; give a finite number from 1e-30"),
        ({"start": 5, "discriminator_start": 6}, "discriminator_start is 6, after adversary.start=5"),
        ({"norm": "batch", "r1": 1.0}, "adversary.norm=batch mixes images"),
    ],
)
def test_settings_of_a_gan_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Gan(**settings)


def test_pixels_that_nothing_makes_or_nothing_trains_are_refused():
    clip, out = toy.pair()
    out.video = out.video.detach()
    with pytest.raises(ValueError, match=r"no trained part reaches the pixels.* the GAN .*adversary=none"):
        toy.gan().generator_loss(clip, out, out.z.mean(), 0)
    out.video = out.video[:, :, :4]
    with pytest.raises(
        ValueError, match=r"\[2, 3, 5, 16, 16\], its reconstruction \[2, 3, 4, 16, 16\]; they must agree"
    ):
        toy.gan().discriminator_loss(clip, out, 0)
    out.video = None
    with pytest.raises(ValueError, match="the GAN needs reconstructed pixels"):
        toy.gan().discriminator_loss(clip, out, 0)
