"""The GAN's state: no trace of skipped steps, exact resume."""

from __future__ import annotations

import io
from copy import deepcopy

import pytest
import torch

from tests import tiny
from tests.adversarial import toy
from tests.adversarial.test_gan import FRAMES, START, clips_of
from tests.training import quick
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d.checkpoints.state import ResumeError
from vae3d.data.batches.clips import Unreadable

ALL = {
    "lecam": 0.1,
    "r1": 1.0,
    "r2": 1.0,
    "penalty_every": 2,
    "start": 2,
    "ramp": 3,
    "discriminator_start": 1,
    "scales": 2,
}


@pytest.fixture(scope="module")
def config(videos):
    """With all state that a GAN has, and its generator's loss from the third step on."""
    config = tiny.training("spatial", videos, *START, *FRAMES, *tiny.GAN, "data.batch_size=1", "trainer.max_steps=6",
                           "optim.schedule=cosine")  # fmt: skip
    config.adversary.update(ALL)
    return config


def state_of(t):
    return deepcopy((t.network.state_dict(), t.adversary.state_dict(), t.optimizer.state_dict()))


def train(adversary, steps):
    for step in steps:
        adversary.discriminator_loss(*toy.pair(seed=step), step)[0].backward()
        adversary.step(float(adversary.average_gradients()))


def test_a_gan_resumes_bit_equal_in_the_middle_of_the_adversarial_phase(config, tmp_path):
    whole = quick.trainer(config, tmp_path / "whole", **{"trainer.save_every": 0})
    whole.fit()
    first = quick.trainer(config, tmp_path / "parts", **{"trainer.save_every": 0})
    for step in range(4):  # the second of three of the ramp
        first.train_step(clips_of(first, step))
    first.checkpointer.save(first.step)
    first.log.close()
    second = quick.trainer(config, tmp_path / "parts", **{"trainer.save_every": 0})
    assert second.step == 4
    assert toy.same(state_of(second), state_of(first))
    second.fit()
    assert toy.same(state_of(second), state_of(whole))
    assert toy.same(second.ema.state_dict(), whole.ema.state_dict())
    changed = deepcopy(config)
    changed.adversary.update(lr=0.5, max_steps=1000)  # as where optim.lr and trainer.max_steps are raised
    third = quick.trainer(changed, tmp_path / "parts", **{"trainer.save_every": 0})
    third.train_step(clips_of(third, 6))
    assert third.adversary.optimizer.param_groups[0]["lr"] == pytest.approx(0.5, rel=1e-3)
    changed.adversary.update(norm="group")
    with pytest.raises(ResumeError, match=r"adversary\.norm: 'spectral_group' in the checkpoint, 'group' now"):
        quick.trainer(changed, tmp_path / "parts")
    moved = state_of(whole)[1]
    assert moved["averages"].all()
    assert not toy.same(moved["discriminator"], state_of(first)[1]["discriminator"])


@pytest.mark.parametrize("norm", ["spectral_group", "batch"])
def test_a_discarded_step_of_the_gan_leaves_no_trace(norm):
    settings = {"norm": norm, "lecam": 0.1}
    adversary, twin = toy.gan(**settings), toy.gan(**settings)
    for one in (adversary, twin):
        train(one, range(2))
    before = deepcopy(adversary.state_dict())
    for i in range(2):
        adversary.discriminator_loss(*toy.pair(seed=i), 2)[0].backward()
    assert toy.same(adversary.state_dict(), before)  # until `step` nothing is changed
    adversary.reset_step()
    assert all(p.grad is None for p in adversary.discriminator.parameters())
    for one in (adversary, twin):
        train(one, range(2, 4))
    assert toy.same(adversary.state_dict(), twin.state_dict())
    assert not toy.same(adversary.state_dict()["discriminator"], before["discriminator"])


def test_a_gradient_of_the_discriminator_that_is_not_finite_changes_nothing_but_the_count():
    adversary = toy.gan(lecam=0.1)
    train(adversary, range(2))
    before = deepcopy(adversary.state_dict())
    clip, out = toy.pair()
    out.video = out.video * float("nan")
    adversary.discriminator_loss(clip, out, 2)[0].backward()
    adversary.step(float(adversary.average_gradients()))
    assert toy.same(adversary.state_dict(), {**before, "skipped": 1})
    assert adversary.discriminator_loss(*toy.pair(), 3)[1]["gan/skipped"] == 1


