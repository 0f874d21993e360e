"""Networks on a GPU are channels-last: asked of a device that says it prefers that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import tiny
from tests.adversarial import toy
from vae3d import layout
from vae3d.losses.perceptual import LPIPS


@pytest.fixture
def like_cuda(monkeypatch):
    """The CPU, for once, as fast channels-last as a GPU."""
    monkeypatch.setattr(layout, "prefers_channels_last", lambda device: device.type == "cpu")


def dense(network: nn.Module) -> list[bool]:
    return [
        p.is_contiguous(memory_format=layout.FORMATS[p.ndim]) for p in network.parameters() if p.ndim in layout.FORMATS
    ]


def test_only_cuda_prefers_it():
    assert [layout.prefers_channels_last(torch.device(name)) for name in ("cuda:1", "cpu", "meta")] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("name", tiny.MODEL)
def test_a_model_computes_the_same_in_that_layout(name, like_cuda):
    model = tiny.model(name).train()
    video = torch.rand(1, model.pixel_channels, 5, 16, 16) * 2 - 1
    results = []
    for placed in (False, True):
        if placed:
            layout.place(model, "cpu")
            assert all(dense(model))
        model.zero_grad()
        out = model(video, sample=False).video
        out.square().mean().backward()
        norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
        results.append((out.detach(), norms))
        state = {key: value.clone(memory_format=torch.contiguous_format) for key, value in model.state_dict().items()}
        model.load_state_dict(state)
    assert all(dense(model))  # loading copies into the layout
    for contiguous, placed in zip(*results, strict=True):
        torch.testing.assert_close(placed, contiguous, rtol=1e-3, atol=1e-5)


def test_discriminators_and_perceptual_networks_have_it(like_cuda, trunks):
    for adversary in (toy.gan(), toy.gan(input="clips"), toy.seraena()):
        found = dense(adversary.discriminator)
        assert found
        assert all(found)
    term = LPIPS(net="alex")
    term.load("cpu")
    assert all(dense(term.network))
