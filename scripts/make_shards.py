"""Write tar shards from any source: `vae3d make-shards`; see vae3d/commands/make_shards.py."""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
from vae3d.commands import cli

if __name__ == "__main__":
    sys.exit(cli.main(["make-shards", *sys.argv[1:]]))
