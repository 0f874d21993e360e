"""Reconstruct videos and images: python or torchrun; see docs/score.md.

    python infer.py checkpoint=runs/opensora_stage3 source=videos.csv save_dir=out/stage3 metrics=[psnr,ssim]
    python infer.py checkpoint=runs/taehv_wan_best teacher=Wan2.1_VAE.pth source=videos.csv save_dir=out/tiny

Writes out/stage3_ori, _rec and, of two-stage models, _spatial; with a teacher _compare, see docs/taehv.md. Settings:
InferConfig in vae3d/config/schema.py.
"""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
import hydra
from omegaconf import DictConfig

from vae3d.commands import launch
from vae3d.config.validate import check_inference


@hydra.main(version_base="1.3", config_path="conf", config_name="infer")
def main(cfg: DictConfig) -> None:
    launch.exit_on_user_error(lambda: run(cfg))


def run(cfg: DictConfig) -> None:
    config = check_inference(cfg)
    from vae3d import distributed  # torch is imported only once the configuration is sound
    from vae3d.commands import infer

    with distributed.process_group_scope():
        infer.infer(config)


def in_full(argument: str) -> str:
    """teacher=PATH is short for teacher.path=PATH; Hydra would look for PATH in conf/teacher, which train.py reads."""
    return f"teacher.path={argument.removeprefix('teacher=')}" if argument.startswith("teacher=") else argument


if __name__ == "__main__":
    sys.argv[1:] = launch.read_arguments(list(map(in_full, sys.argv[1:])))
    main()
