"""Seraena's state: bounded buffer, no trace of skipped steps, exact resume."""

from __future__ import annotations

import io
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tests.adversarial import toy
from vae3d.adversarial.replay import ReplayBuffer
from vae3d.config.issues import ConfigError
from vae3d.types import Reconstruction


def state(adversary):
    return deepcopy({**adversary.state_dict(), "own": adversary.rank_state_dict()})


FRAMES = ["data.frames.min=1", "data.frames.max=1"]

# ---- the buffer


def nbytes(buffer):
    return sum(tensor.nbytes for pair in buffer.pairs for tensor in pair)


def test_the_buffer_grows_to_its_bound_and_then_replaces_at_random():
    buffer, draws = ReplayBuffer(20), torch.Generator().manual_seed(0)
    steps = torch.arange(60.0)[:, None, None, None]
    pushed = steps.expand(60, 9, 8, 8), steps.expand(60, 4, 2, 2)
    for first in range(0, 60, 10):
        assert len(buffer) == min(first, 20)
        assert nbytes(buffer) == len(buffer) * (9 * 8 * 8 + 4 * 2 * 2) * 2
        before = buffer.state_dict()
        values = [image.mean().item() for image in before["images"]]
        buffer.push(*(tensor[first : first + 10] for tensor in pushed), draws)
        assert [image.mean().item() for image in before["images"]] == values  # a state that was taken stays
    ages = torch.stack(buffer.state_dict()["images"])[:, 0, 0, 0]
    assert all(torch.equal(image[0, 0], context[0, 0, 0].expand(8)) for image, context in buffer.pairs)
    assert ages.max() >= 50
    assert ages.min() < 40  # which a queue of 20 would have lost
    assert all(tensor.dtype == torch.float16 for pair in buffer.pairs for tensor in pair)


def test_a_saved_buffer_is_as_large_as_the_buffer():
    buffer, draws = ReplayBuffer(20), torch.Generator().manual_seed(0)
    for _ in range(5):  # of whose batches some images are left
        buffer.push(torch.randn(40, 9, 16, 16), torch.randn(40, 4, 2, 2), draws)
    stream = io.BytesIO()
    torch.save(buffer.state_dict(), stream)
    assert nbytes(buffer) == 20 * (9 * 16 * 16 + 4 * 2 * 2) * 2
    assert stream.tell() < 1.2 * nbytes(buffer)


def test_what_is_not_finite_is_not_kept():
    buffer = ReplayBuffer(10)
    images, contexts = torch.zeros(4, 9, 8, 8), torch.zeros(4, 4, 1, 1)
    images[1, 0, 0, 0], images[2, 0, 0, 0], contexts[3, 0] = float("nan"), 1e6, float("inf")
    buffer.push(images, contexts, torch.Generator())
    assert len(buffer) == 1


# ---- steps


def test_a_discarded_step_leaves_no_trace():
    adversary = toy.seraena()
    toy.train(adversary, range(2))
    before = state(adversary)
    for seed in range(2):
        loss, _ = adversary.discriminator_loss(*toy.pair(seed), 2)
        loss.backward()
    assert any(p.grad is not None for p in adversary.discriminator.parameters())
    assert toy.same(state(adversary), before)  # until `step` nothing is changed, running statistics included
    adversary.reset_step()
    assert all(p.grad is None for p in adversary.discriminator.parameters())
    twin = toy.seraena()
    toy.train(twin, range(2))
    assert toy.train(adversary, range(2, 4), accumulate=2) == toy.train(twin, range(2, 4), accumulate=2)
    assert toy.same(state(adversary), state(twin))
    assert not toy.same(state(adversary)["discriminator"], before["discriminator"])


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count():
    adversary = toy.seraena()
    toy.train(adversary, range(2))
    before = state(adversary)
    clip, out = toy.pair()
    out.video = out.video * float("nan")
    adversary.discriminator_loss(clip, out, 2)[0].backward()
    adversary.step(float(adversary.average_gradients()))
    assert toy.same(state(adversary), {**before, "skipped": 1})
    assert adversary.discriminator_loss(*toy.pair(), 3)[1]["seraena/skipped"] == 1


def test_the_running_statistics_follow_every_micro_batch():
    adversary = toy.seraena()
    statistics = dict(adversary.discriminator.named_buffers())
    toy.train(adversary, range(1), accumulate=3)
    assert statistics["blocks.0.norm.num_batches_tracked"] == 3
    assert statistics["blocks.0.norm.running_mean"].abs().max() > 0


