"""Pair the videos of two folders, check that each pair can be compared, and read it in chunks."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.data.decoding.readers import is_media, open_pair
from vae3d.data.media import MediaInfo, Size
from vae3d.errors import UserError
from vae3d.pixels import quantize
from vae3d.text import is_utf8, plural

RGB_FORMATS = ("rgb24", "gbrp", "bgr24", "bgr0", "rgb0", "RGB", "RGBA", "L", "LA", "P", "PA")
RGBA_FORMATS = ("bgra", "argb", "rgba", "abgr", "gbrap")  # of videos
CHUNK_PIXELS = 2**22  # of one video


class PairError(UserError):
    """Two folders or videos that cannot be compared."""


@dataclass(frozen=True)
class Pair:
    """An original and its reconstruction, which begins at frame `start` of the original.

    from_source: whether the original is the file that was reconstructed, so that its codec does not change the scores.
    """

    name: str
    ref: Path
    rec: Path
    start: int = 0
    from_source: bool = False


@dataclass(frozen=True)
class Protocol:
    """Which frames to compare, and at which size: options of `vae3d eval`, which explains them.

    The first num_frames frames of every stride-th. Order: cut, resize (bilinear, antialiased), resolution (bilinear,
    not antialiased, as Open-Sora v1.2 eval/vae), crop.
    """

    num_frames: int | None = None
    stride: int = 1
    frames: str = "equal"
    strict_frames: bool = False
    cut: str | None = None
    resize: str | Size | None = None
    resolution: int | None = None
    crop: int | None = None
    ignore_fps: bool = False
    to_8bit: bool = False


@dataclass
class PairInfo:
    """frames: number of compared frames. height, width: their size. upscaled_from: size of the smaller file, if it is
    upscaled. alpha: whether both files have alpha, which is then scored."""

    frames: int
    height: int
    width: int
    fps: float
    codecs: tuple[str, str]
    lossy: bool
    warnings: list[str] = field(default_factory=list)
    upscaled_from: Size | None = None
    alpha: bool = False


def find_pairs(
    ref: Path, rec: Path, pair_by: str = "stem", allow_unmatched: bool = False
) -> tuple[list[Pair], list[str]]:
    """Pairs sorted by name, and unmatched files.

    pair_by: `stem` (relative path without extension and one trailing _ori, _rec or _spatial), `index_csv` (index.csv of
    the reconstruction names sources and first frames; ref holds the sources), `sorted` (n-th with n-th). A pair has the
    name of its original, so that reconstructions of it can be compared; with `index_csv` that of its row.
    Raises PairError if a folder is missing or empty, if both are the same, if a name occurs twice, or if files are
    unmatched (unless allow_unmatched, which needs at least one pair).
    """
    if ref.resolve() == rec.resolve():
        raise PairError(f"{ref} is given as original and as reconstruction; use two folders")
    if pair_by == "index_csv":
        return _by_index(ref, rec, allow_unmatched)
    refs, recs = _stems(ref), _stems(rec)
    if pair_by == "sorted":
        if len(refs) != len(recs):
            counts = f"{ref} holds {plural(len(refs), 'file')}, {rec} holds {len(recs)}"
            raise PairError(f"{counts}; pairing by order needs equal numbers")
        return [Pair(a, refs[a], recs[b]) for a, b in zip(sorted(refs), sorted(recs), strict=True)], []
    common = sorted(refs.keys() & recs.keys())
    only_ref = [f"only in {ref}: {stem}" for stem in sorted(refs.keys() - recs.keys())]
    only_rec = [f"only in {rec}: {stem}" for stem in sorted(recs.keys() - refs.keys())]
    unmatched = [*only_ref, *only_rec]
    if unmatched and not (allow_unmatched and common):
        shown = "\n".join(f"  {line}" for line in [*first_lines(only_ref), *first_lines(only_rec)])
        hint = "\n  --allow_unmatched scores the pairs" if common else ""
        lone = plural(len(unmatched), "file")
        raise PairError(f"{lone} without a partner of the same name, {len(common)} with one:\n{shown}{hint}")
    return [Pair(stem, refs[stem], recs[stem]) for stem in common], unmatched


def first_lines(lines: list[str], count: int = 10) -> list[str]:
    """The first lines, and how many more there are."""
    return [*lines[:count], *([f"... {len(lines) - count} more"] if len(lines) > count else [])]


def _stems(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    lower: dict[str, Path] = {}
    for file in _media(folder):
        stem = re.sub(r"_(ori|rec|spatial)\Z", "", str(file.relative_to(folder).with_suffix("")))
        if stem.lower() in lower:
            raise PairError(f"{lower[stem.lower()]} and {file} have the same name; keep one")
        found[stem] = lower[stem.lower()] = file
    return found


def _media(folder: Path) -> list[Path]:
    if not folder.is_dir():
        is_url = re.match(r"[a-z0-9]+:/", str(folder))  # of which pathlib leaves one slash
        hint = "; files are scored in local folders: vae3d infer source=URL writes originals and reconstructions"
        raise PairError(f"{folder}: no such folder{hint if is_url else ''}")
    visible = (f for f in sorted(folder.rglob("*")) if not any(p.startswith(".") for p in f.relative_to(folder).parts))
    files = [f for f in visible if is_media(f)]
    if not files:
        raise PairError(f"{folder} holds no video or image")
    for file in files:  # now, not when all are scored and the tables are written
        if not is_utf8(str(file)):
            raise PairError(f"{os.fsencode(file)!r} is not UTF-8; rename it")
    return files


def _by_index(ref: Path, rec: Path, allow_unmatched: bool) -> tuple[list[Pair], list[str]]:
    """As find_pairs, from the reconstruction's index.csv. Sources are found by their paths in it or, in a copy of their
    folder, by the end of these paths. Raises PairError if one file matches two sources."""
    table = rec / "index.csv"
    if not table.is_file():
        raise PairError(f"{table}: no such file; vae3d infer writes it")
    recs = {file.stem: file for file in _media(rec)}
    refs = _media(ref)
    by_path = {file.resolve(): file for file in refs}
    by_relative_path = {file.relative_to(ref).parts: file for file in refs}
    pairs, unmatched, errors = [], [], []
    sources: dict[Path, Path] = {}  # file -> source
    for row in _read_index(table).itertuples():
        source = Path(row.source)
        ends = (source.parts[start:] for start in range(len(source.parts)))
        copies = (by_relative_path[end] for end in ends if end in by_relative_path)  # the longest end first
        file = by_path.get(source.resolve()) or next(copies, None)
        if row.id not in recs:
            unmatched.append(f"{table}, {row.id}: not in {rec}")
        elif file is None:
            unmatched.append(f"{table}, {row.id}: its source {source} is not in {ref}")
        elif sources.setdefault(file, source) != source:
            errors.append(f"{table}, {row.id}: {file} may be its source {source}, or {sources[file]}")
        else:
            pairs.append(Pair(row.id, file, recs[row.id], int(row.start), from_source=True))
    if errors or (unmatched and not (allow_unmatched and pairs)):
        wrong = [*errors, *unmatched]
        hint = f"--ref must be the folder of the sources, and {ref} is not, or not completely"
        lines = [f"{plural(len(wrong), 'row')} without a pair; {hint}:", *first_lines(wrong)]
        if pairs and not errors:
            lines.append("--allow_unmatched scores the pairs")
        raise PairError("\n  ".join(lines))
    return sorted(pairs, key=lambda pair: pair.name), unmatched


def _read_index(table: Path) -> pd.DataFrame:
    """Columns id, source and start of index.csv. Raises PairError."""
    try:
        index = pd.read_csv(table, dtype={"id": str, "source": str}, keep_default_na=False)
        index["start"] = pd.to_numeric(index["start"]).astype(int)
        return index[["id", "source", "start"]]
    except (KeyError, ValueError, OverflowError) as error:  # not text, not CSV, a missing column, not a number
        raise PairError(f"{table}: is not an index.csv of vae3d infer: {error}") from error


def inspect(pair: Pair, protocol: Protocol) -> PairInfo:
    """Read the headers of a pair. Raises PairError if it cannot be compared, MediaError if a file cannot be opened."""
    ref, rec = open_pair(pair.ref, pair.rec)
    with closing(ref), closing(rec):
        a, b, alpha = ref.info, rec.info, ref.alpha
    _check_comparable(pair, a, b, protocol)
    frames = len(_frame_indices(pair, a, b, protocol))
    codecs = (f"{a.codec}/{a.pixels}", f"{b.codec}/{b.pixels}")
    lossy = _is_lossy(b) or (_is_lossy(a) and not pair.from_source)
    (height, width), upscaled_from = _sizes(pair, a, b, protocol)
    info = PairInfo(frames, height, width, a.fps, codecs, lossy, upscaled_from=upscaled_from, alpha=alpha)
    if protocol.num_frames is not None and frames < protocol.num_frames:
        short = f"{pair.name} has {frames} of the {protocol.num_frames} frames asked for"
        if protocol.strict_frames:
            raise PairError(short)
        info.warnings.append(short)
    if a.num_frames - pair.start != b.num_frames and protocol.frames == "common":
        info.warnings.append(
            f"{pair.name}: of {a.num_frames - pair.start} and {plural(b.num_frames, 'frame')} the first {frames}"
        )
    return info


def _is_lossy(info: MediaInfo) -> bool:
    """Whether a file's codec or pixel format changes pixels, as far as its header says."""
    return info.lossy or info.pixels not in (*RGB_FORMATS, *RGBA_FORMATS) or info.codec in ("mjpeg", "gif")


