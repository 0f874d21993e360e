"""Count the memory of a training step of the SD VAE with its GAN, item by item, without running it.

    python scripts/benchmarks/count_sd_vae_memory.py                                      # 256 pixels
    python scripts/benchmarks/count_sd_vae_memory.py data.height=512 data.width=512
    python scripts/benchmarks/count_sd_vae_memory.py adversary=none model.gradient_checkpointing=false

Arguments are settings of train.py, added to RECIPE. Uses fake tensors: shapes only, no memory, no GPU. Counts the
second micro-batch of a step with every loss and the discriminator on, when the first one's gradients and the
optimizer's moments exist. Does not count the CUDA context and libraries (about 0.5 GiB), cuDNN's workspace, the
allocator's fragmentation, or a validation, which keeps nothing for backward but whose rFID network has 0.1 GiB.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import hydra

from vae3d.commands.step_cost import Needs, vae_needs
from vae3d.config.check import read
from vae3d.config.schema import CONF, TrainConfig
from vae3d.training.memory import GIB

RECIPE = ("experiment=sd_vae_gan", "data.source.path=none")


def composed(overrides: Iterable[str], recipe: Iterable[str] = RECIPE) -> TrainConfig:
    """The configuration of `recipe` and `overrides`."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return read(hydra.compose("train", [*recipe, *overrides]), TrainConfig)[0]


def micro_batch(config: TrainConfig, ranks: int = 1) -> int:
    """Clips that a rank trains on at a time."""
    return config.data.batch_size // (config.trainer.accumulate * ranks)


def count(overrides: Iterable[str] = ()) -> Needs:
    config = composed(overrides)
    return vae_needs(config, micro_batch(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="settings of train.py, such as data.height=512")
    needs = count(parser.parse_args().settings)
    for name, size in needs.stays.items():
        print(f"{name:30}{size / GIB:8.3f} GiB")
    print(f"{'together, from step to step':30}{sum(needs.stays.values()) / GIB:8.3f} GiB")
    for name, size in needs.parts.items():
        print(f"{f'  on top, {name}':30}{size / GIB:8.3f} GiB")
    print(f"{'at most':30}{needs.memory / GIB:8.3f} GiB")


if __name__ == "__main__":
    main()
