"""One of two ranks, run as a process by test_faulty_ranks.py: rank 1 alone fails, in every way that a run must survive."""

from __future__ import annotations

import errno
import itertools
import pickle
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tests.training import quick
from vae3d import distributed
from vae3d.checkpoints import state
from vae3d.commands import train
from vae3d.data.batches.clips import Unreadable
from vae3d.data.media import DataError
from vae3d.distributed import RanksDiffer
from vae3d.errors import UserError
from vae3d.training import strategy, vae_trainer
from vae3d.training.preflight import PreflightError
from vae3d.training.step_status import StepMetrics
from vae3d.training.vae_trainer import VaeTrainer

SETTINGS = {
    "data.batch_size": 4, "trainer.max_steps": 20, "trainer.save_every": 0, "optim.eps": 0.01, "optim.warmup_steps": 5,
    "optim.schedule": "cosine", "validation.every": 1000, "validation.frames": 1, "validation.clips": 2,
}  # fmt: skip
FAULTS = ("forward", "backward", "second", "data", "slow", "nan")  # one after each sound step
NO_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB (pretended)"


def clips_of(t: VaeTrainer, step: int) -> list:
    return list(t.data.clips(step, step + 1))


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError(NO_MEMORY)


def faulty_step(t: VaeTrainer, error: str, fails: bool) -> dict[str, Any]:
    """A step in which this rank meets `error`, if it is the one that fails."""
    clips, hooks = clips_of(t, t.step), []
    if fails and error == "forward":
        hooks.append(t.network.register_forward_pre_hook(out_of_memory))
    if fails and error == "backward":  # half of the parameters have their gradient by then
        hooks.append(t.network.module.encoder.conv_in.weight.register_hook(out_of_memory))
    if fails and error == "second":  # of two micro-batches
        calls = iter([lambda *_: None, out_of_memory])
        hooks.append(t.network.register_forward_pre_hook(lambda *given: next(calls)(*given)))
    if fails and error == "data":
        clips[1] = Unreadable([("gone.mp4", "is empty")])
    if fails and error == "slow":
        time.sleep(1.5)
    if fails and error == "nan":
        clips[1].video = clips[1].to("cpu").video * float("nan")
    values = asdict(t.train_step(clips))
    for hook in hooks:
        hook.remove()
    return values


def steps(t: VaeTrainer, fails: bool) -> tuple[dict[str, dict[str, Any]], list[float]]:
    """A sound step and a faulty one, by turns; and the learning rate of every step."""
    values, rates = {}, []
    for error in FAULTS:
        values[f"before {error}"] = asdict(t.train_step(clips_of(t, t.step)))
        rates.append(t.optimizer.param_groups[0]["lr"])
        values[error] = faulty_step(t, error, fails)
        rates.append(t.optimizer.param_groups[0]["lr"])
    values["after"] = asdict(t.train_step(clips_of(t, t.step)))
    return values, rates