@pytest.mark.parametrize("error", ["nan", "unreadable", "adaptive"])
def test_a_step_that_the_trainer_skips_leaves_no_trace_in_either_network(config, tmp_path, error):
    t = quick.trainer(config, tmp_path, **{"trainer.accumulate": 1})
    for step in range(4):
        t.train_step(clips_of(t, step))
    before = state_of(t)
    (clip,) = clips_of(t, 4)
    if error == "unreadable":
        clip = Unreadable([("gone.mp4", "is empty")])
    elif error == "nan":
        clip.video = clip.to("cpu").video * float("nan")
    else:  # only the discriminator's logits are not finite, and so its weight
        generator_criterion = t.adversary.generator_criterion
        t.adversary.generator_criterion = lambda real, fake: generator_criterion(real, fake) * float("inf")
    assert not t.train_step([clip]).applied
    network, adversary, optimizer = state_of(t)
    assert toy.same((network, adversary, optimizer["state"]), (*before[:2], before[2]["state"]))
    if error == "adaptive":
        t.adversary.generator_criterion = generator_criterion
    assert t.train_step(clips_of(t, 5)).applied


def test_gradients_of_the_discriminator_are_clipped_if_asked_for():
    moved = {}
    for grad_clip in (0.01, None):
        adversary = toy.gan(grad_clip=grad_clip)
        adversary.optimizer = torch.optim.SGD(adversary.discriminator.parameters(), lr=1e-3)
        before = [p.detach().clone() for p in adversary.discriminator.parameters()]
        train(adversary, range(1))
        after = adversary.discriminator.parameters()
        moved[grad_clip] = (
            torch.stack([(a.detach() - b).norm() for a, b in zip(after, before, strict=True)]).norm().item()
        )
        assert adversary.grad_norm > 0.1  # before it was clipped
    assert moved[0.01] == pytest.approx(1e-3 * 0.01, rel=1e-3)
    assert moved[None] > 1e-4


def test_the_discriminator_begins_as_the_seed_says_on_every_rank_and_draws_nothing_global():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = toy.gan(seed=3).discriminator.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert toy.same(toy.gan(seed=3).discriminator.state_dict(), first)
    assert not toy.same(toy.gan(seed=4).discriminator.state_dict(), first)


def test_the_state_of_a_gan_is_plain_tensors_and_numbers():
    adversary = toy.gan(lecam=0.1, scales=2)
    train(adversary, range(2))
    stream = io.BytesIO()
    torch.save(adversary.state_dict(), stream)
    stream.seek(0)
    twin = toy.gan(lecam=0.1, scales=2, seed=5)
    twin.load_state_dict(torch.load(stream, weights_only=True))
    assert toy.same(twin.state_dict(), adversary.state_dict())
    twin.load_rank_state_dict(adversary.rank_state_dict())


def test_a_discriminator_learns_to_tell_blurred_frames_and_its_generator_to_sharpen():
    """A generator with one parameter, the share of lost detail that it restores: 0 is blurred, 1 is the clip."""
    adversary = toy.gan(lr=5e-3, criterion="non_saturating")
    detail, right = torch.tensor(0.3, requires_grad=True), []
    for step in range(90):
        clip, out = toy.pair(seed=step, batch=4, frames=2)
        blurred = toy.blur(clip.video)
        out.video = blurred + detail * (clip.video - blurred)
        if step >= 50:
            loss, _ = adversary.generator_loss(clip, out, out.video.mean(), step)
            (gradient,) = torch.autograd.grad(loss, detail)
            detail.data -= 0.02 * gradient.sign()
        loss, metrics = adversary.discriminator_loss(clip, out, step)
        loss.backward()
        adversary.step(float(adversary.average_gradients()))
        right.append(metrics["gan/pair_accuracy"].item())
    assert sum(right[40:50]) / 10 > 0.9
    assert detail.item() > 0.8
