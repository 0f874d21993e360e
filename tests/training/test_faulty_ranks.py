"""Two ranks of which one runs out of memory, reads nothing, is slow or cannot save: none hangs, none goes its own way."""

from __future__ import annotations

import pickle
import re

import pytest
import torch

from tests import tiny
from tests.training import faulty_ranks, quick
from tests.training.test_trainer import fresh_accelerate  # noqa: F401

SKIPPED = ("forward", "backward", "second", "data", "nan")


@pytest.fixture(scope="module")
def both(videos, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "config.pickle").write_bytes(pickle.dumps(quick.checked(videos)))
    logs = tiny.two_ranks("tests.training.faulty_ranks", folder)
    reports = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    return [{**report, "log": log} for report, log in zip(reports, logs, strict=True)]


@pytest.fixture(scope="module")
def alone(videos, tmp_path_factory) -> dict:
    """One process that takes the same steps and skips those in which it reads nothing."""
    folder = tmp_path_factory.mktemp("alone")
    t = quick.trainer(videos, folder, **faulty_ranks.SETTINGS, **{"trainer.accumulate": 4})
    values, rates = faulty_ranks.steps(t, fails=True)
    t.log.close()
    return {"steps": values, "rates": rates, "weights": t.network.state_dict()}


@pytest.mark.parametrize("error", faulty_ranks.FAULTS)
def test_an_error_of_one_rank_skips_the_step_on_both_and_the_next_is_taken(both, error):
    for report in both:
        assert report["steps"][error]["applied"] == (error not in SKIPPED)
        assert report["steps"][f"before {error}"]["applied"]
        assert report["steps"]["after"]["applied"]


def test_ranks_that_met_errors_hold_equal_weights_and_one_process_the_same(both, alone):
    first, second = both
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
        torch.testing.assert_close(tensor, alone["weights"][name], rtol=0, atol=1e-6)
    assert first["steps"]["after"] == second["steps"]["after"]


def test_two_ranks_have_one_ranks_learning_rate_at_every_step(both, alone):
    assert both[0]["rates"] == both[1]["rates"] == alone["rates"]
    assert len(set(alone["rates"])) == len(alone["rates"])  # a schedule that moves


def test_the_log_says_which_rank_failed_and_why(both):
    first, second = (report["log"] for report in both)
    assert first.count("out of memory: rank 1") >= 3
    assert "without a readable file: rank 1" in first
    assert re.search(r"step \d+ is skipped by all ranks: loss not finite: rank 1", first)
    assert re.search(rf"step \d+, rank 1: {re.escape(faulty_ranks.NO_MEMORY)}; clips: \S+\.mp4, ", second)
    assert re.search(r"step \d+, rank 1: no readable file; clips: \S+\.mp4, gone\.mp4", second)
    assert re.search(r"step \d+, rank 1: loss nan, loss_weighted/l1 nan.*; clips: \S+\.mp4, ", second)
    assert not re.search(r"step \d+, rank 0", first)


def test_a_checkpoint_that_one_rank_cannot_write_is_given_up_by_both(both):
    for rank, report in enumerate(both):
        saving = report["saving"]
        assert saving["0"] == saving["1"] == saving["2"] == ["step-0000100"]  # the last complete one, and no remains
        assert saving["3"] == ["step-0000100", "step-0000103"]
        assert saving["own"] == rank
    assert both[0]["log"].count("No space left on device") == 2
    assert "no checkpoint of step 102: rank 1: OSError" in both[0]["log"]


def test_both_refuse_preflight_that_one_cannot_take_and_weights_that_differ(both):
    for rank, report in enumerate(both):
        assert "does not fit into memory (out of memory: rank 1)" in report["refusals"]["preflight"]
        assert ("CUDA out of memory" in report["refusals"]["preflight"]) == (rank == 1)
        for weights in ("weights", "NaN on one rank"):
            assert "differ between ranks before the first step" in report["refusals"][weights]
        for found in ("checkpoints, None", "checkpoints, latest"):
            assert "the ranks found the checkpoints None, step-0000103 in" in report["refusals"][found]


def test_gradients_of_different_parameters_of_equal_size_are_refused_by_name(both):
    for report in both:
        assert re.search(r"rank \d has a gradient of \S+norm1.weight and rank \d has not", report["uneven"])


def test_metrics_of_other_names_are_refused_by_name(both):
    for report in both:
        assert "rank 0 has the metric loss/of_rank0 and rank 1 has not" in report["other_metrics"]


def test_a_validation_or_export_without_memory_on_one_rank_fails_on_both(both):
    for report in both:
        assert report["without_memory"] == {"scores": {}, "then": True, "exported": False, "training": True}
    log = both[0]["log"]
    assert re.search(r"validation failed at step \d+: CUDA out of memory", log)
    assert "step-0000200 is complete, but its outputs are not: rank 0: CUDA out of memory" in log


def test_a_loader_that_fails_on_one_rank_saves_and_ends_both(both):
    for rank, report in enumerate(both):
        assert report["out_of_data"]["saved"]
        assert ("a worker was killed" if rank else "rank 1 has no more data") in report["out_of_data"]["error"]
        assert "all 8 finished steps are saved" in report["out_of_data"]["error"]
