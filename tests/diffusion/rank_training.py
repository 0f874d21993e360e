"""Run as one of two ranks: trains what tests/diffusion/test_latent_training.py trains alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.diffusion import latent_runs
from vae3d import distributed
from vae3d.checkpoints import state
from vae3d.commands import console, encode
from vae3d.config.latents import EncodeConfig
from vae3d.distributed import RanksDiffer

THREE = ("count=3", "batch_size=1", "classes=[dog,cat]")  # of which one rank draws the last alone


def against(settings: list[str]) -> str:
    return next(told.replace("cache=", "against=") for told in settings if told.startswith("cache="))


def trained(folder: Path, settings: list[str]) -> dict[str, Any]:
    """The state after four steps."""
    assert latent_runs.trainer(folder, *settings, "validation.every=2").fit()
    return state.load_state(folder / "checkpoints/step-0000004")


def without_memory(folder: Path, settings: list[str]) -> None:
    """A validation for which one rank has no memory fails on both."""
    trainer = latent_runs.trainer(folder, *settings, "validation.every=2")
    held_out_sums = trainer._held_out_sums

    def out_of_memory() -> None:
        raise MemoryError

    trainer._held_out_sums = out_of_memory if trainer.rank == 1 else held_out_sums
    assert trainer.validate() == {}
    trainer._held_out_sums = held_out_sums
    assert "val/loss" in trainer.validate()
    trainer.log.close()


def refused(folder: Path, settings: list[str]) -> None:
    """Print what is said to ranks of other settings."""
    rank = console.rank()
    for start in (
        lambda: encode.run(EncodeConfig(checkpoint="x", source="x", cache="x", seed=rank, workers=rank)),
        lambda: latent_runs.trainer(folder, *settings, f"optim.lr={1e-3 * (1 + rank)}"),
    ):
        try:
            start()
        except RanksDiffer as error:
            print(error)


if __name__ == "__main__":
    top = Path(sys.argv[1])
    with distributed.process_group_scope():
        settings = json.loads((top / "settings.json").read_text())
        trained(top / "together", settings)
        assert distributed.gather_to_main(console.rank()) == ([0, 1] if console.rank() == 0 else [])
        assert distributed.broadcast_object(console.rank(), source=1) == 1
        assert distributed.on_first_rank(console.rank) == 0
        latent_runs.sample(f"checkpoint={top}/together", f"out={top}/of_two", *THREE, against(settings))
        refused(top / "refused", settings)
        without_memory(top / "without_memory", settings)
