"""A training step waits for the device twice: for its status with the metrics, and for the gradient norms."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.device_stub import DEVICE, HOST, DeviceStub, check_two_waits
from tests.stream_stub import check_input_copies
from vae3d.commands import train
from vae3d.config.schema import TrainConfig

SYSTEMS = {
    "plain": ["loss=recon_kl", "optim.proximal=0.01"],
    "lpips": ["loss=recon_kl_lpips", "loss.logvar=0"],
    "gan": ["loss=recon_kl", *tiny.GAN, "adversary.lecam=0.1", "adversary.r1=1", "adversary.penalty_every=2"],
    "clips gan": ["loss=recon_kl", *tiny.GAN, "adversary.input=clips", "adversary.adaptive=false"],
    "alternating gan": ["loss=recon_kl", *tiny.GAN, "adversary.alternate=true"],
    "seraena": ["loss=recon_kl", *tiny.SERAENA, "adversary.buffer_length=3", "adversary.start=0"],
}
CHANGES = ["stage=finetune", "stage.init_from=random", "trainer.accumulate=2", "data.batch_size=4"]
CHANGES += ["trainer.max_steps=2", "trainer.save_every=0", "data.frames.min=3", "data.frames.max=3", "data.height=16"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_of_an_autoencoder_waits_for_the_device_twice(system, videos, trunks, tmp_path):
    config: TrainConfig = tiny.training("spatial", videos, *CHANGES, *SYSTEMS[system])
    check_two_waits(train.build_trainer(config, tmp_path), steps=1 if system == "lpips" else 2)


@pytest.mark.parametrize("system", ["plain", "gan"])
def test_micro_batches_of_an_autoencoder_are_copied_ahead(system, videos, tmp_path):
    config: TrainConfig = tiny.training("spatial", videos, *CHANGES, *SYSTEMS[system])
    check_input_copies(train.build_trainer(config, tmp_path), steps=2, tensors=1)


def test_the_stub_sees_what_makes_a_gpu_wait():
    stub = DeviceStub()
    x, host = torch.randn(4), torch.randn(4)
    stub.place([x])
    with stub.active():
        y = (x * 2 + torch.full((), 3.0, device=DEVICE)).requires_grad_()
        y.square().sum().backward()
        assert stub.holds(y.grad)
        assert (y.device, host.device) == (DEVICE, HOST)
        assert not stub.waits
        host.to(x.device, non_blocking=True) + x
        host[:2].sum().item(), host.tolist(), bool(host[0] > 0)
        assert not stub.waits
        for waits in (
            lambda: y.grad.sum().item(), lambda: float(y[0]), lambda: bool((y > 0).any()), lambda: y.tolist(),
            lambda: host.to(x.device), lambda: x.cpu(), lambda: x.to("cpu"), lambda: torch.tensor(1.0, device=DEVICE),
            lambda: x[x > 0], lambda: x.nonzero(), lambda: x + host, lambda: host.copy_(x), lambda: x.copy_(host),
        ):  # fmt: skip
            before = len(stub.waits)
            with torch.no_grad():
                waits()
            assert len(stub.waits) == before + 1
