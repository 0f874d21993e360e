from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from tests import tiny
from vae3d import distributed
from vae3d.checkpoints.state import ResumeError
from vae3d.config.schema import Optim
from vae3d.errors import UserError
from vae3d.precision import MAX_BENCHMARKED, set_cudnn_benchmark
from vae3d.schedules import ema_decay, learning_rate, ramp
from vae3d.training.ema import Ema, MultiEma
from vae3d.training.failures import SpikeError, SpikeGuard
from vae3d.training.freeze import PartError, parameters_behind, set_mode, train_parts
from vae3d.training.step_status import MeanMeter, StatusTable, StepMetrics, StepStatus


def test_only_named_parts_train_each_with_its_scale():
    model = tiny.model("temporal_vae")
    groups = train_parts(model, {"temporal_encoder": 0.1, "spatial_decoder": 1.0})
    assert [(g["part"], g["lr_scale"]) for g in groups] == [("temporal_encoder", 0.1), ("spatial_decoder", 1.0)]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    prefixes = ("temporal_vae.encoder.", "temporal_vae.quant_conv.", "spatial_vae.module.decoder.")
    assert trained == {
        n for n, _ in model.named_parameters() if n.startswith((*prefixes, "spatial_vae.module.post_quant"))
    }
    set_mode(model, {"temporal_encoder": 0.1})
    assert model.temporal_vae.encoder.training
    assert not model.temporal_vae.decoder.training
    assert not model.spatial_vae.training


def test_all_names_every_parameter():
    model = tiny.model("spatial")
    (group,) = train_parts(model, {"all": 1.0})
    assert len(group["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("model", ["wan", "temporal_vae"])
@pytest.mark.parametrize("reads", ["video", "posterior"])
def test_parameters_behind_a_loss_are_those_that_backward_gives_a_gradient(model, reads):
    """Also through checkpointed blocks and blocks with a backward pass of their own, and on the meta device."""
    switch = "model.temporal.gradient_checkpointing" if model == "temporal_vae" else "model.gradient_checkpointing"
    with torch.device("meta"):
        network = tiny.model(model, f"{switch}=true")
        train_parts(network, {"all": 1.0})
        network.last_layers()[0].requires_grad_(False)
        out = network(torch.zeros(1, 3, 3, 16, 16))
    loss = out.video.mean() if reads == "video" else out.posterior.kl_map().mean()
    found = parameters_behind(loss)
    loss.backward()
    assert found == {p for p in network.parameters() if p.grad is not None}
    assert 0 < len(found) < len(list(network.parameters()))


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"temporal_encodr": 1.0}, "OpenSoraVAE has no part temporal_encodr; it has spatial_encoder, .*, all"),
        ({"encoder": 1.0, "temporal_encoder": 0.1}, "parts temporal_encoder and encoder overlap"),
        ({}, "nothing trains"),
    ],
)
def test_stages_that_do_not_fit_are_refused(scales, message):
    with pytest.raises(PartError, match=message):
        train_parts(tiny.model("temporal_vae"), scales)


def small_model() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


@pytest.mark.parametrize("device", ["model", "cpu"])
def test_ema_follows_its_formula_and_swaps_in_and_out(device):
    model = small_model()
    ema = Ema(model, decay=0.9, warmup=False, device=device)
    shadow = model.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            model.weight += 1.0
        ema.update(step)
        shadow = 0.9 * shadow + 0.1 * model.weight.detach()
    raw = model.weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(model.weight.detach(), shadow)
        assert torch.equal(ema.shadow["weight"], raw)
    assert torch.equal(model.weight.detach(), raw)
    torch.testing.assert_close(ema.state_dict()["weight"], shadow)
    resumed = Ema(small_model(), decay=0.9, device={"cpu": "model", "model": "cpu"}[device])
    resumed.load_state_dict(ema.state_dict())
    assert torch.equal(resumed.shadow["weight"], ema.shadow["weight"])


