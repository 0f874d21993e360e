"""Compare a distilled student with its teacher, with python or torchrun; see docs/taehv.md.

    python scripts/compare.py checkpoint=runs/taehv_wan_best teacher=Wan2.1_VAE.pth source=videos.csv \\
        save_dir=out/tiny num_samples=10

Reconstructs the files with the student, as infer.py does. Also codes the first frames of each file with every encoder
and every decoder: scores in out/tiny_rec/comparison.json, videos and pictures in out/tiny_compare. The same command
resumes. Settings: vae3d/config/schema.py (CompareConfig); teacher=PATH is short for teacher.path=PATH.
"""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
from vae3d.commands import cli

if __name__ == "__main__":
    sys.exit(cli.main(["compare", *sys.argv[1:]]))
