"""The adaptive weight: hand-computed values, its layer, its errors, and its cost with checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import tiny
from vae3d.adversarial.adaptive import AdaptiveWeight
from vae3d.training.freeze import train_parts

CPU = torch.device("cpu")


class Decoder(nn.Module):
    """video = weight * z, whose gradients are those of the losses times z."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.first = nn.Parameter(torch.ones(2))

    def last_layers(self) -> list[nn.Parameter]:
        return [self.weight, self.first]


def weigh(model: nn.Module, most: float = 1e4, **losses: torch.Tensor) -> tuple[float, float]:
    adaptive = AdaptiveWeight(most)
    adaptive.load(model, CPU)
    found = [value.item() for value in adaptive(**losses)]
    if adaptive.sync_remaining(1):
        raise adaptive.error()
    return tuple(found)


def test_the_weight_is_the_ratio_of_gradient_norms_at_the_last_layer():
    model = Decoder()
    loss = (model.weight * torch.tensor([3.0, 4.0])).sum()  # gradient (3, 4), norm 5
    adversarial = (model.weight.square()).sum()  # gradient (2, 4)
    weight, clamped = weigh(model, loss=loss, adversarial=adversarial)
    assert weight == pytest.approx(5 / (20**0.5 + 1e-4), rel=1e-6)
    assert clamped == 0.0


def test_the_clamp_binds_and_says_so():
    model = Decoder()
    losses = {"loss": 1e3 * model.weight.sum(), "adversarial": model.weight.sum()}
    assert weigh(model, most=10.0, **losses) == (10.0, 1.0)
    assert weigh(model, most=1e4, **losses) == (pytest.approx(1e3, rel=1e-3), 0.0)


def test_a_layer_that_is_frozen_gives_way_to_the_one_behind_it():
    model = Decoder()
    model.weight.requires_grad_(False)
    losses = {"loss": 3 * model.first.sum(), "adversarial": model.first.sum()}
    assert weigh(model, **losses)[0] == pytest.approx(3, rel=1e-3)


def test_it_raises_where_the_published_one_switches_the_gan_off():
    model = Decoder()
    reaching = model.weight.sum()
    for losses in (
        {"loss": model.first.sum(), "adversarial": reaching},
        {"loss": reaching, "adversarial": model.first.sum()},
    ):
        with pytest.raises(ValueError, match="no loss term reaches the last layer that trains"):
            weigh(model, **losses)
    with pytest.raises(ValueError, match="a weight of 0: no other loss has a gradient at the last layer"):
        weigh(model, loss=0 * reaching, adversarial=reaching)
    assert weigh(model, loss=0 * reaching, adversarial=0 * reaching)[0] == 0  # a clip without a valid pixel
    model.requires_grad_(False)
    model.other = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="no layer that ends at the pixels trains"):
        weigh(model, loss=model.other.sum(), adversarial=model.other.sum())


@pytest.mark.parametrize("broken", ["loss", "adversarial"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_makes_the_weight_so_and_is_never_clamped_away(broken, value):
    model = Decoder()
    losses = {name: model.weight.sum() * (value if name == broken else 1.0) for name in ("loss", "adversarial")}
    assert torch.tensor(weigh(model, **losses)[0]).isnan()


@pytest.mark.parametrize("name", tiny.MODEL)
def test_every_model_knows_the_layers_that_end_at_its_pixels(name):
    model = tiny.model(name)
    last = model.last_layers()
    frames = 5 if name == "taehv" else 3
    video = model(torch.randn(1, 3, frames, 16, 16), sample=False).video
    (gradient,) = torch.autograd.grad(video.square().mean(), last[0], retain_graph=True)
    assert gradient.abs().sum() > 0
    names = {id(p): key for key, p in model.named_parameters()}
    assert len(last) == (2 if name in ("temporal_vae", "opensora_v1_2", "temporal_taef2", "temporal_diffusers") else 1)
    assert all("decoder" in names[id(p)] for p in last)
    assert last[0].shape[0] in (3, 12)  # colours, or those of patches of 2 x 2


def test_the_stage_decides_which_layer_is_the_last():
    model = tiny.model("temporal_vae")
    spatial, temporal = model.last_layers()
    adaptive = AdaptiveWeight(1e4)
    for parts, layer, kept in (
        ({"all": 1.0}, spatial, True),
        ({"temporal_encoder": 1.0, "temporal_decoder": 1.0}, temporal, False),
        ({"encoder": 1.0}, None, False),
    ):
        train_parts(model, parts)
        adaptive.load(model, CPU)
        assert adaptive.layer is layer
        assert model.spatial_vae.keep_last_input == kept


@pytest.mark.parametrize("name", ["spatial", "temporal_vae", "wan", "taehv"])
def test_a_checkpointed_decoder_gives_the_same_weight_outputs_and_gradients(name):
    key = "model.spatial.gradient_checkpointing" if name == "temporal_vae" else "model.gradient_checkpointing"
    video = torch.randn(2, 3, 5, 16, 16)
    found = []
    for checkpointing in ("false", "true"):
        model = tiny.model(name, f"{key}={checkpointing}").train()
        adaptive = AdaptiveWeight(1e4)
        adaptive.load(model, CPU)
        out = model(video, sample=False).video
        loss, adversarial = (out - video).abs().mean(), -out.square().mean()
        weight, _ = adaptive(loss, adversarial)
        (loss + weight * adversarial).backward()
        found.append((out, weight, *(p.grad for p in model.parameters())))
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_the_2d_decoder_is_recomputed_once_and_not_for_the_adaptive_weight():
    calls = []
    model = tiny.model("spatial", "model.gradient_checkpointing=true", "model.frame_batch=2").train()
    model.module.decoder.mid_block.register_forward_hook(lambda *_: calls.append(1))
    for kept, expected in ((True, 2 + 2), (False, 2 + 3 * 2)):  # four frames are two batches
        calls.clear()
        adaptive = AdaptiveWeight(1e4)
        adaptive.load(model, CPU)
        model.keep_last_input = kept
        out = model(torch.randn(1, 3, 4, 16, 16), sample=False).video
        weight, _ = adaptive(out.abs().mean(), -out.mean())
        (out.abs().mean() - weight * out.mean()).backward()
        assert len(calls) == expected
