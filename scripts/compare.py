"""Compare a distilled student with its teacher: python or torchrun; see docs/taehv.md.

    python scripts/compare.py checkpoint=runs/taehv_wan_best teacher=Wan2.1_VAE.pth source=videos.csv \\
        save_dir=out/tiny num_samples=10

Reconstructs the files with the student, as infer.py does, and codes their first frames with every encoder and every
decoder: out/tiny_rec/comparison.json has the scores, out/tiny_compare videos and pictures side by side. The same
command resumes. Settings: CompareConfig in vae3d/config/schema.py. teacher=PATH is short for teacher.path=PATH.
"""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
from vae3d.commands import cli

if __name__ == "__main__":
    sys.exit(cli.main(["compare", *sys.argv[1:]]))
