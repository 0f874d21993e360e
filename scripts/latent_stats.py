"""Print the statistics of a latent cache: `vae3d latent-stats`; see vae3d/commands/latent_stats.py."""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
from vae3d.commands import cli

if __name__ == "__main__":
    sys.exit(cli.main(["latent-stats", *sys.argv[1:]]))