def pieces(info: MediaInfo, frames: int) -> Iterator[range]:
    """The indices of so many frames of a file, in pieces of bounded memory."""
    size = max(1, min(16, CHUNK_PIXELS // (info.height * info.width)))
    for start in range(0, frames, size):
        yield range(start, min(start + size, frames))


class PairReader:
    """Reads the compared frames of a pair; a context manager."""

    def __init__(self, pair: Pair, protocol: Protocol, device: torch.device | str = "cpu") -> None:
        self.pair, self.protocol, self.device = pair, protocol, device
        self.ref, self.rec = open_pair(pair.ref, pair.rec, threads=0)
        self.indices = _frame_indices(pair, self.ref.info, self.rec.info, protocol)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Frames of original and reconstruction, [T, 3 or 4, H, W] float in [0, 1]. Raises MediaError.

        indices: count the compared frames.
        """
        wanted = [self.indices[i] for i in indices]
        ref, rec = self.ref.read([self.pair.start + i for i in wanted]), self.rec.read(wanted)
        return _to_common_size(_as_float(ref, self.device), _as_float(rec, self.device), self.protocol)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All compared frames, in chunks of bounded memory."""
        for indices in pieces(self.ref.info, len(self.indices)):
            yield self.read(indices)

    def pictures(self, original: bool) -> Iterator[np.ndarray]:
        """Chunks [T, H, W, 3 or 4] uint8 of one side, as compared. Raises MediaError."""
        exact = not (self.protocol.cut or self.protocol.resize or self.protocol.resolution or self.protocol.crop)
        reader, first = (self.ref, self.pair.start) if original else (self.rec, 0)
        for indices in pieces(self.ref.info, len(self.indices)):
            if exact:
                yield reader.read([first + self.indices[i] for i in indices])
            else:
                frames = self.read(indices)[0 if original else 1]
                yield quantize(frames, "unit").permute(0, 2, 3, 1).cpu().numpy()

    def __enter__(self) -> PairReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.ref.close()
        self.rec.close()


def _frame_indices(pair: Pair, ref: MediaInfo, rec: MediaInfo, protocol: Protocol) -> list[int]:
    count = min(ref.num_frames - pair.start, rec.num_frames)
    return list(range(0, count, protocol.stride))[: protocol.num_frames]


def _check_comparable(pair: Pair, ref: MediaInfo, rec: MediaInfo, protocol: Protocol) -> None:
    """Raises PairError for a difference in size, length or frame rate that the protocol does not resolve."""
    if (ref.height, ref.width) != (rec.height, rec.width) and not (protocol.cut or protocol.resize):
        gaps = (ref.height - rec.height, ref.width - rec.width)
        cut = all(0 <= gap < 16 for gap in gaps) and rec.height % 8 == rec.width % 8 == 0
        hint = "if the model cropped to a multiple of 8 or 16, use --cut center; " if cut else ""
        raise PairError(
            f"{pair.name}: the original is {ref.height}x{ref.width}, the reconstruction {rec.height}x{rec.width}; "
            f"{hint}--resize ref scales the reconstruction"
        )
    count, wanted = ref.num_frames - pair.start, protocol.num_frames
    enough = wanted is not None and min(count, rec.num_frames) > (wanted - 1) * protocol.stride
    if count != rec.num_frames and protocol.frames != "common" and not enough:
        causal = rec.num_frames < count and rec.num_frames % 4 == 1
        hint = " (a causal model that takes 4n+1 frames may have dropped the rest)" if causal else ""
        raise PairError(
            f"{pair.name}: the original has {plural(count, 'frame')}, the reconstruction {rec.num_frames}{hint}; "
            f"--frames common compares the first {min(count, rec.num_frames)}"
        )
    if abs(ref.fps - rec.fps) > 1e-3 * max(ref.fps, rec.fps) and not protocol.ignore_fps:
        raise PairError(
            f"{pair.name}: the original has {ref.fps:g} frames per second, the reconstruction {rec.fps:g}; frames are "
            "paired by number; --ignore_fps does so anyway"
        )
    if max(ref.bits, rec.bits) > 8 and not protocol.to_8bit:
        raise PairError(f"{pair.name} has {max(ref.bits, rec.bits)} bits per channel; --to_8bit scores it as 8 bits")


def _sizes(pair: Pair, ref: MediaInfo, rec: MediaInfo, protocol: Protocol) -> tuple[Size, Size | None]:
    """The size at which frames are compared, and that of the smallest file that is upscaled, or None."""
    ref_size, rec_size = (ref.height, ref.width), (rec.height, rec.width)
    scaled, files = ref_size, [rec_size, ref_size]
    if protocol.cut:
        if rec.height > ref.height or rec.width > ref.width:
            raise PairError(f"{pair.name}: the reconstruction is larger than the original; --cut cannot help")
        scaled, files = rec_size, [rec_size]
    if isinstance(protocol.resize, tuple):
        scaled = protocol.resize
    if protocol.resolution is not None:
        scaled = _short_side(scaled, protocol.resolution)
    crop = protocol.crop
    if crop is not None and min(scaled) < crop:
        raise PairError(f"{pair.name}: frames of {scaled[0]}x{scaled[1]} cannot be cropped to {crop}")
    upscaled = [size for size in files if scaled[0] > size[0] or scaled[1] > size[1]]
    return scaled if crop is None else (crop, crop), min(upscaled, key=min, default=None)


def _short_side(size: Size, short: int) -> Size:
    """Scale the short side to `short`, rounded as pytorchvideo does."""
    height, width = (math.floor(side / min(size) * short) for side in size)
    return height, width


def _as_float(frames: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames)).to(device).permute(0, 3, 1, 2).float() / 255.0


def _to_common_size(ref: Tensor, rec: Tensor, protocol: Protocol) -> tuple[Tensor, Tensor]:
    """Crop and scale both to the compared size."""
    if protocol.cut:
        ref = _crop(ref, (rec.shape[-2], rec.shape[-1]), protocol.cut)
    if protocol.resize:
        size = ref.shape[-2:] if protocol.resize == "ref" else protocol.resize
        ref, rec = (_scale(x, size, antialias=True) for x in (ref, rec))
    if protocol.resolution is not None:
        size = _short_side((ref.shape[-2], ref.shape[-1]), protocol.resolution)
        ref, rec = (_scale(x, size, antialias=False) for x in (ref, rec))
    if protocol.crop is not None:
        ref, rec = (_crop(x, (protocol.crop, protocol.crop), "center") for x in (ref, rec))
    return ref, rec


def _scale(frames: Tensor, size: Size, antialias: bool) -> Tensor:
    """Resize [T, 3, H, W], or RGBA [T, 4, H, W], whose colours are weighted by their alpha."""
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    if frames.shape[1] == 4:
        alpha = _scale(frames[:, 3:], size, antialias)
        colours = _scale(frames[:, :3] * frames[:, 3:], size, antialias)
        return torch.cat([(colours / alpha.clamp_min(1e-6)).clamp(0, 1), alpha], 1)
    return F.interpolate(frames, size, mode="bilinear", align_corners=False, antialias=antialias)


def _crop(frames: Tensor, size: Size, where: str) -> Tensor:
    top, left = 0, 0
    if where == "center":
        top, left = (round((side - kept) / 2.0) for side, kept in zip(frames.shape[-2:], size, strict=True))
    return frames[..., top : top + size[0], left : left + size[1]]