def test_gradients_are_clipped_if_asked_for():
    def moved(**settings):
        adversary = toy.seraena(lr=1.0, **settings)
        adversary.optimizer = torch.optim.SGD(adversary.discriminator.parameters(), lr=1.0)
        before = [p.detach().clone() for p in adversary.discriminator.parameters()]
        toy.train(adversary, range(1))
        after = adversary.discriminator.parameters()
        return torch.stack([(a.detach() - b).norm() for a, b in zip(after, before, strict=True)]).norm().item()

    assert moved(grad_clip=0.01) == pytest.approx(0.01, rel=1e-3)
    assert moved() > 0.1


# ---- resuming


def generator_run(adversary, image, steps):
    """Alternate updates of the pixels themselves and of the discriminator."""
    trace = []
    for step in steps:
        clip, out = toy.pair(seed=step)
        pixels = (out.video.detach() + image).requires_grad_()
        out = Reconstruction(pixels, None, out.z)
        loss, metrics = adversary.generator_loss(clip, out, F.mse_loss(pixels, clip.video), step)
        (gradient,) = torch.autograd.grad(loss, pixels) if loss else (torch.zeros_like(pixels),)
        image -= 100 * gradient.sum((0, 2), keepdim=True)
        adversary.discriminator_loss(clip, out, step)[0].backward()
        adversary.step(float(adversary.average_gradients()))
        trace.append({name: value.item() for name, value in metrics.items()})
    return trace


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("at", [2, 5])  # before the buffer is full and after; amid the ramp of the generator's loss
def test_a_resumed_run_is_bit_equal(norm, at):
    settings = {"norm": norm, "start": 1, "ramp": 8, "discriminator_start": 0, "buffer_length": 14}
    whole, image = toy.seraena(**settings), torch.zeros(1, 3, 1, 16, 16)
    trace = generator_run(whole, image, range(9))
    first, resumed_image = toy.seraena(**settings), torch.zeros(1, 3, 1, 16, 16)
    generator_run(first, resumed_image, range(at))
    stream = io.BytesIO()
    torch.save({"all": first.state_dict(), "own": first.rank_state_dict()}, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    second = toy.seraena(**settings)
    with torch.no_grad():  # whatever it began with
        for tensor in second.discriminator.state_dict().values():
            tensor.add_(1)
    second.load_state_dict(saved["all"])
    second.load_rank_state_dict(saved["own"])
    assert generator_run(second, resumed_image, range(at, 9)) == trace[at:]
    assert toy.same(state(second), state(whole))
    assert torch.equal(resumed_image, image)
    assert image.abs().max() > 1e-3


def test_a_rank_that_a_checkpoint_did_not_have_begins_with_an_empty_buffer():
    adversary = toy.seraena()
    toy.train(adversary, range(2))
    saved = adversary.rank_state_dict()
    adversary.load_rank_state_dict({})
    assert len(adversary.buffer) == 0
    with pytest.raises(ValueError, match="buffer holds 8 images; set buffer_length to at least that"):
        toy.seraena(buffer_length=7).load_rank_state_dict(saved)
    pair = 2 * sum(saved[name][0].numel() for name in ("images", "contexts"))
    with pytest.raises(ValueError, match=r"holds 8 images, .* GiB; set buffer_gib to at least that"):
        toy.seraena(buffer_gib=7.5 * pair / 2**30).load_rank_state_dict(saved)


def test_the_buffer_keeps_as_many_images_as_fit_into_buffer_gib():
    whole = toy.seraena()
    toy.train(whole, range(3))
    pair = 2 * sum(tensor.numel() for tensor in whole.buffer.pairs[0])
    limited = toy.seraena(buffer_length=1000, buffer_gib=10.5 * pair / 2**30)
    toy.train(limited, range(3))
    assert len(limited.buffer) == len(whole.buffer) == toy.SETTINGS["buffer_length"]
    assert toy.same(state(limited), state(whole))  # the same pairs were replaced
    clip, out = toy.pair()
    with pytest.raises(ValueError, match=r"adversary\.buffer_gib is .* one image of 3 frames takes"):
        toy.seraena(buffer_gib=0.5 * pair / 2**30).generator_loss(clip, out, torch.zeros(()), 0)


def test_draws_depend_on_seed_step_rank_and_micro_batch_and_on_nothing_global():
    def losses(**settings):
        adversary = toy.seraena(**settings)
        clip, out = toy.pair(batch=8)  # the same for all
        return [adversary.discriminator_loss(clip, out, step)[0].item() for step in (0, 0, 1)]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = losses()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert losses() == one
    assert len(set(one)) == 3
    assert losses(rank=1)[0] != one[0]
    weights = [toy.seraena(seed=seed, rank=rank).discriminator.state_dict() for seed, rank in ((0, 0), (0, 1), (1, 0))]
    assert toy.same(weights[0], weights[1])
    assert not toy.same(weights[0], weights[2])


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp16"}, "adversary.precision is 'fp16'; give one of fp32, bf16"),
        ({"norm": "instance"}, "adversary.norm is 'instance'; give one of batch, group"),
        ({"context": "last"}, "adversary.context is 'last'; give one of mean, nearest"),
        ({"frames": 0}, "adversary.frames is 0; give an integer from 1"),
        ({"weight": -1.0}, "adversary.weight is -1.0; give a finite number from 0"),
        ({"fresh_fraction": 1.5}, "adversary.fresh_fraction is 1.5; give a finite number from 0 to 1"),
        ({"eps": 0.0}, "adversary.eps is 0.0; give a finite number from 1e-30"),
        ({"buffer_length": 0}, "adversary.buffer_length is 0; give an integer from 1"),
        ({"channels": []}, r"adversary.channels is \[\]; give a list"),
        ({"start": 5, "discriminator_start": 6}, "discriminator_start is 6, after adversary.start=5"),
    ],
)
def test_settings_of_seraena_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        toy.seraena(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda clip, out: setattr(out, "video", None), "Seraena needs reconstructed pixels"),
        (lambda clip, out: setattr(out, "video", out.video[:, :, :4]), r"\[2, 3, 5, 16, 16\], its reconstruction \[2, 3, 4"),
        (lambda clip, out: setattr(out, "z", out.z[:1]), r"latents of 2 clips are \[2, C, t, h, w\]; these are \[1, 4, 2"),
        (lambda clip, out: setattr(out, "z", out.z[:, 0]), r"latents of 2 clips are .* these are \[2, 2, 2, 2\]"),
        (lambda clip, out: setattr(out, "z", out.z[:, :3]), "have 3 channels, adversary.context_channels is 4; set it to 3"),
        (lambda clip, out: setattr(out, "z", out.z[..., :1]), r"are \[9, 16, 16\] and \[4, 2, 1\], those in Seraena's buffer"),
    ],
)  # fmt: skip
def test_clips_that_do_not_fit_are_refused_before_anything_is_kept(change, message):
    adversary = toy.seraena()
    toy.train(adversary, range(1))
    before = state(adversary)
    clip, out = toy.pair()
    change(clip, out)
    with pytest.raises(ValueError, match=message):
        adversary.discriminator_loss(clip, out, 1)
    assert not adversary._pending
    assert toy.same(state(adversary), before)