def test_ema_warms_up_and_can_pause():
    assert [ema_decay(s, decay=0.999, warmup=True) for s in (0, 9, 89)] == pytest.approx([0.1, 10 / 19, 90 / 99])
    assert ema_decay(10**6, decay=0.999, warmup=True) == 0.999
    model = small_model()
    ema = Ema(model, decay=0.5, warmup=False, every=2)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 4.0
    ema.update(0)
    torch.testing.assert_close(ema.shadow["weight"], start)
    ema.update(1)
    torch.testing.assert_close(ema.shadow["weight"], start + 4.0 * (1 - 0.25))


@pytest.mark.parametrize(
    ("step", "decay"),
    [
        (0, 0.1), (200, 201 / 210), (350, 0.975), (500, 501 / 510), (750, 751 / 760), (1000, 1001 / 1010),
        (5000, 5001 / 5010), (10**5, 0.9999),
    ],
)  # fmt: skip
def test_ema_decay_at_the_steps_of_the_wan_recipe(step, decay):
    assert ema_decay(step, decay=0.9999, warmup=True) == pytest.approx(decay, rel=1e-12)
    assert ema_decay(step, decay=0.9999, warmup=False) == 0.9999


def test_ema_keeps_only_what_trains_and_can_be_off():
    model = small_model()
    model.bias.requires_grad_(False)
    assert Ema(model, decay=0.9).state_dict().keys() == {"weight"}
    off = Ema(model, decay=0.0)
    assert off.state_dict() == {}
    with off.applied():
        pass
    with pytest.raises(UserError, match="averages of 1 parameters, this run of 0"):
        off.load_state_dict({"weight": model.weight})


def test_spikes_and_non_finite_losses_are_skipped():
    guard = SpikeGuard(factor=5.0, warmup=3, max_consecutive_skips=10)
    assert all(guard.should_step(loss, loss, finite=True) for loss in (100.0, 1.0, 1.0, 1.0))  # still warming up
    guard.mean = 1.0
    assert not guard.should_step(5.1, 5.1, finite=True)
    assert guard.should_step(4.9, 4.9, finite=True)
    assert not guard.should_step(math.nan, math.nan, finite=False)
    assert not guard.should_step(1.0, 1.0, finite=False)
    assert not guard.should_step(1.0, math.inf, finite=False)
    assert guard.consecutive_skips == 3
    copy = SpikeGuard(5.0, 3, 10)
    copy.load_state_dict(guard.state_dict())
    assert copy.state_dict() == guard.state_dict()


def test_without_a_factor_only_non_finite_losses_are_skipped():
    guard = SpikeGuard(factor=None, warmup=0, max_consecutive_skips=3)
    assert all(guard.should_step(10.0**i, 10.0**i, finite=True) for i in range(10))
    assert not guard.should_step(math.inf, math.inf, finite=False)


def test_the_running_mean_is_of_accepted_mean_losses():
    guard = SpikeGuard(factor=5.0, warmup=2, max_consecutive_skips=10)
    for mean, largest in ((2.0, 3.0), (4.0, 9.0)):
        assert guard.should_step(mean, largest, finite=True)
    assert guard.mean == pytest.approx(3.0)
    assert not guard.should_step(4.0, 15.1, finite=True)  # one rank's spike, which the mean does not show
    assert guard.mean == pytest.approx(3.0)
    assert guard.should_step(4.0, 14.9, finite=True)
    assert guard.mean == pytest.approx((2.0 + 4.0 + 4.0) / 3)


def test_too_many_steps_that_are_not_finite_stop_the_run():
    guard = SpikeGuard(factor=2.0, warmup=1, max_consecutive_skips=3)
    assert guard.should_step(1.0, 1.0, finite=True)
    assert not guard.should_step(math.nan, math.nan, finite=False)
    assert not guard.should_step(9.0, 9.0, finite=True)
    guard.check_limit("loss 9")
    assert not guard.should_step(9.0, 9.0, finite=True)
    with pytest.raises(SpikeError, match=r"3 steps in a row were skipped, the last because of loss 9; .* is 1\."):
        guard.check_limit("loss 9")


