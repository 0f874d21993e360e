from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf

import vae3d.config.diffusion  # noqa: F401  (registers the schema)
from tests import tiny
from tests.diffusion import toy
from vae3d import loading
from vae3d.config.schema import CONF
from vae3d.diffusion import layers
from vae3d.diffusion.build import NETWORKS, PROCESSES, build_network, build_process, network_config
from vae3d.diffusion.flow import RectifiedFlow
from vae3d.errors import UserError
from vae3d.models.registry import TARGET

UNET, _, WAN = NETWORKS
GAUSSIAN, FLOW = PROCESSES


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
    assert again.config == kept
    z = torch.randn(1, *shape)
    assert torch.equal(trained.eval()(z, torch.ones(1)), again.eval()(z, torch.ones(1)))


def test_what_is_null_follows_from_the_latents():
    small, large = (network_config({TARGET: UNET, "width": 64}, (4, 1, side, side)) for side in (16, 64))
    assert (small["multipliers"], small["attention"]) == ([1, 2, 2], [True, True, True])
    assert (large["multipliers"], large["attention"]) == ([1, 2, 3, 4], [False, False, True, True])
    assert small["channels"] == 4
    own = network_config({TARGET: "my_project.MyNetwork", "width": 64}, (4, 1, 16, 16))
    assert own == {TARGET: "my_project.MyNetwork", "width": 64, "channels": 4}


@pytest.mark.parametrize("group", ["denoiser", "process"])
def test_a_configuration_and_a_file_build_the_same(group):
    """By hydra, as training does, and by the registry, as sampling does from an export."""
    for file in sorted((CONF / group).glob("*.yaml")):
        cfg = tiny.compose(f"{group}={file.stem}", "denoiser.width=16", "run.name=x", config="diffusion")
        config = OmegaConf.to_container(cfg[group])
        if group == "process":
            assert build_process(json.loads(json.dumps(config))) == loading.instantiate(config)
            continue
        config |= {"num_classes": 2, "learned_sigma": False}
        config |= {"head_channels": 16} if file.stem == "unet" else {"depth": 2, "heads": 2}
        network = build_network(config, (4, 1, 8, 8))
        assert type(loading.instantiate(network.config)) is type(network)


@pytest.mark.parametrize(
    ("config", "message"),
    [({TARGET: "vae3d.diffusion.dit.DiT"}, "_target_ is 'vae3d.diffusion.dit.DiT'.*LatentUNet.*VideoTransformer"),
     ({"width": 64}, "_target_ is None"),
     ({TARGET: WAN, "widht": 64}, "widht is not an argument of WanTransformer; did you mean network.width"),
     ({TARGET: UNET, "channels": 16}, "channels is 16; the latents have 4"),
     ({TARGET: UNET, "multipliers": 5}, "multipliers is 5"),
     ({TARGET: UNET, "width": 16.5}, "width is 16.5; give an integer"),
     ({TARGET: WAN, "learned_sigma": "no"}, "learned_sigma is 'no'; give true or false")],
)  # fmt: skip
def test_wrong_settings_of_a_network_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        build_network(config, (4, 1, 16, 16))


@pytest.mark.parametrize(
    ("config", "message"),
    [({TARGET: "os.system"}, "_target_ is 'os.system'.*GaussianDiffusion"),
     ({TARGET: UNET}, "_target_ is '.*LatentUNet'.*GaussianDiffusion"),
     ({TARGET: FLOW, "steps": 1000}, "steps is not an argument of RectifiedFlow; use one of logit_mean, logit_std"),
     ({TARGET: GAUSSIAN, "steps": "many"}, "steps is 'many'; give an integer"),
     ({TARGET: FLOW, "logit_mean": None}, "logit_mean is None; give a finite number")],
)  # fmt: skip
def test_wrong_settings_of_a_process_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        build_process(config)
    assert build_process({TARGET: FLOW, "logit_mean": 1}) == RectifiedFlow(logit_mean=1)


def test_what_diffusers_lacks_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"no FutureScheduler: pip install --upgrade diffusers"):
        layers.from_diffusers("FutureScheduler")
    with pytest.raises(UserError, match=r"pip install -e '\.\[diffusers\]'"):
        layers.from_diffusers("UNet2DModel", "diffusers_that_is_not_there")
