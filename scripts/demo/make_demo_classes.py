"""Make a folder of small images in classes: crops of photographs that ship with scikit-image and scikit-learn.

    python scripts/demo/make_demo_classes.py demo/classes

Writes FOLDER/train/CLASS/000.png and FOLDER/val/CLASS/000.png, squares of 60 to 95 % of the class's photograph, and
FOLDER/images.csv with the columns path, label and split.
"""

from __future__ import annotations

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from make_demo_videos import photographs
from PIL import Image

from vae3d.argparse_types import positive_int

CLASSES = {"astronaut": "astronaut", "cat": "chelsea", "coffee": "coffee", "flower": "flower", "rocket": "rocket"}
SHARES = (0.6, 0.95)  # of the photograph's side
HELD_OUT = 16  # images of each class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=positive_int, default=64, help="height and width in pixels (64)")
    parser.add_argument("--count", type=positive_int, default=200, help="training images of each class (200)")
    args = parser.parse_args()
    rng, rows, pictures = np.random.default_rng(0), [], photographs()
    for label, name in CLASSES.items():
        for number in range(args.count + HELD_OUT):
            split = "train" if number < args.count else "val"
            path = Path(split, label, f"{number:03d}.png")
            (args.folder / path.parent).mkdir(parents=True, exist_ok=True)
            crop(pictures[name], args.size, rng).save(args.folder / path)
            rows.append({"path": str(path), "label": label, "split": split})
    pd.DataFrame(rows).to_csv(args.folder / "images.csv", index=False)
    print(f"{len(rows)} images of {len(CLASSES)} classes in {args.folder}")


def crop(picture: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A square crop at a random position, of a random size."""
    side = rng.uniform(*SHARES) * picture.width
    left, top = rng.uniform(0, picture.width - side, 2)
    return picture.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))


if __name__ == "__main__":
    main()
