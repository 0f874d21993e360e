"""DeepSpeed's ZeRO-2 on two ranks takes the steps of ReplicatedDataParallel; skipped where it is not installed."""

from __future__ import annotations

import pickle
import re

import pytest
import torch

from tests import tiny
from tests.training import deepspeed_ranks, quick
from tests.training.deepspeed_ranks import SAVE_AT, SETTINGS, STEPS, sharded
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d import distributed
from vae3d.checkpoints.state import ResumeError

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def folder(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "config.pickle").write_bytes(pickle.dumps(quick.checked(videos)))
    tiny.two_ranks("tests.training.deepspeed_ranks", folder, timeout=400)
    return folder


@pytest.fixture(scope="module")
def both(folder) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def plain(videos, tmp_path_factory) -> dict:
    t = quick.trainer(videos, tmp_path_factory.mktemp("plain"), **SETTINGS, **{"trainer.accumulate": 4})
    values = deepspeed_ranks.steps(t, STEPS)
    t.log.close()
    return {"steps": values, "weights": t.network.state_dict(), "ema": t.ema.shadow}


@pytest.mark.parametrize("which", ["weights", "offloaded"])
def test_sharded_and_replicated_ranks_take_the_same_steps(both, plain, which):
    for name, tensor in plain["weights"].items():
        assert torch.equal(both[0][which][name], both[1][which][name]), name
        torch.testing.assert_close(both[0][which][name], tensor, rtol=0, atol=2e-6)


def test_loss_norm_and_average_are_those_of_replicated_ranks(both, plain):
    for mine, theirs in zip(both[0]["steps"], plain["steps"], strict=True):
        assert mine["applied"]
        assert theirs["applied"]
        mine, theirs = mine["metrics"], theirs["metrics"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for name, tensor in plain["ema"].items():
        torch.testing.assert_close(both[0]["ema"][name], tensor, rtol=0, atol=2e-6)


def test_a_resumed_run_is_bit_equal(both):
    for report in both:
        assert report["resumed_at"] == SAVE_AT
        assert all(torch.equal(tensor, report["resumed"][name]) for name, tensor in report["weights"].items())


def test_the_shards_together_are_the_fp32_weights_that_are_saved_and_exported(both):
    flat = torch.cat([part for report in both for part in report["partitions"]])
    saved = torch.cat([tensor.flatten() for tensor in both[0]["weights"].values()])
    assert flat.dtype == saved.dtype == torch.float32
    assert torch.equal(flat.sort().values[-len(saved) :], saved.sort().values) or torch.isin(saved, flat).all()


def test_a_step_that_one_rank_leaves_before_any_backward_pass_is_skipped_by_both(both):
    for report in both:
        assert report["skips"] == [False, False, True]


@pytest.mark.parametrize("failure", ["nan", "memory", "gradient", "gradient, offloaded"])
def test_a_step_that_fails_after_a_backward_pass_saves_the_weights_before_it_and_ends_both(both, failure):
    for report in both:
        ended = report[failure]
        assert not ended["moved"]
        assert "torchrun --max-restarts" in ended["message"]
        assert ended["saved"] == f"step-{ended['step']:07d}"  # so that a restart goes past the step that failed
        assert f"all {ended['step']} finished steps are saved" in ended["message"]


def test_weights_that_may_be_ruined_are_not_saved_a_second_time(both):
    for report in both:
        first, second = report["nan"], report["nan again"]
        assert (second["step"], second["saved"]) == (first["step"] + 1, first["saved"])
        assert re.search(rf"No step succeeded after \S*{first['saved']}", second["message"])


def test_one_process_needs_no_launcher(videos, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")  # which the run sets; removed again after the test
    with distributed.process_group_scope():
        settings = {"trainer.max_steps": 1, "trainer.save_every": 1, "trainer.robust.preflight": True}
        assert sharded(quick.checked(videos), tmp_path, "deepspeed_zero2_offload", **settings).fit()
    assert (tmp_path / "checkpoints/step-0000001/rank-0.pt").is_file()


def test_keys_that_deepspeed_would_ignore_are_refused(both):
    assert "DeepSpeed has no key overlap" in both[0]["typo"]


def test_another_number_of_ranks_starts_from_the_weights_alone(videos, folder, both, tmp_path):
    run = {"run.resume_from": str(folder / f"run/checkpoints/step-{SAVE_AT:07d}")}
    with pytest.raises(ResumeError, match=rf"trainer/strategy.*stage.init_from=.*exports/step-{SAVE_AT:07d}"):
        quick.trainer(videos, tmp_path / "replicated", **SETTINGS, **run)
    start = {"stage.init_from": str(folder / f"run/exports/step-{SAVE_AT:07d}")}
    t = quick.trainer(videos, tmp_path / "weights", **SETTINGS, **start, **{"trainer.ema.decay": 0.0})
    t.log.close()
    assert t.step == 0
