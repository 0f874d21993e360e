"""One of two ranks under DeepSpeed's ZeRO-2, run as a process by test_deepspeed.py."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from tests import tiny
from tests.training import quick
from tests.training.faulty_ranks import clips_of, out_of_memory
from vae3d import distributed
from vae3d.checkpoints import state
from vae3d.data.clips import Unreadable
from vae3d.training.deepspeed import StrategyError
from vae3d.training.spike import TooManyFailures
from vae3d.training.vae_trainer import VaeTrainer

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


def sharded(config: Any, folder: Path, name: str = "deepspeed_zero2", **changes: Any) -> VaeTrainer:
    strategy = {"trainer.strategy.name": "deepspeed", "trainer.strategy.deepspeed": told(name)}
    return quick.trainer(config, folder, **{**SETTINGS, "trainer.accumulate": 2, **strategy, **changes})


def steps(t: VaeTrainer, count: int, spoils: bool) -> list[dict[str, float]]:
    """Sound steps, but for the one that is spoilt, on the rank that spoils it."""
    told = []
    for _ in range(count):
        clips = clips_of(t, t.step)
        if spoils and t.step == NAN_AT:
            clips[1].video = clips[1].to("cpu").video * float("nan")
        told.append(t.train_step(clips))
    return told


def dropped(t: VaeTrainer, rank: int) -> dict[str, list[float]]:
    """What becomes of steps that must not be taken though DeepSpeed has sound gradients, or those of one rank only:
    rank 1 has no file, or its discriminator fails after the last backward pass. With a sound step after each."""
    told = {}
    for error in ("data", "discriminator"):
        before, clips, accumulate = weights(t), clips_of(t, t.step), t.accumulate

        def spoilt(clips: list, phase: Any, metrics: Any, step: int, accumulate: Any = accumulate) -> None:
            accumulate(clips, phase, metrics, step)
            metrics.add({"loss_discriminator": torch.tensor(float("nan") if rank == 1 else 0.5)})

        if error == "data" and rank == 1:
            clips[1] = Unreadable([("gone.mp4", "is empty")])
        if error == "discriminator":
            t.accumulate = spoilt
        skipped = t.train_step(clips)["skipped"]
        t.accumulate = accumulate
        moved = any(not torch.equal(tensor, before[name]) for name, tensor in weights(t).items())
        told[error] = [skipped, float(moved), t.train_step(clips_of(t, t.step))["skipped"]]
    return told


def leaves(t: VaeTrainer) -> str:
    """What the run says as it ends for a step that it cannot take back."""
    try:
        t.train_step(clips_of(t, t.step))
    except TooManyFailures as error:
        return str(error)
    return "nothing"


def leaves_late(t: VaeTrainer, fails: bool) -> dict[str, Any]:
    """As `leaves`, where memory runs out after the last backward pass; and whether the step was taken all the same."""
    before, accumulate = weights(t), t.accumulate

    def late(*given: Any) -> None:
        accumulate(*given)
        if fails:
            out_of_memory()

    t.accumulate = late
    told = leaves(t)
    t.accumulate = accumulate
    return {"told": told, "moved": any(not torch.equal(v, before[name]) for name, v in weights(t).items())}


def weights(t: VaeTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in t.network.state_dict().items()}


def alone(folder: Path) -> None:
    """One process that nobody started as a rank: a rehearsal, a step, a checkpoint."""
    config = pickle.loads((folder / "config.pickle").read_bytes())
    t = sharded(
        config, folder / "alone", "deepspeed_zero2_offload", **{"trainer.max_steps": 1, "trainer.save_every": 1}
    )
    t.preflight()
    t.fit()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    config = pickle.loads((folder / "config.pickle").read_bytes())
    report: dict[str, Any] = {}
    t = sharded(config, folder / "run")
    rank = t.accelerator.process_index
    t.preflight()
    report["steps"] = steps(t, 4, spoils=rank == 1)
    t.checkpointer.save(t.step)
    report["steps"] += steps(t, STEPS - 4, spoils=False)
    report["weights"], report["ema"] = weights(t), {name: value.clone() for name, value in t.ema.shadow.items()}
    report["partitions"] = [p.clone() for p in t.strategy.rank_state()["partitions"]]
    t.log.close()

    again = sharded(config, folder / "run")
    report["resumed_at"] = again.step
    steps(again, STEPS - again.step, spoils=False)
    report["resumed"] = weights(again)
    hook = again.network.register_forward_pre_hook(out_of_memory) if rank == 1 else None
    report["left"] = leaves(again)
    if hook is not None:
        hook.remove()
    report["saved"] = state.latest_state(folder / "run/checkpoints").name
    report["dropped"] = dropped(again, rank)
    report["late"] = leaves_late(again, fails=rank == 1)
    again.log.close()

    offloaded = sharded(config, folder / "offload", "deepspeed_zero2_offload")
    steps(offloaded, STEPS, spoils=rank == 1)
    report["offloaded"] = weights(offloaded)
    report["dropped offloaded"] = dropped(offloaded, rank)
    offloaded.log.close()
    try:
        sharded(config, folder / "typo", **{"trainer.strategy.deepspeed": {**told("deepspeed_zero2"), "overlap": True}})
    except StrategyError as error:
        report["typo"] = str(error)
    torch.save(report, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    with distributed.process_group_scope():
        {"main": main, "alone": alone}[(sys.argv[2:] or ["main"])[0]](Path(sys.argv[1]))
