"""Compare the latents of several models: `vae3d probe-latents`; see vae3d/commands/probe_latents.py."""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
from vae3d.commands import cli

if __name__ == "__main__":
    sys.exit(cli.main(["probe-latents", *sys.argv[1:]]))
