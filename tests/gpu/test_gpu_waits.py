"""On a GPU: no step waits for it but in transfer.read, twice."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from tests import tiny
from tests.training.test_host_waits import CHANGES, SYSTEMS
from vae3d import transfer
from vae3d.commands import train
from vae3d.training import step_status
from vae3d.training import trainer as trainer_module

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_waits_for_the_gpu_twice(system, precision, videos, trunks, tmp_path):
    config = tiny.training("spatial", videos, *CHANGES, *SYSTEMS[system])
    config.trainer.precision, config.trainer.max_steps = precision, 3
    t = train.build_trainer(config, tmp_path)
    batches, reads = list(t.load_batches(lambda: False)), []

    def read(values: torch.Tensor) -> list[float]:
        torch.cuda.set_sync_debug_mode("default")
        reads.append(len(values))
        numbers = transfer.read(values)
        torch.cuda.set_sync_debug_mode("error")
        return numbers

    with mock.patch.object(step_status, "read", read), mock.patch.object(trainer_module, "read", read):
        t.train_step(batches[:2], 0, None, lambda: batches[2:4])  # cuDNN, cuBLAS and the optimizer set themselves up
        reads.clear()
        torch.cuda.set_sync_debug_mode("error")
        try:
            t.train_step(batches[2:4], 0, None, lambda: batches[4:6])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(reads) == 2
