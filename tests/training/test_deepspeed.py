"""DeepSpeed's ZeRO-2 on two ranks takes the steps of plain replicas; optional, where the package is installed."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch

from tests import tiny
from tests.training import quick, zero_ranks
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d.checkpoints.state import ResumeError

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def folder(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    (folder / "config.pickle").write_bytes(pickle.dumps(quick.checked(videos)))
    tiny.two_ranks("tests.training.zero_ranks", folder, timeout=400)
    return folder


@pytest.fixture(scope="module")
def both(folder) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def plain(videos, tmp_path_factory) -> dict:
    t = quick.trainer(videos, tmp_path_factory.mktemp("plain"), **zero_ranks.SETTINGS, **{"trainer.accumulate": 4})
    told = zero_ranks.steps(t, zero_ranks.STEPS, spoils=True)
    t.log.close()
    return {"steps": told, "weights": t.network.state_dict(), "ema": t.ema.shadow}


@pytest.mark.parametrize("which", ["weights", "offloaded"])
def test_zero_and_replicas_take_the_same_steps(both, plain, which):
    for name, tensor in plain["weights"].items():
        assert torch.equal(both[0][which][name], both[1][which][name]), name
        torch.testing.assert_close(both[0][which][name], tensor, rtol=0, atol=2e-6)


def test_loss_norm_and_average_are_those_of_replicas_and_a_nan_is_skipped(both, plain):
    for number, (mine, theirs) in enumerate(zip(both[0]["steps"], plain["steps"], strict=True)):
        assert mine["skipped"] == theirs["skipped"] == float(number == zero_ranks.NAN_AT)
        if number != zero_ranks.NAN_AT:
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for name, tensor in plain["ema"].items():
        torch.testing.assert_close(both[0]["ema"][name], tensor, rtol=0, atol=2e-6)


def test_a_resumed_run_is_bit_equal(both):
    for report in both:
        assert report["resumed_at"] == 4
        assert all(torch.equal(tensor, report["resumed"][name]) for name, tensor in report["weights"].items())


def test_the_shards_together_are_the_fp32_weights_that_are_saved_and_exported(both):
    flat = torch.cat([part for report in both for part in report["partitions"]])
    saved = torch.cat([tensor.flatten() for tensor in both[0]["weights"].values()])
    assert flat.dtype == saved.dtype == torch.float32
    assert torch.equal(flat.sort().values[-len(saved) :], saved.sort().values) or torch.isin(saved, flat).all()


def test_a_rank_without_memory_makes_all_save_and_leave(both):
    for report in both:
        assert "torchrun --max-restarts=N goes on from the newest checkpoint" in report["left"]
        assert report["saved"] == f"step-{zero_ranks.STEPS + 1:07d}"


@pytest.mark.parametrize("which", ["dropped", "dropped offloaded"])
def test_a_step_that_one_rank_cannot_take_moves_nothing_and_the_next_is_taken(both, which):
    for report in both:
        assert report[which] == {"data": [1.0, 0.0, 0.0], "discriminator": [1.0, 0.0, 0.0]}


def test_memory_that_runs_out_after_the_last_backward_pass_leaves_without_the_step(both):
    for report in both:
        assert "torchrun --max-restarts=N goes on" in report["late"]["told"]
        assert not report["late"]["moved"]


def test_one_process_needs_no_launcher(folder):
    done = tiny.run(sys.executable, "-m", "tests.training.zero_ranks", str(folder), "alone", cwd=tiny.ROOT)
    assert done.returncode == 0, done.stdout
    assert (folder / "alone/checkpoints/step-0000001/rank-0.pt").is_file()


def test_keys_that_deepspeed_would_pass_over_are_refused(both):
    assert "DeepSpeed has no key overlap" in both[0]["typo"]


def test_another_number_of_ranks_goes_on_from_the_weights_alone(videos, folder, both, tmp_path):
    run = {"run.resume_from": str(folder / "run/checkpoints/step-0000004")}
    with pytest.raises(
        ResumeError,
        match=r"shards; go on with the same trainer/strategy.*stage.init_from=.*exports/step-0000004",
    ):
        quick.trainer(videos, tmp_path / "ddp", **zero_ranks.SETTINGS, **run)
    start = {"stage.init_from": str(folder / "run/exports/step-0000004")}
    t = quick.trainer(videos, tmp_path / "weights", **zero_ranks.SETTINGS, **start, **{"trainer.ema.decay": 0.0})
    t.log.close()
    assert t.step == 0
