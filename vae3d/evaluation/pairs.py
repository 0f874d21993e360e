"""Pairing the videos of two folders, checking that each pair can be compared, and reading it in chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.data.readers import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaInfo, Size, open_media
from vae3d.errors import UserError

SUFFIXES = ("_ori", "_rec", "_spatial")
RGB = ("rgb24", "gbrp", "bgr24", "bgr0", "rgb0", "RGB", "RGBA", "L", "LA", "P")
PIXELS_IN_MEMORY = 2**22  # of one video, in a chunk


class PairError(UserError):
    """Two folders or two videos that cannot be compared as they are."""


@dataclass(frozen=True)
class Pair:
    """start: number of the original's frame that the reconstruction begins with."""

    name: str
    ref: Path
    rec: Path
    start: int = 0


@dataclass(frozen=True)
class Protocol:
    """What is compared: the first num_frames frames of every stride-th, at which size.

    frames: `equal` refuses videos of different length, `common` compares the frames that both have. strict_frames:
    refuse videos with fewer than num_frames. cut: `center` or `topleft` cuts the original to the size of a smaller
    reconstruction. resize: `ref` scales the reconstruction to the original's size, (H, W) scales both (bilinear,
    antialiased). resolution, crop: then scale the short side to this (bilinear, not antialiased, as Open-Sora v1.2
    `eval/vae` does) and centre-crop.
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
    """What is compared of a pair. frames: how many; height, width: at which size; enlarged_from: the size of files that
    are enlarged to it. warnings: for the user."""

    frames: int
    height: int
    width: int
    fps: float
    codecs: tuple[str, str]
    lossy: bool
    warnings: list[str] = field(default_factory=list)
    enlarged_from: Size | None = None


def find_pairs(
    ref: Path, rec: Path, pair_by: str = "stem", allow_unmatched: bool = False
) -> tuple[list[Pair], list[str]]:
    """Pairs sorted by name, and files that have no partner.

    pair_by: `stem` (relative path without extension and one trailing _ori, _rec or _spatial), `index_csv` (the
    reconstruction's index.csv tells sources and first frames; ref holds the sources), `sorted` (n-th with n-th).
    Raises PairError if a folder is missing or empty, both are one, a name occurs twice, or files have no partner
    (unless allow_unmatched, which still needs one pair).
    """
    if ref.resolve() == rec.resolve():
        raise PairError(f"{ref} is given as original and as reconstruction; name two folders")
    if pair_by == "index_csv":
        return _by_index(ref, rec), []
    refs, recs = _stems(ref), _stems(rec)
    if pair_by == "sorted":
        if len(refs) != len(recs):
            raise PairError(f"{ref} holds {len(refs)} files, {rec} holds {len(recs)}; pairing by order needs as many")
        return [Pair(b, refs[a], recs[b]) for a, b in zip(sorted(refs), sorted(recs), strict=True)], []
    common = sorted(refs.keys() & recs.keys())
    unmatched = [[f"only in {here}: {stem}" for stem in sorted(a.keys() - b.keys())] for here, a, b in
              ((ref, refs, recs), (rec, recs, refs))]  # fmt: skip
    count = sum(map(len, unmatched))
    if count and not (allow_unmatched and common):
        shown = "\n".join(f"  {line}" for side in unmatched for line in [*side[:10], *_more(side)])
        way_out = "\n  --allow_unmatched scores those that have" if common else ""
        raise PairError(f"{count} files have no partner of the same name, {len(common)} have:\n{shown}{way_out}")
    return [Pair(stem, refs[stem], recs[stem]) for stem in common], [line for side in unmatched for line in side]


def _more(lines: list[str]) -> list[str]:
    return [f"... {len(lines) - 10} more"] if len(lines) > 10 else []


def _stems(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    lower: dict[str, Path] = {}
    for file in _media(folder):
        stem = str(file.relative_to(folder).with_suffix(""))
        for suffix in SUFFIXES:
            if stem.endswith(suffix):
                stem = stem.removesuffix(suffix)
                break
        if stem.lower() in lower:
            raise PairError(f"{lower[stem.lower()]} and {file} have the same name; keep one")
        found[stem] = lower[stem.lower()] = file
    return found


def _media(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise PairError(f"{folder}: no such folder")
    files = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in VIDEO_SUFFIXES + IMAGE_SUFFIXES]
    files = [f for f in files if not f.name.startswith(".")]
    if not files:
        raise PairError(f"{folder} holds no video or image")
    return files


def _by_index(ref: Path, rec: Path) -> list[Pair]:
    """Pairs as the reconstruction's index.csv records them: sources are found by their recorded paths, or, in a copy of
    their folder, by the end of these. Raises PairError if that finds one file for two sources."""
    table = rec / "index.csv"
    if not table.is_file():
        raise PairError(f"{table}: no such file; infer.py writes it")
    recs = {file.stem: file for file in _media(rec)}
    refs = _media(ref)
    found = {file.resolve(): file for file in refs}
    below = {file.relative_to(ref).parts: file for file in refs}
    pairs, errors = [], []
    sources: dict[Path, Path] = {}  # file -> the source that it is
    for row in _read_index(table).itertuples():
        source = Path(row.source)
        file = found.get(source.resolve()) or _moved(source, below)
        if row.id not in recs:
            errors.append(f"{table}, {row.id}: not in {rec}")
        elif file is None:
            errors.append(f"{table}, {row.id}: its source {source} is not in {ref}")
        elif sources.setdefault(file, source) != source:
            errors.append(f"{table}, {row.id}: {file} may be its source {source}, or {sources[file]}")
        else:
            pairs.append(Pair(row.id, file, recs[row.id], int(row.start)))
    if errors:
        hint = f"give the folder of the sources as --ref; {ref} is not, or not all of it"
        raise PairError("\n  ".join([f"{len(errors)} rows have no pair; {hint}:", *errors[:10], *_more(errors)]))
    return sorted(pairs, key=lambda pair: pair.name)


def _moved(source: Path, below: dict[tuple[str, ...], Path]) -> Path | None:
    """The file of a folder whose path below it is the longest end of a source's recorded path: of copies elsewhere."""
    ends = (source.parts[place:] for place in range(len(source.parts)))
    return next((below[end] for end in ends if end in below), None)


def _read_index(table: Path) -> pd.DataFrame:
    """id, source and start of index.csv. Raises PairError."""
    try:
        index = pd.read_csv(table, dtype={"id": str, "source": str}, keep_default_na=False)
        index["start"] = pd.to_numeric(index["start"]).astype(int)
        return index[["id", "source", "start"]]
    except (KeyError, ValueError, OverflowError) as error:  # also: no text, no CSV, no column, no number
        raise PairError(f"{table}: is not what infer.py writes: {error}") from error


def inspect(pair: Pair, protocol: Protocol) -> PairInfo:
    """Facts of a pair, from the files' headers. Raises PairError if it cannot be compared, MediaError if a file does
    not open."""
    with closing(open_media(pair.ref)) as ref, closing(open_media(pair.rec)) as rec:
        a, b = ref.info, rec.info
    _require_alike(pair, a, b, protocol)
    frames = len(_frame_numbers(pair, a, b, protocol))
    codecs = (f"{a.codec}/{a.pixels}", f"{b.codec}/{b.pixels}")
    lossy = not (a.pixels in RGB and b.pixels in RGB) or bool({"mjpeg", "jpeg"} & {a.codec, b.codec})
    info = PairInfo(frames, *_compared_size(pair, a, b, protocol), a.fps, codecs, lossy)
    info.enlarged_from = _enlarged_from(pair, a, b, protocol)
    if protocol.num_frames is not None and frames < protocol.num_frames:
        short = f"{pair.name} has {frames} of the {protocol.num_frames} frames asked for"
        if protocol.strict_frames:
            raise PairError(short)
        info.warnings.append(short)
    if a.num_frames - pair.start != b.num_frames and protocol.frames == "common":
        info.warnings.append(
            f"{pair.name}: of {a.num_frames - pair.start} and {b.num_frames} frames the first {frames}"
        )
    return info


class PairReader:
    """The frames of an inspected pair that are compared, by their place among them; a context manager."""

    def __init__(self, pair: Pair, protocol: Protocol, device: torch.device | str = "cpu") -> None:
        self.pair, self.protocol, self.device = pair, protocol, device
        self.ref, self.rec = (open_media(path, threads=0) for path in (pair.ref, pair.rec))
        self.numbers = _frame_numbers(pair, self.ref.info, self.rec.info, protocol)

    def read(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[T, 3, H, W] float in [0, 1] of original and reconstruction. Raises MediaError."""
        wanted = [self.numbers[place] for place in places]
        frames = self.ref.read([self.pair.start + i for i in wanted]), self.rec.read(wanted)
        return _alike(*(_as_float(x, self.device) for x in frames), self.protocol)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All frames, in chunks of bounded memory."""
        info = self.ref.info
        size = max(1, min(16, PIXELS_IN_MEMORY // (info.height * info.width)))
        for start in range(0, len(self.numbers), size):
            yield self.read(range(start, min(start + size, len(self.numbers))))

    def __enter__(self) -> PairReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.ref.close()
        self.rec.close()


def _frame_numbers(pair: Pair, ref: MediaInfo, rec: MediaInfo, protocol: Protocol) -> list[int]:
    count = min(ref.num_frames - pair.start, rec.num_frames)
    return list(range(0, count, protocol.stride))[: protocol.num_frames]


def _require_alike(pair: Pair, ref: MediaInfo, rec: MediaInfo, protocol: Protocol) -> None:
    """Raises PairError for a difference that the protocol does not tell how to treat."""
    if (ref.height, ref.width) != (rec.height, rec.width) and not (protocol.cut or protocol.resize):
        gaps = (ref.height - rec.height, ref.width - rec.width)
        cut = all(0 <= gap < 16 for gap in gaps) and rec.height % 8 == rec.width % 8 == 0
        hint = "a model that takes multiples of 8 or 16 has cut the rest? --cut center, or " if cut else ""
        raise PairError(
            f"{pair.name}: the original is {ref.height}x{ref.width}, the reconstruction {rec.height}x{rec.width}; "
            f"{hint}--resize ref scales the reconstruction"
        )
    count = ref.num_frames - pair.start
    if count != rec.num_frames and protocol.frames != "common" and not _enough(count, rec.num_frames, protocol):
        causal = rec.num_frames < count and rec.num_frames % 4 == 1
        hint = " (a causal model that takes 4n+1 frames may have dropped the rest)" if causal else ""
        raise PairError(
            f"{pair.name}: the original has {count} frames, the reconstruction {rec.num_frames}{hint}; "
            f"--frames common compares the first {min(count, rec.num_frames)}"
        )
    if abs(ref.fps - rec.fps) > 1e-3 * max(ref.fps, rec.fps) and not protocol.ignore_fps:
        raise PairError(
            f"{pair.name}: the original has {ref.fps:g} frames per second, the reconstruction {rec.fps:g}; frames are "
            "paired by number, --ignore_fps does so anyway"
        )
    if max(ref.bits, rec.bits) > 8 and not protocol.to_8bit:
        raise PairError(f"{pair.name} has {max(ref.bits, rec.bits)} bits per channel; --to_8bit scores it as 8 bits")


def _enough(ref: int, rec: int, protocol: Protocol) -> bool:
    """Whether both have all the frames that are compared anyway."""
    return protocol.num_frames is not None and min(ref, rec) > (protocol.num_frames - 1) * protocol.stride


def _scaled_size(pair: Pair, ref: MediaInfo, rec: MediaInfo, protocol: Protocol) -> Size:
    """To which frames are scaled, before they are cropped."""
    size = (ref.height, ref.width)
    if protocol.cut:
        size = (rec.height, rec.width)
        if rec.height > ref.height or rec.width > ref.width:
            raise PairError(f"{pair.name}: the reconstruction is larger than the original; --cut cannot help")
    if isinstance(protocol.resize, tuple):
        size = protocol.resize
    if protocol.resolution is not None:
        size = _short_side(size, protocol.resolution)
    return size


def _compared_size(pair: Pair, ref: MediaInfo, rec: MediaInfo, protocol: Protocol) -> Size:
    size = _scaled_size(pair, ref, rec, protocol)
    if protocol.crop is not None:
        if min(size) < protocol.crop:
            raise PairError(f"{pair.name}: frames of {size[0]}x{size[1]} cannot be cropped to {protocol.crop}")
        size = (protocol.crop, protocol.crop)
    return size


def _enlarged_from(pair: Pair, ref: MediaInfo, rec: MediaInfo, protocol: Protocol) -> Size | None:
    """The size of the file that is enlarged the most before it is scored; None if none is."""
    height, width = _scaled_size(pair, ref, rec, protocol)
    sizes = [(rec.height, rec.width), *([] if protocol.cut else [(ref.height, ref.width)])]
    return min((size for size in sizes if height > size[0] or width > size[1]), key=min, default=None)


def _short_side(size: Size, short: int) -> Size:
    """As pytorchvideo rounds."""
    height, width = (math.floor(side / min(size) * short) for side in size)
    return height, width


def _as_float(frames: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames)).to(device).permute(0, 3, 1, 2).float() / 255.0


def _alike(ref: Tensor, rec: Tensor, protocol: Protocol) -> tuple[Tensor, Tensor]:
    """Both at the size that is compared."""
    if protocol.cut:
        ref = _cut(ref, (rec.shape[-2], rec.shape[-1]), protocol.cut)
    if protocol.resize:
        size = ref.shape[-2:] if protocol.resize == "ref" else protocol.resize
        ref, rec = (_scale(x, size, antialias=True) for x in (ref, rec))
    if protocol.resolution is not None:
        size = _short_side((ref.shape[-2], ref.shape[-1]), protocol.resolution)
        ref, rec = (_scale(x, size, antialias=False) for x in (ref, rec))
    if protocol.crop is not None:
        ref, rec = (_cut(x, (protocol.crop, protocol.crop), "center") for x in (ref, rec))
    return ref, rec


def _scale(frames: Tensor, size: Size, antialias: bool) -> Tensor:
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    return F.interpolate(frames, size, mode="bilinear", align_corners=False, antialias=antialias)


def _cut(frames: Tensor, size: Size, where: str) -> Tensor:
    top, left = 0, 0
    if where == "center":
        top, left = (round((side - kept) / 2.0) for side, kept in zip(frames.shape[-2:], size, strict=True))
    return frames[..., top : top + size[0], left : left + size[1]]
