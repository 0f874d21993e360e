"""Train a video autoencoder with python, torchrun or accelerate launch; see docs/train.md.

    vae3d train stage=stage3 model=temporal_vae data.source.path=videos.csv
    vae3d train debug=dry stage=stage3 model=temporal_vae data.source.path=videos.csv    # check and describe only
    torchrun --nproc-per-node=8 train.py experiment=opensora_stage2 data.source.path=videos.csv

The same command resumes a run. Settings: vae3d/config/schema.py (TrainConfig); defaults: conf/train.yaml.
"""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
from vae3d.commands import cli

if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