def test_losses_that_stay_high_become_the_new_level(caplog):
    guard = SpikeGuard(factor=5.0, warmup=1, max_consecutive_skips=3)
    assert guard.should_step(1.0, 1.0, finite=True)
    assert [guard.should_step(50.0, 50.0, finite=True) for _ in range(4)] == [False, False, False, True]
    assert guard.mean == 50.0
    (record,) = caplog.records
    assert "running mean of the loss 1;" in record.getMessage()
    assert guard.state_dict() == {"mean": 50.0, "accepted": 2, "consecutive_skips": 0, "all_finite": True}

    guard.mean = 1.0  # one of eight ranks far above the others: its level must pass too
    assert [guard.should_step(10.0, 80.0, finite=True) for _ in range(4)] == [False, False, False, True]


OK = StepStatus(1.0, (2.0, 1.5), out_of_memory=(), unreadable=(), no_data=(), not_finite=(), stop=0, read_errors=0)


@pytest.mark.parametrize(
    ("changes", "action", "reason"),
    [
        ({}, "apply", ""),
        ({"largest": (math.nan, 1.0), "not_finite": (0,)}, "skip", "^loss not finite: rank 0$"),
        ({"out_of_memory": (1, 3), "unreadable": (2,)}, "skip", "out of memory: rank 1, 3; .*file: rank 2"),
        ({"no_data": (1,), "out_of_memory": (0,)}, "stop", "rank 1 has no more data"),
        ({"mismatch": "x.weight has one on rank 0 and none on rank 1"}, "stop", "x.weight has one on rank 0"),
    ],
)
def test_a_step_is_applied_skipped_or_ends_the_run_by_what_all_ranks_report(changes, action, reason):
    for spikes in (SpikeGuard(), None):  # None: in a step that trains the discriminator only
        decision = replace(OK, **changes).decide(1.0, spikes)
        assert decision.apply == (action == "apply")
        assert (decision.error is not None) == (action == "stop")
        assert re.search(reason, decision.reason)
        if spikes is not None:  # of steps that some rank did not finish the guard learns nothing
            assert (spikes.accepted, spikes.consecutive_skips) == (int(action == "apply"), int("largest" in changes))
    if not changes:
        assert OK.decide(math.inf, SpikeGuard())[:3] == (False, "gradient norm inf", ())
        assert OK.decide(None, SpikeGuard()).apply
        guard = SpikeGuard(factor=1.5, max_consecutive_skips=9)
        guard.mean, guard.accepted = 0.7, 1  # OK's loss is 2 on rank 0, and 1 in the mean of the ranks
        assert OK.decide(1.0, guard)[:3] == (
            False, "loss 2 is a spike, above 1.5 x the running mean 0.7: rank 0", (0,),
        )  # fmt: skip


def test_averages_at_several_rates_are_loaded_at_the_same_rates_only():
    model = small_model()
    rates = [0.5, 0.9, 0.9999995, 0.9999999]
    emas = MultiEma(model, rates, warmup=False)
    with torch.no_grad():
        model.weight += 1.0
    emas.update(0)
    resumed = MultiEma(small_model(), rates)
    resumed.load_state_dict(emas.state_dict())
    for rate, ema in emas.rates.items():
        assert torch.equal(resumed.rates[rate].shadow["weight"], ema.shadow["weight"])
        torch.testing.assert_close(ema.shadow["weight"], model.weight - rate)
    with pytest.raises(ResumeError, match=r"0\.5, 0\.9, .*, but trainer\.ema\.rates=\['0\.9'\]"):
        MultiEma(model, [0.9]).load_state_dict(emas.state_dict())


def test_a_step_is_not_finite_if_any_loss_is_not():
    metrics, table = StepMetrics(), StatusTable(0, 1, torch.device("cpu"))
    for loss in (2.0, 7.0, 3.0):
        metrics.add({"loss": torch.tensor(loss), "loss_discriminator": torch.tensor(1.0)})
    status = table.sync(metrics.losses(), metrics.names, read_errors=2)
    assert (status.loss, status.worst, status.read_errors, status.finite) == (4.0, 7.0, 2, True)
    for bad in ({"loss": torch.tensor(math.nan)}, {"loss_discriminator": torch.tensor(math.inf)}):
        metrics = StepMetrics()
        for values in (bad, {"loss": torch.tensor(9.0), "loss_discriminator": torch.tensor(1.0)}):
            metrics.add(values)
        status = table.sync(metrics.losses(), metrics.names)
        assert (status.completed, status.finite, status.not_finite) == (True, False, (0,))
    assert status.worst == 9.0  # of the model, not of the discriminator


