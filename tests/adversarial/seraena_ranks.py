"""One of two ranks, run by test_seraena_ranks.py: clips of its own, and a skipped step."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.adversarial import toy
from vae3d import distributed


def main(folder: Path) -> None:
    """Write rank<N>.pt to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    adversary = toy.seraena(rank=rank)
    report = {"before": {name: t.clone() for name, t in adversary.discriminator.state_dict().items()}}
    report["losses"] = toy.train(adversary, range(2), accumulate=2)
    loss, _ = adversary.discriminator_loss(*toy.pair(seed=7 + rank), 2)
    loss.backward()
    adversary.reset_step()
    loss, _ = adversary.discriminator_loss(*toy.pair(seed=7 + rank), 3)
    (loss * (float("nan") if rank else 1.0)).backward()  # which rank 0 must learn from the average
    adversary.step(float(adversary.average_gradients()))
    report |= {"state": adversary.state_dict(), "own": adversary.rank_state_dict()}
    torch.save(report, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    with distributed.process_group_scope():
        main(Path(sys.argv[1]))
