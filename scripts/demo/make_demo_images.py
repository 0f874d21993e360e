"""Make a folder of small photographs from those that ship with scikit-image and scikit-learn.

    python scripts/demo/make_demo_images.py demo/images

Writes FOLDER/train/NAME.png, and FOLDER/val/NAME.png for photographs of other subjects.
"""

from __future__ import annotations

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
import argparse
from pathlib import Path

from make_demo_videos import photographs
from PIL import Image

SIDE = 160  # pixels, so that crops of 64 show objects and not only texture
HELD_OUT = ("chelsea", "coffee", "china")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, picture in photographs().items():
        file = folder / ("val" if name in HELD_OUT else "train") / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(file)
    print(f"{len(photographs())} photographs in {folder}")


if __name__ == "__main__":
    main()
