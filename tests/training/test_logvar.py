"""The learned log-variance: its loss, its optimizer, its checkpoints; and what weights of the KL mean elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from tests import tiny
from tests.losses.test_objective import as_clip, reconstruction
from tests.training import quick
from tests.training.test_trainer import fresh_accelerate, trace  # noqa: F401
from vae3d.checkpoints.state import ResumeError, latest_state, load_state
from vae3d.config.check import read
from vae3d.config.issues import ConfigError
from vae3d.config.schema import TrainConfig
from vae3d.losses.latent import KL
from vae3d.losses.objective import Objective, WeightedTerm
from vae3d.losses.pixel import L1, MSE
from vae3d.types import Posterior, Reconstruction

ELEMENTS = 3 * 16 * 16


def terms() -> dict[str, WeightedTerm]:
    return {"l1": WeightedTerm(L1(), 1.0), "mse": WeightedTerm(MSE(), 0.5), "kl": WeightedTerm(KL(), 1e-3)}


@pytest.mark.parametrize(("reduction", "elements"), [("sum", ELEMENTS), ("mean", 1)])
def test_the_pixel_terms_are_a_likelihood(reduction, elements):
    video = torch.rand(2, 3, 2, 16, 16) * 2 - 1
    out = reconstruction(video)
    plain, metrics = Objective(terms(), reduction)(as_clip(video), out, 0)
    objective = Objective(terms(), reduction, logvar=-1.5)
    loss, more = objective(as_clip(video), out, 0)
    kl = metrics["loss_weighted/kl"]
    nll = plain.detach() - kl
    torch.testing.assert_close(loss.detach(), nll * math.exp(1.5) - 1.5 * elements + kl)
    loss.backward()
    assert objective.logvar.grad.item() == pytest.approx(elements - nll.item() * math.exp(1.5), rel=1e-4)
    assert more["loss/logvar"] == -1.5
    assert more["loss/l1"] == metrics["loss/l1"]
    torch.testing.assert_close(sum(v for k, v in more.items() if k.startswith("loss_weighted/")), loss.detach())


def test_it_comes_to_rest_at_the_mean_error():
    video = torch.zeros(1, 3, 1, 16, 16)
    out = reconstruction(video)
    out.video = torch.full_like(video, 0.2)
    objective = Objective({"l1": WeightedTerm(L1(), 1.0), "mse": WeightedTerm(MSE(), 0.5)}, "sum", logvar=0.0)
    optimizer = torch.optim.SGD([objective.logvar], lr=0.2 / ELEMENTS)
    for _ in range(200):
        optimizer.zero_grad()
        objective(as_clip(video), out, 0)[0].backward()
        optimizer.step()
    assert objective.logvar.exp().item() == pytest.approx(0.2 + 0.5 * 0.04, rel=1e-4)


def logvar_settings(**more) -> dict:
    # Steps of Adam that follow the size of the gradient, and a decay that must not touch it.
    return {"loss.logvar": -0.5, "loss.logvar_lr": 3.0, "optim.eps": 1e3, "optim.weight_decay": 0.5, **more}


def test_two_steps_move_it_by_the_hand_gradient(videos, tmp_path):
    t = quick.trainer(videos, tmp_path, **logvar_settings(**{"optim.grad_clip": 1e9, "trainer.save_every": 0}))
    assert [group["part"] for group in t.optimizer.param_groups][-1] == "logvar"
    s, first, second = -0.5, 0.0, 0.0
    clips = t.data.clips(0, 2)
    for step in (1, 2):
        values = t.train_step([next(clips)]).metrics
        assert values["loss/logvar"] == pytest.approx(s, abs=1e-6)
        gradient = ELEMENTS - values["loss/l1"] * math.exp(-s)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        root = (second / (1 - 0.999**step)) ** 0.5
        s -= 3.0 * 1e-3 * first / (1 - 0.9**step) / (root + 1e3)
        assert t.objective.logvar.item() == pytest.approx(s, abs=1e-6)
    assert abs(s + 0.5) > 1e-4
    assert t.objective.logvar not in set(t.network.parameters())
    assert len(t.ema.shadow) <= len(t.network.state_dict())


def test_a_resumed_run_has_the_same_logvar_to_the_bit(videos, tmp_path):
    whole = quick.trainer(videos, tmp_path / "whole", **logvar_settings(**{"trainer.max_steps": 4}))
    whole.fit()
    quick.trainer(videos, tmp_path / "parts", **logvar_settings()).fit()
    resumed = quick.trainer(videos, tmp_path / "parts", **logvar_settings(**{"trainer.max_steps": 4}))
    assert resumed.step == 2
    assert resumed.optimizer.param_groups[-1]["weight_decay"] == 0.0
    resumed.fit()
    assert torch.equal(resumed.objective.logvar, whole.objective.logvar)
    assert trace(tmp_path / "whole", "loss/logvar")[-2:] == trace(tmp_path / "parts", "loss/logvar")[-2:]
    saved = load_state(latest_state(tmp_path / "parts" / "checkpoints"))
    assert saved["objective"] == {"logvar": resumed.objective.logvar.data}
    assert not any("logvar" in name for kind in ("model", "ema") for name in saved[kind])

    with pytest.raises(ResumeError, match=r"was trained with loss\.logvar; give this run another run.name, or set"):
        quick.trainer(videos, tmp_path / "parts", **{"trainer.max_steps": 6})
    faster = quick.trainer(videos, tmp_path / "parts", **logvar_settings(**{"loss.logvar_lr": 7.0}))
    assert faster.optimizer.param_groups[-1]["lr_scale"] == 7.0


FAULTS = {
    "no pixels": (["loss.terms.l1.weight=0"], "loss.logvar=0.0 needs a term on pixels"),
    "spikes": (
        ["trainer.spike.factor=5"],
        "trainer.spike.factor=5.0: needs a positive loss, and with loss.logvar=0.0",
    ),
    "deepspeed": (
        ["trainer/strategy=deepspeed_zero2"],
        "loss.logvar=0.0: is not a parameter of the model, and DeepSpeed",
    ),
    "rate": (["loss.logvar_lr=0"], "loss.logvar_lr=0: must be a number above 0"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_go_with_it_is_refused(videos, name):
    overrides, message = FAULTS[name]
    common = ["stage=finetune", "stage.init_from=random", "loss=recon_kl", "loss.logvar=0"]
    with pytest.raises(ConfigError) as error:
        tiny.training("spatial", videos, *common, *overrides, meta_check=True)
    assert [message in reason for reason in map(str, error.value.issues)] == [True]


# ---- units


def test_a_kl_of_sums_and_its_equivalents_of_means_have_one_gradient():
    """At 256 pixels with f8c4: 1e-6 of a sum against sums, 5.1e-12 of a sum or 2.1e-8 of a mean against means."""
    video = torch.zeros(1, 3, 1, 256, 256)
    rec = torch.rand(1, 3, 1, 256, 256).requires_grad_()
    elements, latents = 3 * 256 * 256, 4 * 32 * 32

    moments = torch.randn(1, 8, 1, 32, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def gradients(reduction: str, kl: WeightedTerm) -> list[torch.Tensor]:
        posterior = Posterior.from_moments(moments)
        objective = Objective({"l1": WeightedTerm(L1(), 1.0), "kl": kl}, reduction)
        loss, metrics = objective(as_clip(video), Reconstruction(rec, posterior, posterior.mean), 0)
        torch.testing.assert_close(metrics["loss_mean/kl"], posterior.kl().mean().detach() / latents)
        return list(torch.autograd.grad(loss, (rec, moments)))

    ldm = gradients("sum", WeightedTerm(KL(), 1e-6))
    for weight, reduction, rounded in ((1e-6 / elements, "sum", 5.1e-12), (1e-6 * latents / elements, None, 2.1e-8)):
        assert weight == pytest.approx(rounded, rel=0.01)
        means = gradients("mean", WeightedTerm(KL(), weight, reduction=reduction))
        for mine, theirs in zip(means, ldm, strict=True):
            torch.testing.assert_close(elements * mine, theirs, rtol=1e-4, atol=1e-12)


def test_loss_files_hold_the_numbers_of_their_sources():
    ldm, ours, theirs = (
        read(tiny.compose(f"loss={name}"), TrainConfig)[0].loss for name in ("ldm", "sd_vae", "sd_vae_lightning")
    )
    assert (ldm.reduction, ours.reduction, theirs.reduction) == ("sum", "mean", "mean")
    assert {name: term.weight for name, term in ldm.terms.items()} == {"l1": 1.0, "lpips": 1.0, "kl": 1e-6}
    assert ours.terms["kl"].weight == pytest.approx(1e-6 * 4 / (3 * 8**2), rel=0.01)
    assert ours.terms["kl"].reduction is None
    assert {name: term.weight for name, term in theirs.terms.items()} == {"mse": 1.0, "lpips": 0.5, "kl": 1e-6}
    assert theirs.terms["kl"].reduction == "sum"
    lightning = read(tiny.compose("experiment=sd_vae_gan_lightning"), TrainConfig)[0]
    disc_weight, disc_factor, gradient_clip_val = 1.0, 0.5, 1.0  # its configs/train_config.json
    assert lightning.adversary["weight"] == disc_weight * disc_factor
    assert lightning.adversary["grad_clip"] == gradient_clip_val / disc_factor  # the loss there is halved, too
    assert (lightning.adversary["adaptive_max"], lightning.data.crop, lightning.data.flip) == (10.0, "center", True)


def test_a_run_says_its_absolute_learning_rate_and_effective_batch(videos, tmp_path, caplog):
    """latent-diffusion's 4.5e-6 is times accumulation, GPUs and batch; here it is what AdamW gets."""
    settings = {"data.batch_size": 4, "trainer.accumulate": 2, "optim.lr": 4.5e-6, "trainer.save_every": 0}
    with caplog.at_level("INFO", "vae3d"):
        t = quick.trainer(videos, tmp_path, **settings)
    expected = "batch of 4 clips = 1 rank x 2 micro-batches x 2 clips; 2 steps at learning rate 4.5e-06"
    assert expected in caplog.text
    t.fit()
    assert {group["lr"] for group in t.optimizer.param_groups} == {4.5e-6}
