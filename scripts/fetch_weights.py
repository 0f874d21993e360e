"""Download pretrained networks: `vae3d fetch-weights`; see vae3d/commands/fetch_weights.py and docs/score.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a login node need not have the project installed

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
from vae3d.commands.fetch_weights import main

if __name__ == "__main__":
    sys.exit(main())
