"""Checkpoints under other programs' file names, and going on from one of them."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch

import vae3d
from tests import tiny
from tests.training.quick import trainer
from tests.training.test_trainer import fresh_accelerate, trace, weights  # noqa: F401
from vae3d.checkpoints.export import FLAT_LAYOUTS
from vae3d.checkpoints.formats import CheckpointError
from vae3d.checkpoints.state import ResumeError, latest_state, load_state
from vae3d.config.issues import ConfigError

NAMED = {"trainer.publish.prefix": "vae_rgb", "trainer.publish.layout": "native"}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix == ".pt")


def test_each_save_and_the_end_leave_the_files_of_the_requirement(videos, tmp_path):
    often = {**NAMED, "trainer.save_every": 1, "trainer.ema.decay": 0.5, "trainer.ema.warmup": False}
    t = trainer(videos, tmp_path, **often)
    t.fit()
    assert names(tmp_path) == [
        "vae_rgb_ema_step1.pt", "vae_rgb_ema_step2.pt", "vae_rgb_final_ema.pt", "vae_rgb_step1.pt", "vae_rgb_step2.pt",
    ]  # fmt: skip
    state = tmp_path / "checkpoints/step-0000002/state.pt"
    assert (tmp_path / "vae_rgb_step2.pt").samefile(state)  # no second copy on disk
    final = torch.load(tmp_path / "vae_rgb_final_ema.pt", weights_only=True)
    exported = vae3d.load(tmp_path).state_dict()
    assert final.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[key]) for key, tensor in final.items())
    assert not torch.equal(final["module.decoder.conv_in.weight"], weights(t)["module.decoder.conv_in.weight"])
    vae3d.load(tmp_path / "exports/step-0000002", t.network).load_state_dict(final, strict=True)


def test_published_files_go_with_their_checkpoints(videos, tmp_path):
    (tmp_path / "vae_rgb_step77.pt").write_bytes(b"of someone else")
    once = {**NAMED, "trainer.save_every": 1, "trainer.keep": 2, "trainer.max_steps": 4}
    trainer(videos, tmp_path, **once).fit()
    assert names(tmp_path) == [
        "vae_rgb_ema_step3.pt", "vae_rgb_ema_step4.pt", "vae_rgb_final_ema.pt",
        "vae_rgb_step3.pt", "vae_rgb_step4.pt", "vae_rgb_step77.pt",
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-0000003", "step-0000004"]


def test_keys_are_those_of_the_layout_and_links_become_copies_where_there_are_none(videos, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setitem(FLAT_LAYOUTS, "wrapped", lambda state: {f"model.{k}": v for k, v in state.items()})
    t = trainer(videos, tmp_path, **{**NAMED, "trainer.publish.layout": "wrapped"})
    t.fit()
    final = torch.load(tmp_path / "vae_rgb_final_ema.pt", weights_only=True)
    assert final.keys() == {f"model.{key}" for key in t.network.state_dict()}
    copy, state = tmp_path / "vae_rgb_step2.pt", tmp_path / "checkpoints/step-0000002/state.pt"
    assert copy.read_bytes() == state.read_bytes()
    assert not copy.samefile(state)


def test_a_layout_that_does_not_fit_is_a_error_of_the_configuration(videos, monkeypatch):
    def refuse(state):
        raise CheckpointError("these are not the weights of a Wan VAE")

    monkeypatch.setitem(FLAT_LAYOUTS, "picky", refuse)
    spatial = ["stage=finetune", "stage.init_from=random", "loss=recon_kl", "data.frames.max=17"]
    with pytest.raises(ConfigError, match=r"trainer.publish.layout=picky: these are not the weights of a Wan VAE"):
        tiny.training(
            "spatial", videos, *spatial, "trainer.publish.prefix=rgb", "trainer.publish.layout=picky", meta_check=True
        )
    with pytest.raises(ConfigError, match=r"trainer.publish.prefix=vae/rgb: "):
        tiny.training("spatial", videos, *spatial, "trainer.publish.prefix=vae/rgb")
    with pytest.raises(CheckpointError, match="no key layout is called wan; there are native"):
        vae3d.checkpoints.export.to_layout({}, "wan")


def errors(name, videos, *overrides) -> dict[str, str]:
    settings = ["stage=finetune", "stage.init_from=random", "loss=recon_kl", "trainer.publish.prefix=x", *overrides]
    try:
        tiny.training(name, videos, *settings, "data.frames.min=1", "data.frames.max=1", meta_check=True)
    except ConfigError as error:
        return {issue.key: issue.message for issue in error.issues}
    return {}


@pytest.mark.parametrize(("layout", "word"), [("native", None), ("videox_fun", None), ("diffusers", "decoder_widths")])
def test_what_a_file_cannot_hold_is_an_error_before_training(videos, layout, word):
    found = errors("wan", videos, "model.decoder_widths=[8,4]", f"trainer.publish.layout={layout}")
    assert found.keys() == ({"trainer.publish.layout"} if word else set())
    assert all(word in message for message in found.values())


def test_a_final_model_of_four_channels_is_an_error_before_training(videos):
    settings = ["adversary=none", "teacher=none", "trainer.publish.layout=native", "trainer.publish.final_model=true"]
    found = errors("taehv", videos, *settings, "model.pixel_channels=4")
    assert found.keys() == {"trainer.publish.final_model"}
    assert "4 channels" in found["trainer.publish.final_model"]
    assert errors("taehv", videos, *settings) == {}


def test_a_lone_state_file_goes_on_bit_for_bit_in_another_folder(videos, tmp_path):
    long = {**NAMED, "trainer.max_steps": 4}
    whole = trainer(videos, tmp_path / "whole", **long)
    whole.fit()
    shutil.copy(tmp_path / "whole/vae_rgb_step2.pt", tmp_path / "lone.pt")
    shutil.rmtree(tmp_path / "whole/checkpoints/step-0000002")
    again = {**long, "run.resume_from": str(tmp_path / "lone.pt"), "trainer.save_every": 1}
    t = trainer(videos, tmp_path / "again", **again)
    assert t.step == 2
    t.fit()
    torch.testing.assert_close(weights(t), weights(whole), rtol=0, atol=0)
    assert trace(tmp_path / "again") == trace(tmp_path / "whole")[2:]
    assert load_state(tmp_path / "lone.pt")["config"]["optim"]["lr"] == 1e-3

    shutil.rmtree(tmp_path / "again/checkpoints/step-0000004")  # as if it had been killed after step 3
    assert trainer(videos, tmp_path / "again", **again).step == 3  # the same command goes on from its own newest


def test_newer_checkpoints_of_another_start_are_not_overwritten(videos, tmp_path):
    trainer(videos, tmp_path, **{"trainer.max_steps": 4, "trainer.save_every": 1}).fit()
    older = {"run.resume_from": str(tmp_path / "checkpoints/step-0000002"), "trainer.max_steps": 5}
    with pytest.raises(ResumeError, match=r"step-0000004 is newer than run.resume_from=.*\(step 2\); give this run"):
        trainer(videos, tmp_path, **older)
    shutil.rmtree(tmp_path / "checkpoints/step-0000004")
    shutil.rmtree(tmp_path / "checkpoints/step-0000003")
    t = trainer(videos, tmp_path, **older)
    assert t.step == 2
    t.fit()
    assert latest_state(tmp_path / "checkpoints").name == "step-0000005"
    assert [step for step, _ in trace(tmp_path)] == [1, 2, 3, 4, 5]


def test_what_holds_no_training_state_is_refused(videos, tmp_path):
    trainer(videos, tmp_path / "run", **NAMED).fit()
    flat = tmp_path / "run/vae_rgb_final_ema.pt"
    with pytest.raises(CheckpointError, match="holds no training state; to start from weights alone"):
        trainer(videos, tmp_path / "new", **{"run.resume_from": str(flat)})
    (tmp_path / "cut.pt").write_bytes((tmp_path / "run/vae_rgb_step2.pt").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"cut.pt cannot be read \("):
        trainer(videos, tmp_path / "new", **{"run.resume_from": str(tmp_path / "cut.pt")})
    with pytest.raises(ResumeError, match=r"run.seed: 0 in the checkpoint, 5 now"):
        trainer(videos, tmp_path / "new", **{"run.seed": 5, "run.resume_from": str(tmp_path / "run/vae_rgb_step2.pt")})
