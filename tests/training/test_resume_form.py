"""A training state of another form than the run's is one error that names the file and the key."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.diffusion import latent_runs
from tests.training import quick
from vae3d.adversarial.replay import ReplayBuffer
from vae3d.arguments import ArgumentError
from vae3d.checkpoints import state as state_files
from vae3d.config.schema import TrainConfig
from vae3d.errors import UserError
from vae3d.restore import load_optimizer

Change = Callable[[dict[str, Any]], None]


def put(value: Any, *keys: Any) -> Change:
    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


def drop(*keys: Any) -> Change:
    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


def deep(levels: int) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for _ in range(levels):
        tree = {"x": tree}
    return tree


WRONG = {
    "optimizer.param_groups": put([], "optimizer", "param_groups"),
    "optimizer.param_groups[0].lr": put("x", "optimizer", "param_groups", 0, "lr"),
    "optimizer.param_groups[0].betas": put([0.9], "optimizer", "param_groups", 0, "betas"),
    "optimizer.param_groups[0].params": put([0], "optimizer", "param_groups", 0, "params"),
    "optimizer.param_groups[0] has no lr_scale": drop("optimizer", "param_groups", 0, "lr_scale"),
    "optimizer.param_groups[0].part": put(7, "optimizer", "param_groups", 0, "part"),
    "optimizer.state is": put([1], "optimizer", "state"),
    "optimizer.state[0] is": put("x", "optimizer", "state", 0),
    "optimizer.state[0].exp_avg is": put(torch.zeros(3), "optimizer", "state", 0, "exp_avg"),
    "optimizer.state[0] has no 'exp_avg_sq'": drop("optimizer", "state", 0, "exp_avg_sq"),
    "optimizer.state[0].step": put("x", "optimizer", "state", 0, "step"),
    "optimizer.state[-1]": put({}, "optimizer", "state", -1),
    "model has no": lambda state: state["model"].popitem(),
    "model.": lambda state: state["model"].update(dict.fromkeys(state["model"], torch.zeros(1))),
    "ema.": lambda state: state["ema"].update(dict.fromkeys(state["ema"], torch.zeros(1))),
    "ema has an unknown '../x'": put(torch.zeros(1), "ema", "../x"),
    "spikes.mean": put(math.nan, "spikes", "mean"),
    "spikes.accepted": put(None, "spikes", "accepted"),
    "spikes.consecutive_skips is missing": drop("spikes", "consecutive_skips"),
    "meter['x'] is 'abc'": put("abc", "meter", "x"),
    "meter['x'][0] is None": put([None], "meter", "x"),
    "meter['x']": put([], "meter", "x"),
    "meter[3]": put([1.0], "meter", 3),
    "reads[0] is -1": put([-1, 2], "reads"),
    "reads is": put([1, 2, 3], "reads"),
    "failed_steps": put([0], "failed_steps"),
    "zero_gradient": put(-1, "zero_gradient"),
    "best.value": put({"column": None, "value": "x", "step": 1}, "best"),
    "best.step is missing": put({"column": None, "value": 1.0}, "best"),
    "proximal.anchor": put(3, "proximal", "anchor"),
    "data.files": put(torch.zeros(3), "data", "files"),
    "data has no 'facts'": drop("data", "facts"),
    "adversary": put({"discriminator": {}}, "adversary"),
    "is nested more than": lambda state: state.update(config=deep(100)),
    "config: model.x: a ": put(torch.zeros(1), "config", "model", "x"),
}
WHOLE = ("model", "optimizer", "ema", "spikes", "adversary", "projections", "scaler", "meter", "reads", "step")
WHOLE += ("objective", "proximal", "best", "data", "failed_steps", "zero_gradient")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return latent_runs.pictures(tmp_path_factory.mktemp("pictures"), count=2) / "images.csv"


@pytest.fixture(scope="module")
def small(pictures: Path) -> TrainConfig:
    """Of a network with few tensors, as states are written and read a hundred times."""
    frames = ["data.frames.min=1", "data.frames.max=1"]
    start = ["stage=finetune", "stage.init_from=random", "loss=recon_kl"]
    return tiny.training("spatial", pictures, *start, *frames, "model.channels=[8]")


@pytest.fixture(scope="module")
def run(small: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    quick.trainer(small, folder, **{"trainer.spike.factor": 9.0}).fit()
    return folder / "checkpoints/step-0000002/state.pt"


def refused(make: Callable[[Path], object], good: dict[str, Any], change: Change, folder: Path) -> str:
    state = copy.deepcopy(good)
    change(state)
    file = folder / "stranger.pt"
    torch.save(state, file)
    return message(make, file)


def message(make: Callable[[Path], object], file: Path) -> str:
    """Of the UserError that `make` raises, which names the file."""
    with pytest.raises(UserError) as error:
        make(file)
    assert str(file) in str(error.value)
    assert len(str(error.value)) < 1000
    return str(error.value)


def test_every_part_of_a_training_state_is_checked_before_it_is_taken(small, run, tmp_path, monkeypatch):
    good = torch.load(run, weights_only=True)

    resuming = quick.trainer(small, tmp_path)
    for key, change in WRONG.items():
        assert key in refused(resuming.resume, good, change, tmp_path)
    with monkeypatch.context() as patch:  # writing and reading files takes most of the time
        for key in WHOLE:
            for value in (["x"], 1.5, "x"):
                patch.setattr(state_files, "_read", lambda *_, key=key, value=value, **__: {**good, key: value})
                assert key in message(resuming.resume, tmp_path / "stranger.pt"), value
            patch.setattr(state_files, "_read", lambda *_, key=key, **__: {k: v for k, v in good.items() if k != key})
            message(resuming.resume, tmp_path / "stranger.pt")
    (tmp_path / "good.pt").write_bytes(run.read_bytes())
    resuming.resume(tmp_path / "good.pt")
    assert resuming.step == 2


def test_every_part_of_a_diffusion_state_is_checked_before_it_is_taken(tmp_path):
    source = latent_runs.pictures(tmp_path / "pictures") / "images.csv"
    vae = latent_runs.vae("spatial", tmp_path / "vae", source)
    clips = [f"vae.path={vae}", f"data.source.path={source}", "data.height=64", "data.width=64", "data.frames.min=1"]
    clips += ["data.frames.max=1", "trainer.max_steps=2", "process=flow"]
    latent_runs.trainer(tmp_path / "run", *clips, network="video_transformer").fit()
    good = torch.load(tmp_path / "run/checkpoints/step-0000002/state.pt", weights_only=True)

    resuming = latent_runs.trainer(tmp_path / "other", *clips, network="video_transformer")

    wrong = {
        "classes": put([3], "latents", "classes"),
        "failed_steps": put(-1, "failed_steps"),
        "latents.scale.mean": put("x", "latents", "scale", "mean"),
        "vae": put({}, "latents", "vae"),
        "ema['0.9']": put([1], "ema", "0.9"),
        "ema['0.9'].": lambda state: state["ema"]["0.9"].update(dict.fromkeys(state["ema"]["0.9"], torch.zeros(1))),
        "model has no": lambda state: state["model"].popitem(),
        "optimizer.state[0].exp_avg": put(torch.zeros(3), "optimizer", "state", 0, "exp_avg"),
        "meter['x'][0]": put(["x"], "meter", "x"),
        "reads": drop("reads"),
        "data": put({"rows": 1}, "data"),
    }
    for key, change in wrong.items():
        message = refused(resuming.resume, good, change, tmp_path)
        assert key in message or key == "vae"
    torch.save(good, tmp_path / "good.pt")
    resuming.resume(tmp_path / "good.pt")
    assert resuming.step == 2


@pytest.mark.parametrize(
    "state",
    [
        [],
        {"images": [torch.zeros(3, 4, 4)], "contexts": []},
        {"images": ["x"], "contexts": ["y"]},
        {"images": [torch.zeros(3, 4, 4), torch.zeros(3, 5, 4)], "contexts": [torch.zeros(1, 2, 2)] * 2},
        {"images": [torch.zeros(4)], "contexts": [torch.zeros(4)]},
        {"images": [torch.zeros(3, 4, 4)] * 3, "contexts": [torch.zeros(1, 2, 2)] * 3},
    ],
)
def test_a_replay_buffer_takes_pairs_of_images_only(state):
    with pytest.raises(ArgumentError, match="buffer"):
        ReplayBuffer(2).load_state_dict(state)


def test_what_an_optimizer_saves_it_takes_again():
    for settings in ({}, {"fused": True}, {"foreach": True}):
        network = torch.nn.Linear(2, 3)
        optimizer = torch.optim.AdamW(network.parameters(), **settings)
        network(torch.ones(2)).sum().backward()
        optimizer.step()
        other = torch.optim.AdamW(torch.nn.Linear(2, 3).parameters())
        load_optimizer(other, optimizer.state_dict())
        assert len(other.state) == 2


def test_a_discriminator_takes_the_state_of_an_equal_one_only(pictures, tmp_path):
    config = tiny.training(
        "spatial", pictures, "stage=finetune", "stage.init_from=random", "loss=recon_kl", "data.frames.min=1",
        "data.frames.max=1", *tiny.GAN,
    )  # fmt: skip
    trained = quick.trainer(config, tmp_path)
    state = trained.adversary.state_dict()
    for key, change in {
        "adversary.discriminator has no": lambda s: s["discriminator"].popitem(),
        "adversary.optimizer": put([], "optimizer"),
        "adversary.averages": put(torch.zeros(7), "averages"),
        "adversary.skipped": put("x", "skipped"),
        "adversary has no 'grad_norm'": drop("grad_norm"),
    }.items():
        wrong = {**state, "discriminator": dict(state["discriminator"])}
        change(wrong)
        with pytest.raises(ArgumentError) as error:
            trained.adversary.load_state_dict(wrong)
        assert key in str(error.value)
    trained.adversary.load_state_dict(state)
