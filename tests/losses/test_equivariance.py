"""Equivariance: its draws, its targets, and training with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tests.losses.test_objective import as_clip
from tests.training import quick
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d.config.issues import ConfigError
from vae3d.config.schema import LossTerm
from vae3d.losses.equivariance import Equivariance, Transform
from vae3d.losses.objective import Objective, WeightedTerm
from vae3d.losses.pixel_weights import ErpCosine
from vae3d.models.interface import attach_decoder
from vae3d.types import ClipBatch, Reconstruction

MODELS = ("spatial", "temporal_vae", "opensora_v1_2", "wan", "wan22", "taehv")
TURN, HALF = {"scales": [1.0], "rotations": [1]}, {"scales": [0.5], "rotations": [0]}


def enlarged(z: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """A decoder that repeats pixels: rotating and mirroring commute with it."""
    return F.interpolate(z, video.shape[2:], mode="nearest")


def pooled(video: torch.Tensor, decode=enlarged) -> tuple[ClipBatch, Reconstruction]:
    z = F.avg_pool3d(video, (1, 2, 2))
    return as_clip(video), Reconstruction(decode(z, video), None, z, decode=decode)


def coded(
    name: str, frames: int, size: tuple[int, int], *overrides: str
) -> tuple[torch.nn.Module, ClipBatch, Reconstruction]:
    model = tiny.model(name, *overrides)
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, frames, *size, generator=generator) * 2 - 1
    out = model(video, generator=torch.Generator().manual_seed(1))
    return model, as_clip(video), attach_decoder(out, model)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_a_decoder_that_turns_along_has_no_error(quarters, flip):
    blocks = torch.rand(2, 3, 2, 3, 5).repeat_interleave(2, -1).repeat_interleave(2, -2)
    clip, out = pooled(blocks)
    if (quarters, flip) != (0, False):
        term = Equivariance(scales=[1.0], rotations=[quarters], flip=flip, probability=1.0)
        assert term(clip, out).map.abs().max() == 0
    assert Equivariance(**HALF, probability=1.0)(clip, out).map.min() > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_the_error_is_that_of_the_transformed_clip(name):
    frames = 5 if name == "taehv" else 3
    size = (16, 32) if name == "taehv" else (8, 16)
    model, clip, out = coded(name, frames, size)
    turned = model(torch.rot90(clip.video, 1, (-2, -1)), latents=torch.rot90(out.z, 1, (-2, -1))).video
    expected = (turned - torch.rot90(clip.video, 1, (-2, -1))).abs().mean()
    error = Equivariance(**TURN, probability=1.0)(clip, out)
    torch.testing.assert_close(error.map.flatten(), expected[None])
    assert error.numel == 3 * size[0] * size[1]

    target, z = (halved(x) for x in (clip.video, out.z))
    squares = (model(target, latents=z).video - target).square().mean()
    squared = Equivariance(**HALF, probability=1.0, norm="l2")(clip, out).map
    torch.testing.assert_close(squared.flatten(), squares[None])


def halved(x: torch.Tensor) -> torch.Tensor:
    """Frame by frame, with a window of four pixels."""
    small = (x.shape[3] // 2, x.shape[4] // 2)
    frames = [F.interpolate(frame, small, mode="bilinear", antialias=True) for frame in x.unbind(2)]
    return torch.stack(frames, 2)


def test_scaled_latents_are_whole_and_pixels_are_their_multiple():
    seen = []

    def decode(z, video):
        seen.append((*z.shape[-2:], *video.shape[-2:]))
        return enlarged(z, video)

    clip, out = pooled(torch.rand(1, 3, 1, 14, 6), decode)
    for scale in (0.25, 0.6, 1.0):
        Equivariance(scales=[scale], rotations=[3], probability=1.0)(clip, out)
    assert seen[1:] == [(1, 2, 2, 4), (2, 4, 4, 8), (3, 7, 6, 14)]


def test_a_constant_stays_a_constant_at_any_scale():
    clip, out = pooled(torch.full((1, 3, 2, 16, 16), 0.7))
    for scale in (0.25, 0.4, 0.9):
        term = Equivariance(scales=[scale], rotations=[0], probability=1.0)
        assert term(clip, out).map.item() == pytest.approx(0, abs=1e-6)


def test_draws_depend_on_seed_and_position_alone():
    term = Equivariance(seed=3)
    drawn = [term.draw(position) for position in range(400)]
    assert drawn == [Equivariance(seed=3).draw(position) for position in range(400)]
    assert drawn != [Equivariance(seed=4).draw(position) for position in range(400)]
    assert 160 < sum(tau is not None for tau in drawn) < 240
    assert set(drawn) == {None, *term.transforms}
    assert len(term.transforms) == 15
    assert (1.0, False, 0) not in term.transforms


def test_a_clip_counts_the_same_in_any_batch():
    video = torch.rand(4, 3, 2, 8, 12)
    clip, out = pooled(video)
    clip = replace(clip, positions=torch.tensor([7, 8, 9, 11]))
    together = Equivariance()(clip, out).map.flatten()
    assert 0 < (together == 0).sum() < 4  # some draw nothing
    for i in range(4):
        alone = ClipBatch(video[i : i + 1], clip.positions[i : i + 1], [""])
        one = Equivariance()(alone, replace(out, z=out.z[i : i + 1])).map
        torch.testing.assert_close(one.flatten(), together[i : i + 1], rtol=1e-6, atol=0)


def test_a_rehearsal_draws_what_costs_most():
    term = Equivariance(scales=[0.5, 0.75], rotations=[0, 1], probability=0.01)
    assert term.draw(-1) == term.draw(-7) == Transform(0.75, False, 1)


def learned(name: str, *overrides: str) -> dict[str, torch.Tensor]:
    """Gradients of the term on five frames (a multiple of most things)."""
    size = (16, 16) if name == "taehv" else (8, 8)
    model, clip, out = coded(name, 5, size, *overrides)
    Equivariance(scales=[0.5], rotations=[2], probability=1.0)(clip, out).map.mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_encoder_and_decoder_learn_from_it(name):
    grads = learned(name)
    assert all(grad is not None for grad in grads.values())
    parts = tiny.model(name).trainable_parts()
    assert {"encoder", "decoder"} <= parts.keys()
    for part in ("encoder", "decoder"):
        inside = [key for key in grads if part in key]
        assert inside
        assert sum(grads[key].abs().sum() for key in inside) > 0


@pytest.mark.parametrize("name", ["spatial", "wan", "taehv"])
def test_gradient_checkpointing_changes_nothing(name):
    plain = learned(name, "model.gradient_checkpointing=false")
    recomputed = learned(name, "model.gradient_checkpointing=true")
    for key, grad in plain.items():
        torch.testing.assert_close(recomputed[key], grad, rtol=1e-4, atol=1e-8)


def test_weights_and_masks_turn_with_the_clip():
    video = torch.rand(1, 3, 2, 8, 16)
    clip, out = pooled(video)
    row = Objective({"e": WeightedTerm(Equivariance(**TURN, probability=1.0), 1.0)}, "mean", ErpCosine())
    error = (torch.rot90(enlarged(out.z, video) - video, 1, (-2, -1))).abs()
    weight = torch.rot90(ErpCosine()(8, "cpu")[:, None].expand(8, 16), 1, (-2, -1))
    torch.testing.assert_close(row(clip, out, 0)[0], (error * weight).mean())

    valid = torch.ones(1, 1, 2, 8, 16, dtype=torch.bool)
    valid[..., 2:4, 2:4] = False
    for settings in (TURN, HALF):
        plain = Objective({"e": WeightedTerm(Equivariance(**settings, probability=1.0), 1.0)}, "mean")
        losses = []
        for value in (-1.0, 1.0):  # of what was not measured
            shown = torch.where(valid, video, torch.tensor(value))
            losses.append(plain(replace(clip, video=shown, valid=valid), out, 0)[0])
        torch.testing.assert_close(*losses)
        assert losses[0] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": [0.5, 1.5]}, r"scales\[1\] is 1.5; give a finite number from 1e-30 to 1"),
        ({"rotations": [90]}, r"rotations\[0\] is 90; give one of 0, 1, 2, 3"),
        ({"probability": 0.0}, "probability is 0.0; give a finite number from 1e-30 to 1"),
        ({"norm": "huber"}, "norm is 'huber'; give one of l1, l2"),
        ({"scales": [1.0], "rotations": [0]}, "only the identity"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Equivariance(**settings)


def test_it_says_what_it_misses():
    clip, out = pooled(torch.rand(1, 3, 1, 8, 8))
    with pytest.raises(ValueError, match=r"Reconstruction\.decode"):
        Equivariance()(clip, replace(out, decode=None))
    narrow = replace(clip, video=clip.video[..., :7], positions=torch.tensor([-1]))
    with pytest.raises(ValueError, match="8x7 pixels have latents of 4x4"):
        Equivariance()(narrow, out)


def test_what_a_model_cannot_decode_shows_before_the_run(videos):
    """Although one clip in a hundred draws it: where the poles are padded, half of a row must be whole latents."""
    term = "{_target_: vae3d.losses.equivariance.Equivariance, scales: [0.2], rotations: [0], probability: 0.01}"
    with pytest.raises(ConfigError, match="loss: a clip of 1 frame of 16x32 fails: "):
        tiny.training(
            "wan", videos, "stage=finetune", "stage.init_from=random", "loss=recon_kl", "data.width=32",
            "data.frames.max=1", "data.frames.min=1", "model.pad_w=circular", "model.pad_h=pole",
            f"++loss.terms={{e: {{term: {term}}}}}", meta_check=True,
        )  # fmt: skip


def test_a_run_decodes_under_autocast_and_in_its_rehearsal(videos, tmp_path):
    term = {"_target_": "vae3d.losses.equivariance.Equivariance", "probability": 1e-9}
    terms = quick.checked(videos).loss.terms | {"equivariance": LossTerm(term)}
    t = quick.trainer(videos, tmp_path, **{"loss.terms": terms, "trainer.precision": "bf16", "trainer.save_every": 0})
    seen = []
    hook = t.network.module.decoder.conv_in.register_forward_hook(
        lambda _m, _in, out: seen.append((out.dtype, *out.shape))
    )
    t.preflight()
    assert seen == [(torch.bfloat16, 2, 8, 8, 8), *[(torch.bfloat16, 1, 8, 8, 8)] * 2]
    seen.clear()
    values = t.train_step([next(t.data.clips(0, 1))]).metrics
    hook.remove()
    assert len(seen) == 1  # at such a probability nothing is drawn, and nothing decoded
    assert values["loss/equivariance"] == 0.0


def test_a_clip_that_draws_none_has_a_gradient_of_zero():
    """Ranks with different draws have gradients of the same parameters, even if this is the only term on pixels."""
    model, clip, out = coded("spatial", 1, (8, 8))
    error = Equivariance(probability=1e-9)(clip, out).map.mean()
    error.backward()
    assert error == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
