"""What two ranks do together when one of them meets a spike or NaN; and what they are pulled to."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch

from tests import tiny
from tests.training import quick, two_ranks
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d.commands import train
from vae3d.config.schema import TrainConfig
from vae3d.precision import DTYPES


@pytest.fixture(scope="module")
def wan(videos) -> TrainConfig:
    """Of one and of three frames: single frames give the time convolutions zero gradients, which DDP waits for."""
    mse = "{_target_: vae3d.losses.pixel.MSE}"  # without L1's kink, where rounding decides the sign
    turned = "{_target_: vae3d.losses.equivariance.Equivariance, norm: l2}"
    more = [
        "stage=slow_encoder", "stage.init_from=random", "stage.latent_noise=0.3", "loss=recon_kl", "loss.logvar=-1",
        f"++loss.terms={{l1: {{term: {mse}}}, turned: {{term: {turned}}}}}",
        "data.frames.min=1", "data.frames.max=3", "data.frames.step=2", "data.batch_size=4", "trainer.max_steps=4",
        "optim.eps=0.01", "optim.lr=1e-2", "loss.terms.kl.weight=10", "model.gradient_checkpointing=true",
        "trainer.save_every=1", "trainer.async_mode=async",
        "validation.every=2", "validation.frames=1", "validation.clips=2", "trainer.best=psnr",
    ]  # fmt: skip
    return tiny.training("wan", videos, *more)


@pytest.fixture(scope="module")
def ranks(videos, wan, mixture, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "config.pickle").write_bytes(pickle.dumps(quick.checked(videos)))
    (folder / "mixture.pickle").write_bytes(pickle.dumps(mixture))
    (folder / "wan.pickle").write_bytes(pickle.dumps(wan))
    tiny.two_ranks("tests.training.two_ranks", folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", two_ranks.FACTORS)
def test_a_loss_that_is_a_spike_or_nan_on_one_rank_is_skipped_by_both(ranks, name):
    for report in ranks:
        values = report["steps"][name]
        assert not values["applied"]
        if name == "spike":  # which the mean over ranks and micro-batches would not have shown
            metrics = values["metrics"]
            assert metrics["loss"] < 5.0 * report["spikes"]["mean"] < metrics["loss_max"]
        assert values["reason"].endswith(": rank 1")
        assert report["steps"]["after"]["applied"]


def test_ranks_stay_equal_and_average_gradients_only_of_sound_steps(ranks):
    first, second = ranks
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
    assert first["spikes"] == second["spikes"] == first["resumed"] == second["resumed"]
    assert first["spikes"]["accepted"] == two_ranks.SOUND + 1
    assert first["collectives"] == 2 + 1 + 2  # status with metrics, gradients; of the step with the NaN the status only
    assert first["steps"]["after"] == second["steps"]["after"]


def test_collectives_time_out_soon_but_for_the_first_step_and_validations(ranks):
    long, short = 7200, 600 + 900  # the second with data.timeout
    for report in ranks:
        assert report["wan"]["timeouts"] == [short, *[long, short] * 4]  # a checkpoint in each step


def test_the_pictures_of_validated_clips_go_to_the_first_rank_only(ranks):
    assert [report["mixture"]["pictures"] for report in ranks] == [[True] * 3, [False] * 3]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_are_summed_over_ranks_in_reduce_dtype_and_divided_in_fp32(ranks, dtype):
    first, second = (report["averaged"][dtype] for report in ranks)
    kind = DTYPES[dtype]
    assert first["buffer"] == kind
    for a, b, *results in zip(first["given"], second["given"], first["result"], second["result"], strict=True):
        expected = (a.to(kind) + b.to(kind)).float() / 2
        for result in results:
            assert result.dtype == torch.float32
            assert torch.equal(result, expected)
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name


def test_bf16_reduction_changes_the_weights_a_little(ranks):
    exact, rounded = (ranks[0]["averaged"][dtype]["weights"] for dtype in ("fp32", "bf16"))
    differences = [(exact[name] - rounded[name]).abs().max().item() for name in exact]
    assert 0 < max(differences) < 1e-3


def test_ranks_of_other_settings_or_data_refuse_to_start_and_name_what_differs(ranks):
    for report in ranks:
        settings, data = report["refused"]
        assert settings.splitlines()[1:] == ["  optim.lr: 0.001 on rank 0, 0.002 on rank 1"]
        (line,) = data.splitlines()[1:]
        assert line.startswith("  data: order of the rows: ")


@pytest.mark.smoke
def test_two_ranks_are_pulled_as_one_is(videos, tmp_path, ranks):
    one = quick.trainer(videos, tmp_path, **two_ranks.SETTINGS, **{"trainer.accumulate": 4})
    alone = two_ranks.sound_steps(one, 4)
    for name, tensor in ranks[0]["sound"].items():
        torch.testing.assert_close(tensor, alone[name], rtol=0, atol=1e-6)
    drift = sum((tensor - one.proximal.anchor[name]).abs().sum() for name, tensor in alone.items())
    assert drift > 1e-3


def test_two_ranks_are_one_also_where_time_convolutions_are_idle(ranks, wan, tmp_path):
    config = deepcopy(wan)
    config.trainer.accumulate = 2
    before = {
        name: tensor.clone()
        for name, tensor in train.build_trainer(config, tmp_path / "start").network.state_dict().items()
    }
    alone = two_ranks.train(config, tmp_path / "one")
    first, second = (report["wan"] for report in ranks)
    assert set(alone["frames"]) == {1, 3}
    assert first["frames"] == second["frames"] == alone["frames"]
    assert first["best"] == second["best"] == [alone["best"][0], pytest.approx(alone["best"][1], abs=1e-3), True]
    assert first["logvar"] == second["logvar"] == pytest.approx(alone["logvar"], abs=1e-6)
    for name, tensor in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name], tensor, rtol=0, atol=1e-6)
        if "time_conv" in name:
            assert (tensor - before[name]).abs().max() > 1e-5, name


def test_two_ranks_are_one_on_a_mixture_of_sources_and_buckets(ranks, mixture, tmp_path):
    alone = two_ranks.some_steps(deepcopy(mixture), tmp_path, accumulate=2)
    first, second = (report["mixture"] for report in ranks)
    assert first["shapes"] == second["shapes"] == alone["shapes"]
    assert len({tuple(shape) for shape in alone["shapes"]}) > 2
    for a, b, step in zip(first["positions"], second["positions"], alone["positions"], strict=True):
        assert sorted(a + b) == sorted(step)
    for name, tensor in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name], tensor, rtol=0, atol=1e-6)
