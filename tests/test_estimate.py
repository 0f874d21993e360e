"""What is counted of a training step, against what a run really has; and never more workers than processors."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import vae3d
from tests import tiny
from tests.training.quick import checked, trainer
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d.checkpoints.formats import CheckpointError
from vae3d.checkpoints.state import latest_state, load_state
from vae3d.commands import estimate, step_cost
from vae3d.commands.dry_run import first_weights
from vae3d.data import workers
from vae3d.loading import instantiate


def test_the_files_of_a_run_have_the_counted_sizes(videos, tmp_path):
    config = checked(videos)
    trainer(config, tmp_path).fit()
    needs = step_cost.vae_needs(config, 2)
    saved = load_state(latest_state(tmp_path / "checkpoints"))
    state = sum(leaf.nbytes for leaf in tree_leaves(saved) if isinstance(leaf, torch.Tensor))
    export = (tmp_path / "exports/step-0000002/model.safetensors").stat().st_size
    assert needs.state <= state < needs.state + 1000  # AdamW's steps
    assert needs.export < export < needs.export + 20_000  # names
    assert needs.stays["weights"] == needs.stays["gradients"] == needs.stays["AdamW"] / 2 == needs.export


def test_what_is_kept_on_the_host_is_not_on_the_device_where_several_ranks_average_gradients(videos):
    config = deepcopy(checked(videos))
    config.trainer.ema.decay = 0.9
    beside, config.trainer.ema.device = step_cost.vae_needs(config, 1), "cpu"
    host = step_cost.vae_needs(config, 1, ranks=2)
    assert (host.host, beside.host, beside.stays["EMA"]) == ({"EMA": beside.stays["EMA"]}, {}, beside.stays["weights"])
    buffers = host.stays["averaging over ranks"]
    assert buffers == beside.stays["weights"]
    assert host.memory == beside.memory - beside.stays["EMA"] + buffers
    assert host.state == beside.state
    config.trainer.reduce_dtype = "bf16"
    with step_cost.fake_tensors():
        assert step_cost.build(config).reduction_bytes() == buffers // 2
    (line,) = (line for line in estimate.estimates(config, host, "1 clip", 1.0, 1, 0, 0) if "of the host" in line)
    assert f"EMA {estimate.amount(beside.stays['EMA'])}" in line
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    config.trainer.strategy = replace(config.trainer.strategy, name="deepspeed", deepspeed=offload)
    offloaded = step_cost.vae_needs(config, 1, ranks=2)
    assert offloaded.host["AdamW"] == beside.stays["AdamW"] // 2
    assert "AdamW" not in offloaded.stays


def test_memory_and_operations_grow_with_the_clips_and_operations_equal_torchs_count(videos):
    config = checked(videos)
    one, two, four = (step_cost.vae_needs(config, clips) for clips in (1, 2, 4))
    tops = [needs.parts["backward"] for needs in (one, two, four)]
    assert 0 < tops[0] < tops[1]
    assert tops[2] - tops[1] == pytest.approx(2 * (tops[1] - tops[0]), rel=0.05)
    assert (one.flops, four.flops) == (two.flops / 2, 2 * two.flops)
    assert abs(one.stays["other"]) < 2**20  # every item is counted, and once
    x, weight = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter, step_cost.StepCost([x, weight]) as cost:
        torch.nn.functional.conv2d(x, weight).sum().backward()
    assert cost.flops == counter.get_total_flops() > 0


@pytest.mark.parametrize("more", [["adversary=seraena", *tiny.SERAENA[1:]], [*tiny.GAN]], ids=["seraena", "patchgan"])
def test_a_discriminator_counts(videos, more):
    frames = ["data.frames.min=1", "data.frames.max=1", "stage=finetune", "stage.init_from=random", "loss=recon_kl"]
    config = tiny.training("spatial", videos, *frames, *more)
    needs = step_cost.vae_needs(config, 1, ranks=2)
    assert needs.stays["discriminator"] > 0
    assert needs.parts["discriminator"] > 0
    assert needs.stays["averaging over ranks"] > needs.stays["weights"]  # also of the discriminator
    (line,) = (line for line in [estimate.disk(config, needs, 2)] if "checkpoint" in line)
    if "seraena" not in more[0]:
        assert needs.replay == 0
        assert "replay" not in line
        return
    pair = 2 * (9 * 16 * 16 + config.adversary["context_channels"] * 8 * 8)
    assert needs.replay == config.trainer.max_steps * pair
    assert "replay of 2 ranks" in line
    config.adversary["buffer_gib"] = 1.5 * pair / 2**30
    assert step_cost.vae_needs(config, 1).replay == pair


def test_a_cache_of_targets_is_neither_read_nor_written(videos, tmp_path):
    of_decoder = ["stage=decoder_only", "stage.init_from=random", "loss=decoder_pixels"]
    config = tiny.training(
        "taehv", videos, *of_decoder, f"teacher.path={videos}", f"teacher.cache={tmp_path / 'cache'}"
    )
    teacher = partial(tiny.model, "taehv")
    cached = step_cost.vae_needs(config, 1, teacher)
    config.teacher.cache = None
    assert cached == step_cost.vae_needs(config, 1, teacher)
    assert not (tmp_path / "cache").exists()


def test_never_more_workers_than_processors(monkeypatch):
    monkeypatch.setattr(workers, "processor_count", lambda: 8)
    assert workers.usable_workers(8) == (8, [])
    most, (line,) = workers.usable_workers(9)
    assert most == 8
    assert "data.workers=9" in line
    assert "--workers=9" in workers.usable_workers(9, "--workers")[1][0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers.usable_workers(2) == (2, [])
    assert workers.usable_workers(4)[0] == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert workers.usable_workers(4)[0] == 1
    assert workers.usable_workers(0) == (0, [])


def test_a_dry_run_says_where_the_first_weights_are_from_or_that_they_do_not_fit(videos, tmp_path):
    config = deepcopy(checked(videos))
    config.run.root = str(tmp_path)
    with torch.device("meta"):
        model = instantiate(config.model)
    vae3d.save(tiny.model("spatial"), tmp_path / "same")
    vae3d.save(tiny.model("wan"), tmp_path / "other")
    config.stage.init_from = str(tmp_path / "same")
    assert first_weights(config, model) == [f"the model starts from {tmp_path}/same/model.safetensors (export)"]
    config.stage.init_from = str(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"holds a WanVAE, and stage\.init_from needs a SpatialVAE"):
        first_weights(config, model)
