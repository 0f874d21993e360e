"""One of two ranks under DeepSpeed's ZeRO-2, run as a process by test_deepspeed.py."""

from __future__ import annotations

import pickle
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from tests import tiny
from tests.training import quick
from tests.training.faulty_ranks import clips_of, out_of_memory
from vae3d import distributed
from vae3d.checkpoints import state
from vae3d.data.batches.clips import Unreadable
from vae3d.training.deepspeed import StrategyError
from vae3d.training.failures import TooManyFailures
from vae3d.training.vae_trainer import VaeTrainer

SETTINGS = {
    "data.batch_size": 4, "trainer.max_steps": 20, "trainer.save_every": 100, "optim.eps": 0.01,
    "optim.warmup_steps": 5, "optim.grad_clip": 0.5,
}  # fmt: skip
STEPS, SAVE_AT = 4, 2


def deepspeed_config(name: str) -> dict[str, Any]:
    """The deepspeed node of conf/trainer/strategy/<name>.yaml, with those of its defaults."""
    node = yaml.safe_load((tiny.ROOT / f"conf/trainer/strategy/{name}.yaml").read_text())
    inner = node["deepspeed"] or {}
    for parent in node.get("defaults", []):
        base = deepspeed_config(parent)
        merged = {**base["zero_optimization"], **inner.get("zero_optimization", {})}
        inner = {**base, **inner, "zero_optimization": merged}
    return inner


def sharded(config: Any, folder: Path, name: str = "deepspeed_zero2", **changes: Any) -> VaeTrainer:
    strategy = {"trainer.strategy.name": "deepspeed", "trainer.strategy.deepspeed": deepspeed_config(name)}
    return quick.trainer(config, folder, **{**SETTINGS, "trainer.accumulate": 2, **strategy, **changes})


def steps(t: VaeTrainer, last: int) -> list[dict[str, Any]]:
    return [asdict(t.train_step(clips_of(t, step))) for step in range(t.step, last)]


def skips(t: VaeTrainer, fails: bool) -> list[bool]:
    """Whether steps are applied that one rank leaves before any backward pass, without a file or memory, and of a sound one."""
    clips = clips_of(t, t.step)
    applied = [t.train_step([clips[0], Unreadable([("gone.mp4", "is empty")])] if fails else clips).applied]
    hook = t.network.register_forward_pre_hook(out_of_memory) if fails else None
    applied.append(t.train_step(clips_of(t, t.step)).applied)
    if hook is not None:
        hook.remove()
    return [*applied, t.train_step(clips_of(t, t.step)).applied]


def ends(t: VaeTrainer, failure: str, fails: bool) -> dict[str, Any]:
    """How a run ends with a step that one rank fails after its backward passes."""
    before, forward_backward, clips = weights(t), t.forward_backward, clips_of(t, t.step)

    def with_failure(*args: Any) -> None:
        forward_backward(*args)
        if fails and failure == "memory":
            out_of_memory()

    if fails and failure == "gradient":  # of a finite loss
        next(p for p in t.network.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * torch.nan)
    if fails and failure == "nan":
        clips[1].video = clips[1].to("cpu").video * float("nan")
    t.forward_backward = with_failure
    message = ""
    try:
        t.train_step(clips)
    except TooManyFailures as error:
        message = str(error)
    t.log.close()
    saved = state.latest_state(t.folder / "checkpoints")
    moved = any(not torch.equal(tensor, before[name]) for name, tensor in weights(t).items())
    return {"message": message, "moved": moved, "step": t.step, "saved": saved and saved.name}


def weights(t: VaeTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in t.network.state_dict().items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    config = pickle.loads((folder / "config.pickle").read_bytes())
    report: dict[str, Any] = {}
    t = sharded(config, folder / "run")
    rank = t.rank
    t.preflight()
    report["steps"] = steps(t, SAVE_AT)
    t.checkpointer.save(t.step)
    report["steps"] += steps(t, STEPS)
    report["weights"], report["ema"] = weights(t), {name: value.clone() for name, value in t.ema.shadow.items()}
    report["partitions"] = [p.clone() for p in t.strategy.partitions()]
    t.log.close()

    t = sharded(config, folder / "run")
    report["resumed_at"] = t.step
    steps(t, STEPS)
    report["resumed"] = weights(t)
    report["skips"] = skips(t, fails=rank == 1)
    report["nan"] = ends(t, "nan", fails=rank == 1)
    t = sharded(config, folder / "run")
    report["nan again"] = ends(t, "nan", fails=rank == 1)

    t = sharded(config, folder / "offload", "deepspeed_zero2_offload")
    steps(t, STEPS)
    report["offloaded"] = weights(t)
    report["memory"] = ends(t, "memory", fails=rank == 1)
    for key, name in (("gradient", "deepspeed_zero2"), ("gradient, offloaded", "deepspeed_zero2_offload")):
        t = sharded(config, folder / name, name)
        steps(t, 1)
        report[key] = ends(t, "gradient", fails=rank == 1)
    try:
        unknown = {**deepspeed_config("deepspeed_zero2"), "overlap": True}
        sharded(config, folder / "typo", **{"trainer.strategy.deepspeed": unknown})
    except StrategyError as error:
        report["typo"] = str(error)
    torch.save(report, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    with distributed.process_group_scope():
        main(Path(sys.argv[1]))
