"""`python -m vae3d NAME ...` and `torchrun -m vae3d NAME ...` are `vae3d NAME ...`."""

import sys

from vae3d.commands.cli import main

sys.exit(main())
