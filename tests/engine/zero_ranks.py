"""One of two ranks under DeepSpeed's ZeRO-2, run as a process by test_deepspeed.py."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from tests import tiny
from tests.engine import quick
from tests.engine.faulty_ranks import clips_of, out_of_memory
from vae3d.checkpoints import state
from vae3d.engine.patience import LostPatience
from vae3d.engine.rehearsal import rehearse
from vae3d.engine.trainer import Trainer
from vae3d.engine.zero import StrategyError

SETTINGS = {
    "data.batch_size": 4, "trainer.max_steps": 20, "trainer.save_every": 0, "optim.eps": 0.01, "optim.warmup_steps": 5,
    "optim.grad_clip": 0.5,
}  # fmt: skip
STEPS = 6
NAN_AT = 3  # the step in which a clip of rank 1 is NaN


def told(name: str) -> dict[str, Any]:
    """The deepspeed node of conf/trainer/strategy/<name>.yaml, with those of its defaults."""
    node = yaml.safe_load((tiny.ROOT / f"conf/trainer/strategy/{name}.yaml").read_text())
    inner = node["deepspeed"] or {}
    for parent in node.get("defaults", []):
        base = told(parent)
        merged = {**base["zero_optimization"], **inner.get("zero_optimization", {})}
        inner = {**base, **inner, "zero_optimization": merged}
    return inner


def sharded(config: Any, folder: Path, name: str = "deepspeed_zero2", **changes: Any) -> Trainer:
    strategy = {"trainer.strategy.name": "deepspeed", "trainer.strategy.deepspeed": told(name)}
    return quick.trainer(config, folder, **{**SETTINGS, "trainer.accumulate": 2, **strategy, **changes})


def steps(t: Trainer, count: int, spoils: bool) -> list[dict[str, float]]:
    """Sound steps, but for the one that is spoilt, on the rank that spoils it."""
    told = []
    for _ in range(count):
        clips = clips_of(t, t.step)
        if spoils and t.step == NAN_AT:
            clips[1].video = clips[1].to("cpu").video * float("nan")
        told.append(t.train_step(clips))
    return told


def weights(t: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in t.network.state_dict().items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    config = pickle.loads((folder / "config.pickle").read_bytes())
    report: dict[str, Any] = {}
    t = sharded(config, folder / "run")
    rank = t.accelerator.process_index
    rehearse(t)
    report["steps"] = steps(t, 4, spoils=rank == 1)
    t.save()
    report["steps"] += steps(t, STEPS - 4, spoils=False)
    report["weights"], report["ema"] = weights(t), {name: value.clone() for name, value in t.ema.shadow.items()}
    report["partitions"] = [p.clone() for p in t.strategy.rank_state()["partitions"]]
    t.log.close()

    again = sharded(config, folder / "run")
    report["resumed_at"] = again.step
    steps(again, STEPS - again.step, spoils=False)
    report["resumed"] = weights(again)
    hook = again.network.register_forward_pre_hook(out_of_memory) if rank == 1 else None
    try:
        again.train_step(clips_of(again, again.step))
    except LostPatience as error:
        report["left"] = str(error)
    if hook is not None:
        hook.remove()
    again.log.close()
    report["saved"] = state.latest_state(folder / "run/checkpoints").name

    offloaded = sharded(config, folder / "offload", "deepspeed_zero2_offload")
    steps(offloaded, STEPS, spoils=rank == 1)
    report["offloaded"] = weights(offloaded)
    offloaded.log.close()
    try:
        sharded(config, folder / "typo", **{"trainer.strategy.deepspeed": {**told("deepspeed_zero2"), "overlap": True}})
    except StrategyError as error:
        report["typo"] = str(error)
    torch.save(report, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
