"""One of two ranks, run as a process by test_two_ranks.py: steps on which rank 1 alone meets a spike or NaN, and steps
of a tiny Wan VAE on one and on three frames, and of a mixture of sources and buckets."""

from __future__ import annotations

import pickle
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pandas as pd
import torch

from tests.training import quick
from vae3d import distributed
from vae3d.commands import train as train_command
from vae3d.config.schema import TrainConfig
from vae3d.distributed import RanksDiffer
from vae3d.training.vae_trainer import VaeTrainer

SETTINGS = {
    "data.batch_size": 4, "trainer.max_steps": 9, "trainer.save_every": 0, "optim.eps": 0.01, "optim.proximal": 5.0,
    "trainer.spike.factor": 5.0, "trainer.spike.warmup": 2,
}  # fmt: skip
SOUND = 3  # steps before the first that is skipped
FACTORS = {"spike": 8.0, "nan": float("nan")}  # what the pixels of one of the four clips are multiplied by


def sound_steps(t: VaeTrainer, accumulate: int) -> dict[str, torch.Tensor]:
    """Take the first steps; the weights after them."""
    clips = t.data.clips(0, SOUND)
    for _ in range(SOUND):
        t.train_step([next(clips) for _ in range(accumulate)])
    return {name: tensor.clone() for name, tensor in t.network.state_dict().items()}


def averaged(config: TrainConfig, folder: Path, reduce_dtype: str) -> dict[str, object]:
    """Gradients of this rank, what average_gradients makes of them, and the weights after steps of real gradients."""
    t = quick.trainer(config, folder, **SETTINGS, **{"trainer.reduce_dtype": reduce_dtype})
    generator = torch.Generator().manual_seed(t.rank)
    for p in t.strategy.parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    given = [p.grad.clone() for p in t.strategy.parameters]
    t.strategy.average_gradients()
    result = [p.grad.clone() for p in t.strategy.parameters]
    t.strategy.discard_gradients()
    report = {"given": given, "result": result, "buffer": t.strategy._buffer.dtype, "weights": sound_steps(t, 1)}
    t.log.close()
    return report


def train(config: TrainConfig, folder: Path) -> dict[str, object]:
    """Weights and log-variance after a run, and the number of frames of each step's clips."""
    t = train_command.build_trainer(config, folder)
    frames, step = [], t.train_step
    t.train_step = lambda clips, *rest: (frames.append(clips[0].video.shape[2]), step(clips, *rest))[1]
    timeouts, set_timeout = [], distributed._set_timeout
    with mock.patch.object(distributed, "_set_timeout") as patched:
        patched.side_effect = lambda timeout: (timeouts.append(timeout.seconds), set_timeout(timeout))
        t.fit()
    best = [t.best.step, t.best.value, (folder / "exports/best/model.yaml").is_file()]
    report = {"logvar": t.objective.logvar.item(), "frames": frames, "best": best, "timeouts": timeouts}
    return {"weights": t.network.state_dict(), **report}


def some_steps(config: TrainConfig, folder: Path, accumulate: int) -> dict[str, object]:
    """Weights after six steps, of each step the shape of a micro-batch and the positions of this rank's clips, and
    whether this rank has the pictures of each validated clip."""
    t = quick.trainer(config, folder, **{"trainer.accumulate": accumulate, "trainer.save_every": 0})
    clips, shapes, positions = t.data.clips(0, 6), [], []
    for _ in range(6):
        batches = [next(clips) for _ in range(accumulate)]
        shapes.append(list(batches[0].video.shape))
        positions.append([int(position) for batch in batches for position in batch.positions])
        t.train_step(batches)
    pictures = [clip.panels is not None for clip in t.validate_clips(t.metrics)]
    t.log.close()
    return {"weights": t.network.state_dict(), "shapes": shapes, "positions": positions, "pictures": pictures}


def refused(config: TrainConfig, folder: Path, rank: int) -> list[str]:
    """What is said to ranks of other settings, and to ranks whose tables have the same rows in another order."""
    given = config.data.source
    rows = pd.read_csv(given["path"]).iloc[:: -1 if rank else 1]
    rows.to_csv(folder / f"table{rank}.csv", index=False)
    source = {**given, "path": str(folder / f"table{rank}.csv"), "root": str(Path(given["path"]).parent)}
    said = []
    for changes in ({"optim.lr": 1e-3 * (1 + rank), "data.workers": rank}, {"data.source": source}):
        try:
            quick.trainer(config, folder / "refused", **{**SETTINGS, **changes})
        except RanksDiffer as error:
            said.append(str(error))
    return said


def main(folder: Path) -> None:
    """Leaves rank<N>.pt in `folder`, which holds the checked configurations."""
    torch.set_num_threads(1)
    config = pickle.loads((folder / "config.pickle").read_bytes())
    t = quick.trainer(config, folder / "run", **SETTINGS, **{"trainer.accumulate": 2})
    rank = t.accelerator.process_index
    report = {"sound": sound_steps(t, 2), "steps": {}}

    reduced, all_reduce = [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *args, **kwargs: (reduced.append(1), all_reduce(*args, **kwargs))[1]
    clips = t.data.clips(SOUND, SOUND + len(FACTORS) + 1)
    for name, factor in FACTORS.items():
        first, second = next(clips), next(clips).to("cpu")
        if rank == 1:
            second = replace(second, video=second.video * factor)
        report["steps"][name] = asdict(t.train_step([first, second]))
    report["steps"]["after"] = asdict(t.train_step([next(clips), next(clips)]))
    report["collectives"] = len(reduced)
    report["weights"], report["spikes"] = t.network.state_dict(), t.spikes.state_dict()
    t.checkpointer.save(t.step)
    t.log.close()
    again = quick.trainer(config, folder / "run", **SETTINGS, **{"trainer.accumulate": 2})
    report["resumed"] = again.spikes.state_dict()
    again.log.close()
    report["averaged"] = {dtype: averaged(config, folder / dtype, dtype) for dtype in ("fp32", "bf16")}
    report["refused"] = refused(config, folder, rank)
    report["mixture"] = some_steps(pickle.loads((folder / "mixture.pickle").read_bytes()), folder / "mixture", 1)
    report["wan"] = train(pickle.loads((folder / "wan.pickle").read_bytes()), folder / "wan")
    torch.save(report, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    with distributed.process_group_scope():
        main(Path(sys.argv[1]))
