"""One of the ranks of a distillation, run as a process by test_teacher_cache.py: FOLDER MODE.

compare: the same run without a cache, with an empty one, with a full one, and with a full one after it was stopped
halfway. Prints `equal HITS`. stall: a run with a cache of its own that stops for good while the last rank has written
half of a file; it makes FOLDER/stalled. resume: that run, killed by then, to its end. Prints `equal STEP HITS`, with the
step from which it resumed.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.training import quick
from vae3d import distributed
from vae3d.config.schema import TrainConfig
from vae3d.training import teacher_cache
from vae3d.training.vae_trainer import VaeTrainer

STEPS = 4
RANK = int(os.environ.get("RANK", 0))


def run(config: TrainConfig, folder: Path, name: str, cache: str | None, *steps: int) -> tuple[VaeTrainer, int]:
    """Train up to each of the steps (default: STEPS); returns the trainer and the step at which it began."""
    for last in steps or (STEPS,):
        settings = {"trainer.max_steps": last, "teacher.cache": cache and str(folder / cache), "trainer.save_every": 1}
        t = quick.trainer(config, folder / name, **settings)
        begun = t.step
        t.fit()
    return t, begun


def outcome(t: VaeTrainer, folder: Path) -> dict:
    """Weights, and the logged lines without speed, memory and use of the cache."""
    weights = {**t.network.state_dict(), **{f"projections.{k}": v for k, v in t.projections.state_dict().items()}}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    others = ("per_second", "memory_gib", "cache_hits")
    return {"weights": weights, "curve": [{k: v for k, v in x.items() if not k.endswith(others)} for x in lines]}


def assert_equal(one: dict, other: dict) -> None:
    assert one["curve"] == other["curve"]
    assert [line["step"] for line in one["curve"]] == list(range(1, STEPS + 1))
    assert one["weights"].keys() == other["weights"].keys()
    assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())


def compare(config: TrainConfig, folder: Path) -> None:
    online = outcome(run(config, folder, "online", None)[0], folder / "online")
    torch.save(online, folder / f"online{RANK}.pt")
    for name, steps in (("first", ()), ("again", ()), ("resumed", (2, 4))):
        t, _ = run(config, folder, name, "cache", *steps)
        assert_equal(online, outcome(t, folder / name))
        if name == "again":
            hits = t.distillation.cache.hits
    print("equal", hits)


def stall(config: TrainConfig, folder: Path) -> None:
    writes = 0

    def save_half(tensors: dict, path: Path) -> None:
        nonlocal writes
        writes += 1
        save_file(tensors, path)
        if writes == int(sys.argv[3]) and int(os.environ.get("WORLD_SIZE", 1)) - 1 == RANK:
            os.truncate(path, path.stat().st_size // 2)
            (folder / "stalled").touch()
            time.sleep(600)

    teacher_cache.save_tensors = save_half
    run(config, folder, "killed", "cache_killed")


def resume(config: TrainConfig, folder: Path) -> None:
    t, begun = run(config, folder, "killed", "cache_killed")
    assert_equal(torch.load(folder / f"online{RANK}.pt", weights_only=True), outcome(t, folder / "killed"))
    print("equal", begun, t.distillation.cache.hits)


if __name__ == "__main__":
    with distributed.process_group_scope():
        torch.set_num_threads(1)
        FOLDER = Path(sys.argv[1])
        MODE = {"compare": compare, "stall": stall, "resume": resume}[sys.argv[2]]
        MODE(pickle.loads((FOLDER / "config.pickle").read_bytes()), FOLDER)
