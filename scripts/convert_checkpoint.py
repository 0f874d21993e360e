"""Convert a checkpoint to another layout: `vae3d convert`; see vae3d/commands/convert.py and docs/checkpoints.md."""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
from vae3d.commands import cli

if __name__ == "__main__":
    sys.exit(cli.main(["convert", *sys.argv[1:]]))
