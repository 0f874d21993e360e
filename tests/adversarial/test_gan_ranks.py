"""Two ranks with a GAN, LeCAM and an adaptive weight: equal to one rank, and none hangs if the other fails."""

from __future__ import annotations

import pickle

import pytest
import torch

from tests import tiny
from tests.adversarial import gan_ranks, toy
from tests.adversarial.test_gan import FRAMES, START
from tests.training import quick
from tests.training.test_trainer import fresh_accelerate  # noqa: F401


@pytest.fixture(scope="module")
def config(videos):
    mse = "++loss.terms={l2: {term: {_target_: vae3d.losses.pixel.MSE}}}"  # without L1's kink
    config = tiny.training("spatial", videos, *START, *FRAMES, *tiny.GAN, mse, "optim.eps=0.01", "trainer.save_every=0",
                           "trainer.max_steps=40")  # fmt: skip
    config.adversary.update(lecam=0.1, r1=1.0, penalty_every=2)
    return config


@pytest.fixture(scope="module")
def both(config, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gan")
    (folder / "config.pickle").write_bytes(pickle.dumps(config))
    tiny.two_ranks("tests.adversarial.gan_ranks", folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_ranks_of_one_clip_are_one_rank_of_two(both, config, tmp_path):
    t = quick.trainer(config, tmp_path, **{"data.batch_size": 2})
    start = {name: tensor.clone() for name, tensor in t.network.state_dict().items()}
    alone = gan_ranks.sound_steps(t)
    first, second = (report["sound"] for report in both)
    for part in ("weights", "critic"):
        for name, tensor in alone[part].items():
            assert torch.equal(first[part][name], second[part][name]), name
            torch.testing.assert_close(first[part][name], tensor, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(first["averages"], alone["averages"], rtol=0, atol=1e-6)
    assert first["averages"].all()
    for mine, theirs in zip(first["metrics"], alone["metrics"], strict=True):
        for name in ("loss", "gan/adaptive_weight", "gan/weight", "gan/lecam", "gan/r1", "gan/discriminator_grad_norm"):
            assert (name in mine) == (name in theirs)
            assert mine.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=1e-4), name
    assert max((tensor - start[name]).abs().max() for name, tensor in alone["weights"].items()) > 1e-4


@pytest.mark.parametrize("error", gan_ranks.FAULTS)
def test_a_error_of_one_rank_amid_the_exchange_skips_the_step_on_both(both, error):
    for report in both:
        assert not report["steps"][error]["applied"]
        assert report["steps"][f"after {error}"]["applied"]
    assert both[0]["steps"][f"after {error}"] == both[1]["steps"][f"after {error}"]


def test_ranks_with_a_gan_that_met_errors_stay_equal(both):
    first, second = both
    assert toy.same(first["weights"], second["weights"])
    assert toy.same(first["critic"], second["critic"])
    for report in both:
        assert "does not fit into memory (out of memory: rank 1)" in report["preflight"]
