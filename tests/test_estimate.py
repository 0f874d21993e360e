"""The estimates of debug=dry, against what a run really has and what a benchmark counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests import tiny
from tests.training.quick import checked, trainer
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d.checkpoints.state import latest_state, load_state
from vae3d.commands import estimate
from vae3d.data import workers


def test_the_files_of_a_run_have_the_counted_sizes(videos, tmp_path):
    config = checked(videos)
    trainer(config, tmp_path).fit()
    needs = estimate.vae_needs(config, 2)
    saved = load_state(latest_state(tmp_path / "checkpoints"))
    state = sum(leaf.nbytes for leaf in tree_leaves(saved) if isinstance(leaf, torch.Tensor))
    export = (tmp_path / "exports/step-0000002/model.safetensors").stat().st_size
    assert needs.state <= state < needs.state + 1000  # AdamW's steps
    assert needs.export < export < needs.export + 20_000  # names
    assert needs.stays["weights"] == needs.stays["gradients"] == needs.stays["AdamW"] / 2 == needs.export


def test_memory_equals_the_benchmarks_count_and_grows_with_the_clips(videos):
    config = checked(videos)
    one, two, four = (estimate.vae_needs(config, clips) for clips in (1, 2, 4))
    assert 0 < one.activations < two.activations
    assert four.activations - two.activations == 2 * (two.activations - one.activations)
    assert (one.flops, four.flops) == (two.flops / 2, 2 * two.flops)
    x, weight = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter, estimate.StepCost([x, weight]) as cost:
        torch.nn.functional.conv2d(x, weight).sum().backward()
    assert cost.flops == counter.get_total_flops() > 0


@pytest.mark.parametrize("more", [["adversary=seraena", *tiny.SERAENA[1:]], [*tiny.GAN]], ids=["seraena", "patchgan"])
def test_a_discriminator_counts(videos, more):
    frames = ["data.frames.min=1", "data.frames.max=1", "stage=finetune", "stage.init_from=random", "loss=recon_kl"]
    needs = estimate.vae_needs(tiny.training("spatial", videos, *frames, *more), 1)
    assert needs.stays["discriminator"] > 0
    assert bool(needs.note) == ("seraena" in more[0])  # which draws how many pairs it replays


def test_never_more_workers_than_processors(monkeypatch):
    monkeypatch.setattr(workers, "processor_count", lambda: 8)
    assert workers.usable_workers(8) == (8, [])
    most, (line,) = workers.usable_workers(9)
    assert most == 8
    assert "data.workers=9" in line
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers.usable_workers(2) == (2, [])
    assert workers.usable_workers(4)[0] == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert workers.usable_workers(4)[0] == 1
    assert workers.usable_workers(0) == (0, [])
