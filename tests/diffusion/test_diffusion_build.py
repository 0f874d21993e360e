from __future__ import annotations

import json

import pytest
import torch

from tests.diffusion import toy
from vae3d.diffusion import layers
from vae3d.diffusion.build import build_network, build_process, network_config, process_config, require_same
from vae3d.diffusion.flow import RectifiedFlow
from vae3d.diffusion.gaussian import GaussianDiffusion
from vae3d.errors import UserError


@pytest.mark.parametrize("name", toy.TINY)
def test_sampler_builds_the_network_that_was_trained(name):
    """At the latent size of training, not at that of the pixels, and also where latents of another size are sampled."""
    shape = toy.shape_of(name)
    trained = toy.shaken(build_network(toy.TINY[name] | {"num_classes": 2}, shape))
    kept = json.loads(json.dumps(trained.config))
    assert kept == network_config(kept, shape)
    larger = (*shape[:2], 32, 40)
    again = build_network(kept, larger)
    again.load_state_dict(trained.state_dict(), strict=True)
    require_same(kept, again.config, "network")
    z = torch.randn(1, *shape)
    assert torch.equal(trained.eval()(z, torch.ones(1)), again.eval()(z, torch.ones(1)))


def test_another_network_is_refused_with_the_settings_that_differ():
    trained = network_config({"kind": "unet"}, (4, 1, 16, 16))
    asked = network_config({"kind": "unet", "width": 64, "gradient_checkpointing": True}, (4, 1, 64, 64))
    with pytest.raises(UserError) as error:
        require_same(trained, asked, "network")
    assert str(error.value) == (
        "the checkpoint's network is another one: attention is [True, True, True] there, [False, False, True, True] here; "
        "multipliers is [1, 2, 2] there, [1, 2, 3, 4] here; width is 128 there, 64 here; leave these out to use the "
        "checkpoint's"
    )
    require_same(
        trained, {**trained, "multipliers": (1, 2, 2), "dropout": 0.1, "gradient_checkpointing": True}, "network"
    )
    with pytest.raises(UserError, match="kind is 'unet' there, 'transformer' here"):
        require_same(trained, network_config({"kind": "transformer"}, (4, 1, 16, 16)), "network")


@pytest.mark.parametrize(
    ("config", "message"),
    [({"kind": "dit"}, "kind of network is 'dit'; use one of unet, transformer, wan"),
     ({"width": 64}, "kind of network is None"),
     ({"kind": "wan", "widht": 64}, "wan has no widht; it has channels, learned_sigma"),
     ({"kind": "unet", "channels": 16}, "latents of 16 channels; these have 4")],
)  # fmt: skip
def test_unknown_settings_of_a_network_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        build_network(config, (4, 1, 16, 16))


@pytest.mark.parametrize(
    "process",
    [GaussianDiffusion(schedule="cosine", min_snr=5.0), RectifiedFlow(logit_mean=1.0)],
    ids=["gaussian", "flow"],
)
def test_processes_are_plain_data(process):
    config = process_config(process)
    assert build_process(json.loads(json.dumps(config))) == process
    with pytest.raises(UserError, match="kind is"):
        require_same(config, {**config, "kind": "other"}, "process")


def test_unknown_settings_of_a_process_are_named():
    with pytest.raises(ValueError, match="kind of process is 'edm'; use one of gaussian, flow"):
        build_process({"kind": "edm"})
    with pytest.raises(ValueError, match="flow has no steps; it has logit_mean, logit_std"):
        build_process({"kind": "flow", "steps": 1000})


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: build_process({"kind": "gaussian", "steps": "many"}), "gaussian: steps is 'many'; give an integer"),
     (lambda: build_process({"kind": "flow", "logit_mean": None}), "flow: logit_mean is None; give a finite number"),
     (lambda: network_config({"kind": "unet", "width": 16.5}, (4, 1, 8, 8)), "unet: width is 16.5; give an integer"),
     (lambda: network_config({"kind": "wan", "learned_sigma": "no"}, (4, 1, 8, 8)), "wan: learned_sigma is 'no'; give true or false")],
)  # fmt: skip
def test_settings_of_another_type_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert build_process({"kind": "flow", "logit_mean": 1}) == RectifiedFlow(logit_mean=1)


def test_what_diffusers_lacks_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"no FutureScheduler: pip install --upgrade diffusers"):
        layers.from_diffusers("FutureScheduler")
    with pytest.raises(UserError, match=r"pip install -e \.\[diffusion\]"):
        layers.from_diffusers("UNet2DModel", "diffusers_that_is_not_there")
