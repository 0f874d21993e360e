"""Learning rates against diffusers' schedulers, and by hand."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from diffusers.optimization import get_scheduler

from vae3d.config.schema import Optim
from vae3d.schedules import Schedule, learning_rate

PEERS_END = 1e-7  # what diffusers' polynomial schedule ends at


def peers(name: str, lr: float, warmup: int, last: int, cycles: int, power: float) -> list[float]:
    """Learning rates of the steps up to `last` and some after it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=last, num_cycles=cycles, power=power
    )
    rates = []
    for _ in range(last + 5):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("name", "warmup", "cycles", "power"),
    list(itertools.product(get_args(Schedule), (0, 7), (1, 3), (1.0, 2.5))),
)
def test_equals_diffusers(name, warmup, cycles, power):
    lr, last = 3e-4, 60
    theirs = peers(name, lr, warmup, last, cycles, power)
    if name == "cosine":  # theirs goes up again after the last step
        theirs = theirs[: last + 1] + [0.0] * 4
    settings = Optim(
        lr=lr,
        warmup_steps=0 if name == "constant" else warmup,
        schedule=name,
        min_lr=PEERS_END if name == "polynomial" else 0.0,
        cycles=cycles,
        power=power,
    )
    ours = [learning_rate(settings, step, max_steps=last) for step in range(last + 5)]
    assert ours == pytest.approx(theirs, rel=0, abs=1e-12 * lr)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("constant_with_warmup", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 1.0, 0.8, 0.6, 0.2]),
        ("cosine", [0.0, 0.5, 1.0, 1.0, 0.2 + 0.4 * (1 + 2**-0.5), 0.6, 0.2]),
        ("cosine_with_restarts", [0.0, 0.5, 1.0, 1.0, 0.6, 1.0, 0.2]),
        ("polynomial", [0.0, 0.5, 1.0, 1.0, 0.2 + 0.8 * 9 / 16, 0.4, 0.2]),
    ],
)
def test_hand_values_with_a_hold_and_a_floor(schedule, rates):
    settings = Optim(lr=1.0, schedule=schedule, warmup_steps=4, decay_start=8, min_lr=0.2, cycles=2, power=2.0)
    steps = (0, 2, 4, 8, 10, 12, 16)
    assert [learning_rate(settings, s, max_steps=16) for s in steps] == pytest.approx(rates, rel=1e-12)
