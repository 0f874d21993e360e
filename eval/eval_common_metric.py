"""Score reconstructed videos against their originals: `vae3d eval`; see vae3d/commands/eval.py and docs/score.md."""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
from vae3d.commands import cli

if __name__ == "__main__":
    sys.exit(cli.main(["eval", *sys.argv[1:]]))
