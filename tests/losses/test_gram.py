"""Gram losses against the formulas of the published programs, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision

from tests import tiny
from tests.losses.test_erp import clip_and_error, loaded, loss_of
from tests.losses.test_objective import as_clip
from vae3d.losses.gram import RECIPES, Gram
from vae3d.losses.pixel_weights import ErpCosine
from vae3d.models.layers.frames import frames_of
from vae3d.types import Reconstruction

COSMOS = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)


@pytest.fixture(scope="module")
def features(trunks) -> torch.nn.Module:
    """VGG16's features, with its in-place ReLUs."""
    with tiny.unfilled_weights():
        network = torchvision.models.vgg16(weights=None).features
    state = torch.load(trunks / "vgg16-397923af.pth", weights_only=True)
    network.load_state_dict({key.removeprefix("features."): value for key, value in state.items()})
    return network.requires_grad_(False)


def scaled(video: torch.Tensor) -> torch.Tensor:
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    return (frames_of(video) - shift[:, None, None]) / scale[:, None, None]


def layers(network: torch.nn.Module, frames: torch.Tensor) -> list[torch.Tensor]:
    """Every layer's output, as a list in which in-place layers change the entry before."""
    found = []
    for layer in network:
        frames = layer(frames)
        found.append(frames)
    return found


def vrae(network, video, rec, size):
    total = 0
    pairs = [layers(network, F.interpolate(scaled(x), (size, size), mode="bilinear")) for x in (video, rec)]
    for a, b in zip(*pairs, strict=True):
        c, h, w = a.shape[1:]
        grams = [torch.einsum("nchw,ndhw->ncd", x, x) / (c * h * w) for x in (a, b)]
        total = total + (grams[0] - grams[1]).square().mean()
    return total


def cosmos(network, video, rec):
    total = 0
    pairs = [[layers(network[:30], scaled(x))[i] for i in (3, 8, 15, 22, 29)] for x in (video, rec)]
    for weight, a, b in zip(COSMOS, *pairs, strict=True):
        (n, c, h, w), clips = a.shape, len(video)
        a, b = (x.view(clips, n // clips, c, h, w) for x in (a, b))
        grams = [torch.einsum("btchw,btdhw->bcd", x, x) / (n // clips * h * w) for x in (a, b)]
        total = total + weight * (grams[0] - grams[1]).square().mean()
    return total


@pytest.mark.parametrize("recipe", ["vrae", "cosmos"])
def test_value_and_gradient_equal_the_published_formula(features, recipe):
    clip, out = clip_and_error(0.3 * torch.randn(2, 3, 3, 16, 24, generator=torch.Generator().manual_seed(0)))
    clip.video += 0.2
    size = {"size": 32} if recipe == "vrae" else {}
    loss = loss_of(loaded(Gram(recipe=recipe, frame_batch=2, **size)), clip, out)
    published = (
        vrae(features, clip.video, out.video, 32) if recipe == "vrae" else cosmos(features, clip.video, out.video)
    )
    torch.testing.assert_close(loss, published, rtol=1e-6, atol=0)
    (ours,), (theirs,) = (torch.autograd.grad(x, out.video) for x in (loss, published))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item())


def test_vrae_resizes_frames_to_224_unless_told_otherwise():
    assert [recipe.size for recipe in RECIPES.values()] == [224, None]


def test_a_texture_may_lie_elsewhere(trunks):
    """A clip that is mirrored has an L1 error, and nearly the same Gram matrices."""
    video = torch.rand(1, 3, 2, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    term = loaded(Gram(recipe="cosmos"))
    mirrored, blurred = video.flip(3).flip(4), F.avg_pool3d(video, (1, 3, 3), 1, (0, 1, 1))
    values = [loss_of(term, as_clip(video), Reconstruction(rec, None, video)).item() for rec in (mirrored, blurred)]
    assert (mirrored - video).abs().mean() > (blurred - video).abs().mean()
    assert values[0] < values[1]


def test_the_weight_of_a_position_is_that_of_its_share_of_the_matrix():
    features, weight = torch.rand(2, 5, 4, 6), torch.zeros(2, 1, 8, 1)
    weight[:, :, 4:] = 2.0
    term = Gram(recipe="cosmos")
    torch.testing.assert_close(term._gram(features, weight), term._gram(features[:, :, 2:], None))
    torch.testing.assert_close(term._gram(features, torch.ones(2, 1, 8, 1)), term._gram(features, None))


def test_rows_alike_weigh_as_none(trunks):
    clip, out = clip_and_error(0.3 * torch.randn(1, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0)))
    term = loaded(Gram(size=32))
    plain, weighted = (loss_of(term, clip, out, weight).item() for weight in (None, ErpCosine(blend=0)))
    assert weighted == pytest.approx(plain, rel=1e-5)


def test_arguments_are_checked(trunks):
    with pytest.raises(ValueError, match="recipe is 'style'"):
        Gram(recipe="style")
    clip, out = clip_and_error(torch.zeros(1, 3, 1, 8, 8))
    with pytest.raises(ValueError, match=r"at least 16 pixels; these are\s+8x8"):
        loss_of(Gram(recipe="cosmos"), clip, out)
    with pytest.raises(ValueError, match=r"at least 32 pixels; these are\s+16x16"):
        loss_of(Gram(recipe="vrae", size=16), clip, out)