def test_another_resolution_is_refused_in_the_same_step_and_later():
    adversary = toy.seraena()
    adversary.discriminator_loss(*toy.pair(), 0)[0].backward()
    message = (
        r"are \[9, 24, 24\] and \[4, 3, 3\], those in Seraena's buffer \[9, 16, 16\] and \[4, 2, 2\]; train at one"
    )
    with pytest.raises(ValueError, match=message):
        adversary.discriminator_loss(*toy.pair(side=24), 0)
    adversary.step(float(adversary.average_gradients()))
    with pytest.raises(ValueError, match=message):
        adversary.discriminator_loss(*toy.pair(side=24), 1)
    adversary.discriminator_loss(*toy.pair(frames=1), 1)  # of other lengths images are alike


def test_images_too_small_are_refused():
    with pytest.raises(ValueError, match="7x7; Seraena needs 8 pixels or more"):
        toy.seraena()._inputs(*toy.pair(side=7))
    clip, out = toy.pair(batch=1, frames=1, side=8)
    with pytest.raises(ValueError, match=r"gives the batch norms a single value; use adversary.norm=group"):
        toy.seraena().discriminator_loss(clip, out, 0)
    assert toy.seraena(norm="group").discriminator_loss(clip, out, 0)[0].isfinite()


def test_pixels_that_no_trained_part_makes_are_refused():
    clip, out = toy.pair()
    out.video = out.video.detach()
    with pytest.raises(ValueError, match=r"no trained part reaches the pixels.* Seraena"):
        toy.seraena().generator_loss(clip, out, out.video.mean(), 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adversary.wieght=2", "adversary.wieght: is not an argument of vae3d.adversarial.seraena.Seraena; did you mean adversary.weight?"),
        ("adversary.norm=layer", "adversary: cannot be built: adversary.norm is 'layer'; give one of batch, group"),
        ("adversary.context_channels=16", "adversary: a clip of 1 frame of 16x16 fails: the latents have 4 channels, adversary.context_channels is 16; set it to 4"),
    ],
)  # fmt: skip
def test_the_check_names_what_is_wrong_with_seraena(videos, override, message):
    given = ["stage=finetune", "stage.init_from=random", "loss=recon_kl", *FRAMES, *tiny.SERAENA]
    config = tiny.training("spatial", videos, *given)
    assert config.adversary["betas"] == [0.9, 0.99]
    with pytest.raises(ConfigError) as error:
        tiny.training("spatial", videos, *given, override, meta_check=True)
    assert [str(issue) for issue in error.value.issues] == [message]
