"""Encode a data set into a latent cache: python or torchrun; see docs/latents.md.

    python scripts/encode_latents.py checkpoint=runs/sd_vae_gan source=photos cache=latents/photos height=256 width=256
    torchrun --nproc-per-node=8 scripts/encode_latents.py checkpoint=Wan2.1_VAE.pth source=videos.csv \\
        cache=latents/videos height=480 width=832 frames=81 fps=16 clips=all precision=bf16

The same command goes on where a killed one stopped, with any number of processes.
"""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
import hydra
from omegaconf import DictConfig

from vae3d.commands import launch
from vae3d.config.latents import check_encoding
from vae3d.config.schema import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="latents")
def main(cfg: DictConfig) -> None:
    launch.exit_on_user_error(lambda: run(cfg))


def run(cfg: DictConfig) -> None:
    config = check_encoding(cfg)
    from vae3d import distributed  # torch is imported only once the configuration is sound
    from vae3d.commands import encode

    with distributed.process_group_scope():
        encode.encode(config)


if __name__ == "__main__":
    sys.argv[1:] = launch.read_arguments(sys.argv[1:])
    main()
