"""Pairing the videos of two folders by name, and reading a pair side by side in chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.data.readers import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaInfo, open_media
from vae3d.errors import UserError

SUFFIXES = ("_ori", "_rec", "_spatial")
CHUNK = 16  # frames in memory at once
RGB = ("rgb24", "gbrp", "bgr24", "bgr0", "rgb0", "RGB", "RGBA", "L", "LA", "P")


class PairError(UserError):
    """Two folders or two videos that cannot be compared as they are."""


@dataclass(frozen=True)
class Pair:
    name: str
    ref: Path
    rec: Path


@dataclass(frozen=True)
class Protocol:
    """What is compared: the first num_frames * stride frames, every stride-th; scaled so that the short side is
    `resolution` (bilinear, not antialiased, as Open-Sora v1.2 `eval/vae` does) and centre-cropped to `crop`."""

    num_frames: int | None = None
    stride: int = 1
    resolution: int | None = None
    crop: int | None = None
    ignore_fps: bool = False
    to_8bit: bool = False


@dataclass
class PairInfo:
    """What a report must say of a pair. frames: compared. warnings: to be shown to the user."""

    frames: int
    height: int
    width: int
    codecs: tuple[str, str]
    lossy: bool
    warnings: list[str] = field(default_factory=list)


def find_pairs(ref: Path, rec: Path, allow_unmatched: bool = False) -> tuple[list[Pair], list[str]]:
    """Pairs by relative stem, one trailing _ori, _rec or _spatial aside; and stems that only one folder has.

    Raises PairError if a folder is missing or empty, both are one, a stem occurs twice, or stems do not match
    (unless allow_unmatched, which still needs one pair).
    """
    if ref.resolve() == rec.resolve():
        raise PairError(f"{ref} is given as original and as reconstruction; name two folders")
    refs, recs = _stems(ref), _stems(rec)
    common = sorted(refs.keys() & recs.keys())
    lonely = [f"only in {ref}: {stem}" for stem in sorted(refs.keys() - recs.keys())]
    lonely += [f"only in {rec}: {stem}" for stem in sorted(recs.keys() - refs.keys())]
    if lonely and not (allow_unmatched and common):
        shown = "\n".join(f"  {line}" for line in lonely[:10])
        more = f"\n  ... {len(lonely) - 10} more" if len(lonely) > 10 else ""
        way_out = "\n  --allow_unmatched scores those that have" if common else ""
        raise PairError(
            f"{len(lonely)} files have no partner of the same name, {len(common)} have:\n{shown}{more}{way_out}"
        )
    return [Pair(stem, refs[stem], recs[stem]) for stem in common], lonely


def _stems(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise PairError(f"{folder}: no such folder")
    found: dict[str, Path] = {}
    lower: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.name.startswith(".") or file.suffix.lower() not in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
            continue
        stem = str(file.relative_to(folder).with_suffix(""))
        for suffix in SUFFIXES:
            if stem.endswith(suffix):
                stem = stem.removesuffix(suffix)
                break
        if stem.lower() in lower:
            raise PairError(f"{lower[stem.lower()]} and {file} have the same name; keep one")
        found[stem] = lower[stem.lower()] = file
    if not found:
        raise PairError(f"{folder} holds no video or image")
    return found


def read_pair(pair: Pair, protocol: Protocol) -> tuple[PairInfo, Iterator[tuple[Tensor, Tensor]]]:
    """Facts of a pair, and its frames chunk by chunk as float [T, 3, H, W] in [0, 1].

    Raises PairError if the two cannot be compared, MediaError (also while iterating) if one cannot be read.
    """
    ref, rec = open_media(pair.ref, threads=0), open_media(pair.rec, threads=0)
    a, b = ref.info, rec.info
    _require_alike(pair, a, b, protocol)
    indices = list(range(0, a.num_frames, protocol.stride))[: protocol.num_frames]
    lossy = not (a.pixels in RGB and b.pixels in RGB) or "mjpeg" in (a.codec, b.codec) or "jpeg" in (a.codec, b.codec)
    info = PairInfo(len(indices), a.height, a.width, (f"{a.codec}/{a.pixels}", f"{b.codec}/{b.pixels}"), lossy)
    if protocol.num_frames is not None and len(indices) < protocol.num_frames:
        info.warnings.append(f"{pair.name} has {len(indices)} of the {protocol.num_frames} frames asked for")

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        with closing(ref), closing(rec):
            for start in range(0, len(indices), CHUNK):
                chunk = indices[start : start + CHUNK]
                yield _prepare(ref.read(chunk), protocol), _prepare(rec.read(chunk), protocol)

    return info, chunks()


def _require_alike(pair: Pair, ref: MediaInfo, rec: MediaInfo, protocol: Protocol) -> None:
    if (ref.height, ref.width) != (rec.height, rec.width):
        near = all(0 <= a - b < 16 for a, b in ((ref.height, rec.height), (ref.width, rec.width)))
        hint = "; a model that only takes multiples of 8 or 16 may have cut the rest" if near else ""
        raise PairError(
            f"{pair.name}: the original is {ref.height}x{ref.width}, the reconstruction {rec.height}x{rec.width}; "
            f"both must have one size{hint}"
        )
    if ref.num_frames != rec.num_frames and not _enough(ref, rec, protocol):
        hint = ""
        if rec.num_frames < ref.num_frames and (rec.num_frames - 1) % 4 == 0:
            hint = ", a model that only takes 4n+1 frames may have dropped the rest"
        raise PairError(
            f"{pair.name}: the original has {ref.num_frames} frames, the reconstruction {rec.num_frames}{hint}; "
            f"--num_frames {min(ref.num_frames, rec.num_frames)} compares the first ones"
        )
    if abs(ref.fps - rec.fps) > 1e-3 * max(ref.fps, rec.fps) and not protocol.ignore_fps:
        raise PairError(
            f"{pair.name}: the original has {ref.fps:g} frames per second, the reconstruction {rec.fps:g}; frames are "
            "paired by number, --ignore_fps does so anyway"
        )
    if max(ref.bits, rec.bits) > 8 and not protocol.to_8bit:
        raise PairError(f"{pair.name} has {max(ref.bits, rec.bits)} bits per channel; --to_8bit scores it as 8 bits")


def _enough(ref: MediaInfo, rec: MediaInfo, protocol: Protocol) -> bool:
    """Whether both have all the frames that are compared anyway."""
    if protocol.num_frames is None:
        return False
    return min(ref.num_frames, rec.num_frames) > (protocol.num_frames - 1) * protocol.stride


def _prepare(frames: np.ndarray, protocol: Protocol) -> Tensor:
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255.0
    height, width = x.shape[-2:]
    if protocol.resolution is not None and min(height, width) != protocol.resolution:
        short = min(height, width)
        size = [math.floor(side / short * protocol.resolution) for side in (height, width)]  # as pytorchvideo rounds
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    if protocol.crop is not None:
        height, width = x.shape[-2:]
        if min(height, width) < protocol.crop:
            raise PairError(f"frames of {height}x{width} cannot be cropped to {protocol.crop}; lower --crop_size")
        top, left = round((height - protocol.crop) / 2.0), round((width - protocol.crop) / 2.0)
        x = x[..., top : top + protocol.crop, left : left + protocol.crop]
    return x
