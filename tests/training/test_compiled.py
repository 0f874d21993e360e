"""trainer.compile: every model really compiles in a training step, in place, and computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import vae3d
from tests import tiny
from tests.training.test_trainer import fresh_accelerate, weights  # noqa: F401
from vae3d.checkpoints.state import latest_state, load_state
from vae3d.commands import train as train_command
from vae3d.config.issues import ConfigError
from vae3d.models import compiled
from vae3d.models.diffusers_vae import DiffusersVAE

CHECKPOINTING = {
    "spatial": ["model.gradient_checkpointing"],
    "temporal_vae": ["model.spatial.gradient_checkpointing", "model.temporal.gradient_checkpointing"],
    "wan": ["model.gradient_checkpointing"],
    "taehv": ["model.gradient_checkpointing"],
    "taesd": ["model.gradient_checkpointing"],
    "opensora_v1_3": ["model.gradient_checkpointing"],
}
FRAMES = {"spatial": 1, "temporal_vae": 5, "wan": 3, "taehv": 5, "taesd": 1, "opensora_v1_3": 5}


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Graphs are traced and run as they are: what a backend makes of them is not this project's."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True):
        yield
    torch._dynamo.reset()


def train(name, videos, folder, *overrides):
    frames = [f"data.frames.{bound}={FRAMES[name]}" for bound in ("min", "max")]
    start = ["stage=finetune", "stage.init_from=random", "loss=recon_kl", "loss.reduction=mean"]
    t = train_command.build_trainer(tiny.training(name, videos, *start, *frames, "optim.eps=1e-2", *overrides), folder)
    t.fit()
    return t


def passes(model: torch.nn.Module, frames: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A reconstruction and the gradients of its error."""
    video = torch.rand(1, 3, frames, 16, 16, generator=torch.manual_seed(0)) * 2 - 1
    out = model.train()(video, generator=torch.manual_seed(1))
    (out.video - video).square().mean().backward()
    return out.video, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CHECKPOINTING)
def test_every_model_is_compiled_without_breaks_under_checkpointing_and_computes_the_same(name):
    video, gradients = passes(tiny.model(name), FRAMES[name])
    assert counters["stats"]["unique_graphs"] == 0
    model = tiny.model(name, *(f"{key}=true" for key in CHECKPOINTING[name]))
    keys = list(model.state_dict())
    compiled.compile_blocks(model)
    found, compiled_gradients = passes(model, FRAMES[name])
    assert counters["stats"]["unique_graphs"] > 3
    assert not counters["graph_break"]
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(found, video, rtol=0, atol=1e-6)
    assert compiled_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[key], gradient, rtol=1e-5, atol=1e-6)


def test_a_compiled_run_trains_and_saves_as_an_eager_one(videos, tmp_path):
    eager, t = (train("spatial", videos, tmp_path / on, f"trainer.compile={on}") for on in ("false", "true"))
    assert counters["stats"]["unique_graphs"] > 3
    torch.testing.assert_close(weights(t), weights(eager), rtol=0, atol=1e-6)
    saved = (load_state(latest_state(run.folder / "checkpoints"))["model"] for run in (eager, t))
    assert [list(state) for state in saved] == [list(weights(eager))] * 2
    assert vae3d.load(t.folder).state_dict().keys() == weights(eager).keys()


def test_blocks_of_every_shape_compile_once_and_again_without_gradients(videos, tmp_path):
    """Beyond its limit of graphs dynamo runs blocks as they are."""
    validates = ["validation.every=1", "validation.frames=1", "validation.clips=2", "trainer.max_steps=1"]
    with torch._dynamo.config.patch(cache_size_limit=2):
        train("spatial", videos, tmp_path, "model.channels=[8,16]", "trainer.compile=true", *validates)
    shapes = 2 + 2 + 2  # levels of encoder and decoder, middle blocks
    assert shapes < counters["stats"]["unique_graphs"] <= 2 * shapes


def test_most_of_a_network_is_compiled_but_for_its_last_layer():
    """An adaptive weight takes the gradient of the last layer alone."""
    for name in CHECKPOINTING:
        model = tiny.model(name)
        inside = {id(p) for block in compiled.blocks_of(model) for p in block.parameters()}
        assert not any(id(p) in inside for p in model.last_layers())
        compiled_size = sum(p.numel() for p in model.parameters() if id(p) in inside)
        assert compiled_size > sum(p.numel() for p in model.parameters()) / 2, name


def test_what_cannot_be_compiled_is_refused(videos, tmp_path):
    kind = "AutoencoderKLCogVideoX"
    assert not compiled.blocks_of(DiffusersVAE(kind, {"block_out_channels": (8,) * 4, "norm_num_groups": 2}))
    with pytest.raises(ConfigError, match=r"trainer\.compile=true: hides the features .*; use false"):
        tiny.training("spatial", videos, "loss=recon_kl", "trainer.compile=true", "teacher.features={a: b}")
