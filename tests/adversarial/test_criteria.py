"""Adversarial losses and regularisers on fixed logits, against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch

from vae3d.adversarial.criteria import CRITERIA, gradient_penalty, lecam, over_scales

REAL, FAKE = torch.tensor([[2.0, 0.0], [-1.0, 0.5]]), torch.tensor([[-3.0, 0.0], [1.0, -0.5]])


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


ENTROPY = 0.5 * (mean(softplus(-x) for x in (2, 0, -1, 0.5)) + mean(softplus(y) for y in (-3, 0, 1, -0.5)))
HINGE = 0.5 * ((0 + 1 + 2 + 0.5) / 4 + (0 + 1 + 2 + 0.5) / 4)
RAISE = -(-3 + 0 + 1 - 0.5) / 4
NON_SATURATING = mean(softplus(-y) for y in (-3, 0, 1, -0.5))
GAPS = (5, 0, -2, 1)  # D(x) - D(y), patch by patch


@pytest.mark.parametrize(
    ("name", "discriminator", "generator"),
    [
        ("hinge", HINGE, RAISE),
        ("vanilla", ENTROPY, RAISE),
        ("non_saturating", ENTROPY, NON_SATURATING),
        ("hinge_non_saturating", HINGE, NON_SATURATING),
        ("relativistic", mean(softplus(-g) for g in GAPS), mean(softplus(g) for g in GAPS)),
    ],
)
def test_a_criterion_has_the_values_of_its_formula(name, discriminator, generator):
    criterion = CRITERIA[name]
    assert criterion.discriminator(REAL, FAKE).item() == pytest.approx(discriminator, rel=1e-6)
    assert criterion.generator(REAL, FAKE).item() == pytest.approx(generator, rel=1e-6)
    assert criterion.paired == (name == "relativistic")


def test_every_criterion_has_a_value_test():
    assert set(CRITERIA) == {"hinge", "vanilla", "non_saturating", "hinge_non_saturating", "relativistic"}


@pytest.mark.parametrize("name", CRITERIA)
def test_better_logits_lower_the_loss_of_each_network(name):
    """The discriminator's losses have gradients of both logits, the generator's of the fakes' only."""
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    up, down = torch.autograd.grad(CRITERIA[name].discriminator(real, fake), (real, fake))
    assert (up <= 0).all()
    assert (down >= 0).all()
    (pull,) = torch.autograd.grad(CRITERIA[name].generator(real, fake), fake)
    assert (pull < 0).all()


def test_several_scales_count_as_one():
    small = torch.tensor([[1.0]]), torch.tensor([[-2.0]])
    found = over_scales(CRITERIA["hinge"].discriminator, [REAL, small[0]], [FAKE, small[1]])
    assert found.item() == pytest.approx((HINGE + 0.0) / 2)


def test_lecam_pulls_logits_to_the_averages_of_the_other_side():
    found = lecam(REAL, FAKE, torch.tensor(0.25), torch.tensor(-0.5))
    real = (2.5**2 + 0.5**2 + 0 + 1.0**2) / 4  # relu(D(x) + 0.5)^2
    fake = (3.25**2 + 0.25**2 + 0 + 0.75**2) / 4  # relu(0.25 - D(y))^2
    assert found.item() == pytest.approx(real + fake)
    assert lecam(REAL - 9, FAKE + 9, torch.tensor(0.25), torch.tensor(-0.5)) == 0


def test_r1_of_a_linear_discriminator_is_its_squared_weight():
    weight = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    images = torch.randn(3, 1, 2, 2, requires_grad=True)
    logits = (images * weight).sum((1, 2, 3))[:, None, None, None]
    penalty = gradient_penalty([logits], images)
    assert penalty.item() == pytest.approx(1 + 4 + 0.25 + 9)
    both = gradient_penalty([logits, 2 * logits], images)  # as of two scales
    assert both.item() == pytest.approx((14.25 + 4 * 14.25) / 2)


def test_r1_of_patches_is_that_of_each_patch_where_they_do_not_overlap():
    """Patches of one pixel, D(pixel) = pixel^2: the gradient of their sum is 2 * pixel, four times as many squares."""
    images = torch.tensor([[[[1.0, 2.0], [0.0, -1.0]]], [[[3.0, 0.0], [0.0, 0.0]]]], requires_grad=True)
    penalty = gradient_penalty([images.square()], images)
    assert penalty.item() == pytest.approx(4 * ((1 + 4 + 0 + 1) / 4 + 9 / 4) / 2)
    (again,) = torch.autograd.grad(penalty, images)  # which can be differentiated on
    torch.testing.assert_close(again, images.detach())
