"""Train a video autoencoder: python, torchrun or accelerate launch; see docs/train.md.

    python train.py stage=stage3 model=temporal_vae data.source.path=videos.csv
    python train.py debug=dry stage=stage3 model=temporal_vae data.source.path=videos.csv     # what the run would be
    torchrun --nproc-per-node=8 train.py experiment=opensora_stage2 data.source.path=videos.csv

The same command goes on where a killed one stopped. Settings: vae3d/config/schema.py; their values: conf/train.yaml.
"""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
import hydra
from omegaconf import DictConfig

from vae3d.commands import launch
from vae3d.commands.check import check_training
from vae3d.config.schema import TrainConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    return launch.exit_on_user_error(lambda: run(cfg))


def run(cfg: DictConfig) -> float | None:
    """Train; returns the validation PSNR of the last step, for sweepers that look for the best."""
    launch.forbid_sweep_under_torchrun()
    config = check_training(cfg)
    if launch.starts_ranks(config.launcher):
        launch.torchrun_child(config.launcher, __file__)
    else:
        launch.with_elastic_record(lambda: train(config, cfg))
    return launch.last_metric(launch.run_directory(), "val/psnr", config.trainer.max_steps)


def train(config: TrainConfig, cfg: DictConfig) -> None:
    from vae3d import distributed  # torch is imported only once the configuration is sound
    from vae3d.commands import train

    if config.debug.mode == "dry":
        train.describe(config)
        return
    folder = launch.prepare_run_folder(cfg)
    with distributed.process_group_scope():
        signum = launch.fit(train.build_trainer(config, folder))
    launch.end_after(signum)


if __name__ == "__main__":
    sys.argv[1:] = launch.read_arguments(sys.argv[1:])
    main()
