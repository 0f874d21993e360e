"""Joining the ranks of a run, as Accelerate finds them: on which device, and if they do not find each other."""

from __future__ import annotations

from unittest import mock

import accelerate
import pytest
import torch

from vae3d import distributed
from vae3d.errors import UserError


@pytest.fixture
def join(monkeypatch) -> mock.Mock:
    """In place of Accelerator: one process."""
    join = mock.Mock()
    join.return_value.num_processes = 1
    monkeypatch.setattr(accelerate, "Accelerator", join)
    return join


def test_a_rank_that_finds_no_other_is_told_what_to_set(join, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"WORLD_SIZE is 4.* RANK.*torchrun"):
        distributed.init_training("fp32")


@pytest.mark.parametrize(("kind", "cpu"), [("mps", True), ("cuda", False)])
def test_training_takes_no_device_without_float64(join, monkeypatch, kind, cpu):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    distributed.init_training("fp32")
    assert join.call_args.kwargs["cpu"] == cpu
