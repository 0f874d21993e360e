"""One of the ranks of a distillation, run as a process by test_teacher_cache.py: the same run without a cache, with an
empty one, with a full one, and with a full one after it was stopped halfway. Prints `equal HITS`."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch

from tests.training import quick
from vae3d import distributed
from vae3d.config.schema import TrainConfig


def run(config: TrainConfig, folder: Path, name: str, cache: bool, steps: tuple[int, ...]) -> tuple[dict, int]:
    for last in steps:
        settings = {"trainer.max_steps": last, "teacher.cache": str(folder / "cache") if cache else None}
        t = quick.trainer(config, folder / name, **settings)
        t.fit()
    weights = {**t.network.state_dict(), **{f"projections.{k}": v for k, v in t.projections.state_dict().items()}}
    return weights, t.distillation.cache.hits if cache else 0


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    config = pickle.loads((folder / "config.pickle").read_bytes())
    online, _ = run(config, folder, "online", False, (4,))
    first, _ = run(config, folder, "first", True, (4,))
    again, hits = run(config, folder, "again", True, (4,))
    resumed, _ = run(config, folder, "resumed", True, (2, 4))
    for other in (first, again, resumed):
        assert online.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in online.items())
    print("equal", hits)


if __name__ == "__main__":
    with distributed.process_group_scope():
        main(Path(sys.argv[1]))
