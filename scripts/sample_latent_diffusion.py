"""Draw samples of a latent diffusion model: python or torchrun; see docs/latents.md.

    python scripts/sample_latent_diffusion.py checkpoint=runs/ldm-unet-flow out=samples count=64 guidance=2
    python scripts/sample_latent_diffusion.py checkpoint=runs/ldm-unet-ddpm out=samples classes=[cat,dog] method=ddim

Writes OUT/grid.png (or .mp4), OUT/000000_cat.png, ... and, of images, OUT/samples_64x64x64x3.npz, which the evaluators
of openai/guided-diffusion read: arr_0 uint8 NHWC and, with classes, arr_1. A sample depends on seed, number and class
alone, not on the batch that it is drawn in.
"""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
import hydra
from omegaconf import DictConfig

from vae3d.commands import launch
from vae3d.config.diffusion import check_sampling
from vae3d.config.schema import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="sample")
def main(cfg: DictConfig) -> None:
    launch.exit_on_user_error(lambda: run(cfg))


def run(cfg: DictConfig) -> None:
    config = check_sampling(cfg)
    from vae3d import distributed
    from vae3d.commands import sample  # torch is imported only once the configuration is sound

    with distributed.process_group_scope():
        sample.sample(config)


if __name__ == "__main__":
    sys.argv[1:] = launch.read_arguments(sys.argv[1:])
    main()
