"""Train a diffusion model on latents: python, torchrun or accelerate launch; see docs/latents.md.

    python scripts/train_latent_diffusion.py vae.path=runs/sd_vae_gan cache=latents/photos labels=auto
    torchrun --nproc-per-node=8 scripts/train_latent_diffusion.py vae.path=Wan2.1_VAE.pth data=video_csv \\
        data.source.path=videos.csv data.frames.min=17 data.frames.max=17 denoiser=video_transformer

The same command goes on where a killed one stopped.
"""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
import hydra
from omegaconf import DictConfig

from vae3d.commands import launch
from vae3d.config.diffusion import DiffusionConfig, check_diffusion
from vae3d.config.schema import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="diffusion")
def main(cfg: DictConfig) -> float | None:
    return launch.exit_on_user_error(lambda: run(cfg))


def run(cfg: DictConfig) -> float | None:
    """Train; returns the validation loss of the last step, for sweepers that look for the least."""
    launch.forbid_sweep_under_torchrun()
    config = check_diffusion(cfg)
    if launch.starts_ranks(config.launcher):
        launch.torchrun_child(config.launcher, __file__)
    else:
        launch.with_elastic_record(lambda: train(config, cfg))
    return launch.last_metric(launch.run_directory(), "val/loss", config.trainer.max_steps)


def train(config: DiffusionConfig, cfg: DictConfig) -> None:
    from vae3d import distributed  # torch is imported only once the configuration is sound
    from vae3d.commands import train_diffusion

    if config.debug.mode == "dry":
        train_diffusion.describe(config)
        return
    folder = launch.prepare_run_folder(cfg)
    with distributed.process_group_scope():
        signum = launch.fit(train_diffusion.build_trainer(config, folder))
    launch.end_after(signum)


if __name__ == "__main__":
    sys.argv[1:] = launch.read_arguments(sys.argv[1:])
    main()