def saving(t: VaeTrainer, rank: int) -> dict[str, object]:
    """Save well, then with a full disk on either rank, then well again; what lies on disk each time."""
    root, values = t.folder / "checkpoints", {}
    t.adversary.rank_state_dict = lambda: {"rank": torch.tensor(rank)}
    writes = {0: state.write, 1: state.write_rank}

    def disk_full(folder: Path, *_: object) -> None:
        (folder / "half").write_bytes(b"of a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    for number, failing in enumerate((None, 0, 1, None)):
        t.step = 100 + number
        if rank == failing:
            setattr(state, writes[rank].__name__, disk_full)
        t.checkpointer.save(t.step)
        setattr(state, writes[rank].__name__, writes[rank])
        torch.distributed.barrier()
        values[str(number)] = sorted(path.name for path in root.iterdir())
        torch.distributed.barrier()
    values["own"] = int(state.load_rank(root / "step-0000103", rank)["adversary"]["rank"])
    return values


def refusals(t: VaeTrainer, rank: int) -> dict[str, str]:
    """What both ranks say of a preflight that does not fit into one rank's memory, of different weights, and of run
    folders on disks of their own, of which only one holds checkpoints."""
    values, initialize = {}, train.initialize

    def other_weights(model: torch.nn.Module, path: object, **_: object) -> list[str]:
        next(model.parameters()).data.add_(1)
        return []

    train.initialize = other_weights  # on the rank that does not resume
    for resume_from in (None, "latest"):
        try:
            config = replace(t.config, run=replace(t.config.run, resume_from=resume_from))
            quick.trainer(config, t.folder if rank else t.folder / "empty")
        except UserError as error:
            values[f"checkpoints, {resume_from}"] = str(error)
    train.initialize = initialize
    hooks = [t.network.register_forward_pre_hook(out_of_memory)] if rank == 1 else []
    try:
        t.preflight()
    except PreflightError as error:
        values["preflight"] = str(error)
    for hook in hooks:
        hook.remove()
    t.preflight()
    for name, value in (("NaN on one rank", float("nan") if rank else 0.0), ("weights", float(rank))):
        next(t.network.parameters()).data.fill_(value)
        try:
            strategy.check_same_weights(t.network)
        except RanksDiffer as error:
            values[name] = str(error)
    return values


def uneven(t: VaeTrainer, rank: int) -> str:
    """What the ranks say of gradients of two parameters of equal size, of which each has one."""
    first, second = [p for name, p in t.network.named_parameters() if name.endswith("norm1.weight")][:2]
    for p in t.strategy.parameters:
        p.grad = torch.zeros_like(p) if p is not (first, second)[rank] else None
    decision = t.sync_status(StepMetrics(), None).decide(0.0, t.spikes)
    assert isinstance(decision.error, RanksDiffer)
    return decision.reason


def other_metrics(t: VaeTrainer, rank: int) -> str:
    """What the ranks say of metrics of which one rank has another name."""
    metrics = StepMetrics()
    metrics.add({"loss": torch.tensor(1.0), f"loss/of_rank{rank}": torch.tensor(1.0)})
    t.optimizer.zero_grad()
    decision = t.sync_status(metrics, None).decide(0.0, t.spikes)
    assert isinstance(decision.error, RanksDiffer)
    return decision.reason


def without_memory(t: VaeTrainer, rank: int) -> dict[str, object]:
    """Scores where rank 0 has no memory to validate; what lies on disk where it has none to measure latents."""
    hooks = [t.network.register_forward_pre_hook(out_of_memory)] if rank == 0 else []
    scores = t.validate()
    for hook in hooks:
        hook.remove()
    measure, t.step, t.config.trainer.publish.measure_scale = vae_trainer.measure, 200, 4
    vae_trainer.measure = out_of_memory
    t.checkpointer.save(t.step)
    vae_trainer.measure = measure
    torch.distributed.barrier()
    exported = (t.folder / "exports/step-0000200").exists()
    torch.distributed.barrier()
    if rank == 0:
        state.discard(t.folder / "checkpoints", t.step)
    t.config.trainer.publish.measure_scale = 0
    return {"scores": scores, "then": "val/psnr" in t.validate(), "exported": exported, "training": t.network.training}


def out_of_data(t: VaeTrainer, rank: int) -> dict[str, object]:
    """What both ranks say, and save, where the loader of one fails at a run's second step."""
    clips, t.step, t.checkpointer.save_every = t.data.clips, 7, 1000

    def dying(*span: int) -> Iterator:
        yield from itertools.islice(clips(*span), 2)
        raise DataError("a worker was killed")

    object.__setattr__(t.data, "clips", dying if rank else clips)
    try:
        t.fit()
    except DataError as error:
        return {"error": str(error), "saved": state.step_folder(t.folder / "checkpoints", 8).is_dir()}
    return {}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    config = pickle.loads((folder / "config.pickle").read_bytes())
    t = quick.trainer(config, folder / "run", **SETTINGS, **{"trainer.accumulate": 2})
    rank = t.accelerator.process_index
    report: dict[str, object] = {}
    report["steps"], report["rates"] = steps(t, fails=rank == 1)
    report["weights"] = {name: tensor.clone() for name, tensor in t.network.state_dict().items()}
    report["saving"] = saving(t, rank)
    report["refusals"] = refusals(t, rank)
    report["uneven"] = uneven(t, rank)
    report["other_metrics"] = other_metrics(t, rank)
    report["without_memory"] = without_memory(t, rank)
    report["out_of_data"] = out_of_data(t, rank)
    torch.save(report, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    with distributed.process_group_scope():
        main(Path(sys.argv[1]))
