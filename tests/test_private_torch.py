"""What vae3d takes from torch by another name in old versions, and how it would show that a new one dropped it."""

from __future__ import annotations

import inspect
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from vae3d import distributed

TIMEOUT = timedelta(seconds=77)


def test_torch_can_change_the_timeout_of_collectives():
    assert hasattr(dist, "set_timeout") or hasattr(dist.distributed_c10d, "_set_pg_timeout"), (
        f"torch {torch.__version__} has neither torch.distributed.set_timeout nor _set_pg_timeout: find what replaces "
        "them, and change vae3d.distributed._set_timeout"
    )


@pytest.mark.parametrize("public", [True, False])
def test_the_timeout_of_collectives_is_set_by_the_function_that_torch_has(public, monkeypatch):
    calls = []
    if public:
        monkeypatch.setattr(dist, "set_timeout", lambda *args: calls.append(args), raising=False)
    else:
        monkeypatch.delattr(dist, "set_timeout", raising=False)
        private = lambda *args: calls.append(args)  # noqa: E731
        monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", private, raising=False)
    distributed._set_timeout(TIMEOUT)
    assert calls == [(TIMEOUT, dist.group.WORLD)]


def test_the_loss_scale_is_read_through_a_public_function_that_does_not_wait():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert scaler.scale(torch.ones(())) == 8.0
    assert ".item()" not in inspect.getsource(torch.amp.GradScaler.scale)
