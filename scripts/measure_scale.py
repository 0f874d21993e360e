"""Measure the scale of a model's latents: `vae3d measure-scale`; see vae3d/commands/measure_scale.py."""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
from vae3d.commands import cli

if __name__ == "__main__":
    sys.exit(cli.main(["measure-scale", *sys.argv[1:]]))