@pytest.mark.parametrize(("step", "value"), [(0, 0.0), (200, 0.0), (350, 0.5), (500, 1.0), (5000, 1.0)])
def test_ramp(step, value):
    assert ramp(step, 200, 500) == value
    assert ramp(step, 0, 0) == 1.0


def test_learning_rate_warms_up_and_decays():
    optim = Optim(lr=1.0, warmup_steps=4, schedule="cosine", min_lr=0.1)
    assert [learning_rate(optim, s, 104) for s in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert learning_rate(optim, 54, 104) == pytest.approx(0.55)
    assert learning_rate(optim, 104, 104) == learning_rate(optim, 200, 104) == pytest.approx(0.1)
    assert learning_rate(Optim(lr=1e-5), 10**6, 0) == 1e-5
    with pytest.raises(ValueError, match="Input should be 'constant', 'constant_with_warmup', 'linear',"):
        Optim(schedule="linaer")


WAN_ERP = Optim(lr=1e-5, warmup_steps=200, decay_start=1000, schedule="cosine")


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, 0.0), (1, 5e-8), (100, 5e-6), (200, 1e-5), (350, 1e-5), (500, 1e-5), (750, 1e-5), (1000, 1e-5),
        (2000, 1e-5 * (2 + 2**0.5) / 4), (3000, 5e-6), (5000, 0.0), (6000, 0.0),
    ],
)  # fmt: skip
def test_learning_rate_is_held_between_warm_up_and_decay(step, value):
    assert learning_rate(WAN_ERP, step, 5000) == pytest.approx(value, rel=1e-12, abs=1e-20)


def test_metrics_average_over_the_micro_batches_that_have_them():
    metrics = StepMetrics()
    metrics.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)})
    metrics.add({"a": torch.tensor(3.0)})
    status = StatusTable(0, 1, torch.device("cpu")).sync({}, metrics.names, metrics.means())
    assert status.metrics == {"a": 2.0, "b": 5.0}


def test_a_step_with_more_metrics_than_the_table_holds_is_an_error():
    table = StatusTable(0, 1, torch.device("cpu"))
    metrics = {f"m{i:03}": torch.tensor(float(i)) for i in range(table.MAX_METRICS + 1)}
    with pytest.raises(ValueError, match="513 metrics"):
        table.sync({}, [], metrics)
    del metrics["m512"]
    assert list(table.sync({}, [], metrics).metrics.values()) == [float(i) for i in range(512)]


def test_a_window_survives_a_resume():
    window, resumed = MeanMeter(), MeanMeter()
    window.add({"a": 1.0}, applied=True)
    resumed.load_state_dict(window.state_dict())
    resumed.add({"a": 2.0}, applied=True)
    for metrics in ({"a": 50.0}, {}):  # a spike, and a step that is not finite
        resumed.add(metrics, applied=False)
    assert resumed.flush() == {"a": 1.5, "skipped": 2.0}
    assert resumed.flush() == {"skipped": 0.0}


def test_cudnn_searches_for_kernels_where_shapes_are_few(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert [set_cudnn_benchmark(shapes) for shapes in (1, MAX_BENCHMARKED, MAX_BENCHMARKED + 1)] == [True, True, False]
    assert not torch.backends.cudnn.benchmark


def test_gradients_are_averaged_in_few_buckets_of_bounded_size(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", 10)
    sizes = [4, 6, 1, 9, 25, 3, 3]
    tensors = [torch.zeros(size) for size in sizes] + [torch.zeros(2, dtype=torch.float64)]
    found = list(distributed.buckets(tensors))
    assert [[t.numel() for t in bucket] for bucket in found] == [[4, 6], [1, 9], [25], [3, 3], [2]]
    assert all(a is b for a, b in zip((t for bucket in found for t in bucket), tensors, strict=True))
