from __future__ import annotations

import warnings

import pytest
import torch

from tests.metrics.clips import lpips_package
from vae3d.pretrained.lpips import LPIPSNet, _unit
from vae3d.pretrained.weights import WeightsMissing


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_equals_the_lpips_package_bit_for_bit(trunks, net):
    theirs = lpips_package(net, trunks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = LPIPSNet(net).load()
    x, y = torch.rand(2, 2, 3, 64, 48) * 2 - 1
    assert torch.equal(ours(x, y), theirs(x, y))
    gradients = []
    for network in (ours, theirs):
        z = y.clone().requires_grad_()
        network(x, z).sum().backward()
        gradients.append(z.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-10)


def test_trunk_and_linear_weights_are_frozen(trunks):
    network = LPIPSNet("vgg").load()
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert sum(p.numel() for p in network.parameters()) == 14_714_688 + 64 + 128 + 256 + 512 + 512


def test_gradient_is_finite_where_all_features_of_a_pixel_are_zero():
    """The published normalisation divides 0 by 0 there."""
    features = torch.zeros(1, 4, 2, 2)
    features[..., 0] = 1.0
    features.requires_grad_()
    published = features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
    ours = _unit(features)
    assert torch.equal(ours, published)
    (theirs,) = torch.autograd.grad(published.sum(), features)
    (grad,) = torch.autograd.grad(ours.sum(), features)
    assert theirs.isnan().any()
    assert grad.isfinite().all()
    torch.testing.assert_close(grad[..., 0], theirs[..., 0])


def test_a_trunk_of_another_network_is_refused(trunks):
    with pytest.raises(ValueError, match="is not the vgg trunk of LPIPS: it lacks features"):
        LPIPSNet("vgg").load(trunks / "alexnet-owt-7be5be79.pth")


def test_an_explicit_path_that_is_missing_is_named(tmp_path):
    with pytest.raises(WeightsMissing, match=r"nowhere\.pth: no such file; expected vgg16-397923af\.pth"):
        LPIPSNet("vgg").load(tmp_path / "nowhere.pth")
