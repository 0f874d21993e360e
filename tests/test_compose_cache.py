"""The tests' hydra.compose gives what Hydra's own gives."""

from __future__ import annotations

import hydra
import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

import vae3d.config.diffusion  # noqa: F401  (registers its defaults)
from tests import compose_cache, tiny
from vae3d.config.overrides import allow_unknown_keys
from vae3d.config.schema import CONF

TRAIN = ["stage=stage1", "loss=latent", *tiny.MODEL["temporal_vae"], *tiny.TRAINING, "unknown.key={a: [1, null]}"]
CALLS = {
    "train": ("train", [*allow_unknown_keys(TRAIN), "run.name=x", "~loss.terms.kl"]),
    "experiment": ("train", ["experiment=wan_erp_tiny", "optim.lr=1", "run.root=a", "run.name=${run.root}/x", "optim.lr=2"]),
    "model": ("model", ["model=wan", *tiny.WAN]),
    "gan": ("train", ["experiment=sd_vae_gan", "adversary=patchgan", "trainer=cpu"]),
    "diffusion": ("diffusion", ["latent_experiment=unet_tiny", "++data.batch_size=3"]),
    "other": ("infer", ["++checkpoint='a=b'", "+new=1"]),
}  # fmt: skip
WRONG = {
    "key": ("model", ["model=wan", "model.chanels=1"]),
    "choice": ("model", ["model=wam"]),
    "value": ("infer", ["checkpoint=[1"]),
    "sweep": ("train", ["optim.lr=1,2"]),
    "deletion": ("train", ["~optim.nothing"]),
}


@pytest.fixture(autouse=True)
def conf():
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_configurations_are_those_of_hydra_each_time(call):
    expected = compose_cache.compose_files(*call)
    for _ in range(2):
        config = compose_cache.compose(*call)
        assert OmegaConf.to_yaml(config) == OmegaConf.to_yaml(expected)
        assert OmegaConf.is_struct(config) == OmegaConf.is_struct(expected)
        OmegaConf.set_struct(config, False)
        config.leftover = 1  # must not reach the next


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_errors_are_those_of_hydra(call):
    messages = []
    for compose in (compose_cache.compose_files, compose_cache.compose):
        with pytest.raises(HydraException) as error:
            compose(*call)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
