"""Reading images, alone or as a numbered sequence."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vae3d.data.media import MediaError, MediaInfo, Size, check_indices
from vae3d.data.storage.files import local_range
from vae3d.data.storage.paths import is_stored
from vae3d.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
SEQUENCE_RATE = 24.0  # nominal frames per second of a sequence
# The only Pillow plugins to run: the one for PostScript, for example, starts Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
MAX_PIXELS = 2**27  # of one image, as 16384 x 8192; 400 MB as RGB
DECODER_ERRORS = (  # all that Pillow raises for bad files
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where warnings are errors
)
SIGNATURES = {  # first bytes of files that often have the name of an image
    b"%!PS": "a PostScript file",
    b"%PDF": "a PDF file",
    b"version https://git-lfs": "a Git LFS pointer; get the file itself with: git lfs pull",
    b"<!doctype html": "an HTML page, as a failed download leaves",
    b"<html": "an HTML page, as a failed download leaves",
    b"<?xml": "an XML or SVG file",
    b"<svg": "an SVG file",
    b"8bpsi": "a Photoshop file",
}
BRANDS = {b"avif": "an AVIF file", b"avis": "an AVIF file", b"heic": "a HEIC file", b"mif1": "a HEIC file"}
PNG_END = b"IEND"
JPEG_PIXELS, JPEG_END = 0xDA, b"\xff\xd9"  # markers
ZEROS = 64  # bytes at the end of a JPEG that hardly any camera writes
REDUCED = 254, 1  # TIFF tag NewSubfileType, and its bit for a smaller copy of another page
ALPHA_MODES = ("RGBA", "LA", "PA", "P", "L", "RGB")  # of Pillow, which converts them to RGBA exactly
ORIENTATION = 0x0112  # Exif tag; values 5 to 8 rotate by 90 degrees
MIN_DRAFT_SCALE = 2  # a JPEG is decoded at least this many times larger than the target


class ImageReader:
    """One image as a video of one frame.

    file: the encoded image, if it is no file of its own; `path` is then only its name in messages. alpha: read RGBA,
    [1, H, W, 4], and resize colours weighted by their alpha; None: if the image has it. A JPEG is decoded by `read`, at
    1/2, 1/4 or 1/8 of its size if that is still at least twice the target, and then resized, as Pillow's `thumbnail`
    does. The result matches that of a full decode to about 50 dB.
    Raises MediaError for other files, several images in one, transparent pixels (with `alpha`: images without alpha),
    and pixels of unknown range; for the pixels of a JPEG, `read` raises it.
    """

    def __init__(self, path: str | Path, file: BinaryIO | None = None, alpha: bool | None = False) -> None:
        self.path, self.file = path, file
        self.alpha = stores_alpha(path, file) if alpha is None else alpha
        self.info = image_info(path, file)
        self.image: Image.Image | None = None
        if self.alpha or self.info.codec not in ("jpeg", "mpo"):
            self.image = self._decode()
            self.info = replace(self.info, height=self.image.height, width=self.image.width)

    def read(self, indices: Sequence[int], size: Size | None = None) -> np.ndarray:
        check_indices(self.path, indices, 1)
        size = size or (self.info.height, self.info.width)
        image = self._decode(size) if self.image is None else resize_image(self.image, size)
        return np.repeat(np.asarray(image)[None], len(indices), axis=0)

    def close(self) -> None:
        if self.image is not None:
            self.image.close()

    def _decode(self, size: Size | None = None) -> Image.Image:
        """RGB, or RGBA with `alpha`, upright, at `size` or whole."""
        with open_image(self.path, self.file) as image:
            _check_undamaged(self.path, image)
            if self.alpha:
                _check_has_alpha(self.path, image)
                return ImageOps.exif_transpose(image).convert("RGBA")
            _check_opaque(self.path, image)
            _check_range(self.path, image)
            if size is None:
                return _to_8_bits(self.path, ImageOps.exif_transpose(image)).convert("RGB")
            stored = size[::-1] if _is_turned(image) else size
            drawn = image.draft(None, (MIN_DRAFT_SCALE * stored[1], MIN_DRAFT_SCALE * stored[0]))
            box = drawn and drawn[1]  # the last row or column may be a partial one
            return ImageOps.exif_transpose(resize_image(image.convert("RGB"), stored, box))


def stores_alpha(path: str | Path, file: BinaryIO | None = None) -> bool:
    """Whether an image has an alpha channel, of 8 bits, or a transparent colour. Raises MediaError."""
    with open_image(path, file) as image:
        return image.has_transparency_data and image.mode in ALPHA_MODES


def image_info(path: str | Path, file: BinaryIO | None = None) -> MediaInfo:
    """Metadata of an image from its header; its pixels are not decoded. Raises MediaError."""
    with open_image(path, file) as image:
        height, width = image.size if _is_turned(image) else image.size[::-1]
        bits = 16 if image.mode.startswith("I") else 8
        codec = (image.format or "image").lower()
        return MediaInfo(1, height, width, 0.0, codec, image.mode, bits, lossy=_is_lossy(image))


def _is_lossy(image: Image.Image) -> bool:
    if image.format != "WEBP":
        lossy_tiff = image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")
        return image.format in ("JPEG", "MPO") or lossy_tiff
    image.fp.seek(12)  # after RIFF, its size and WEBP: chunks, of which one has the pixels
    while len(head := image.fp.read(8)) == 8 and head[:4] not in (b"VP8 ", b"VP8L"):
        size = int.from_bytes(head[4:], "little")
        image.fp.seek(size + size % 2, os.SEEK_CUR)
    return head[:4] != b"VP8L"


@contextmanager
def open_image(path: str | Path, file: BinaryIO | None = None) -> Iterator[Image.Image]:
    """Open an image and read its header. All images of the project are opened here.

    Raises MediaError for errors of the decoder inside the block, formats other than FORMATS, more than MAX_PIXELS
    pixels, animations, and files with several pages.
    """
    try:
        if file is not None:
            file.seek(0)
        with _stored(path, file) as opened, Image.open(opened, formats=FORMATS) as image:
            _check_single(path, image)
            yield image
    except UserError:  # of this file, or of its store
        raise
    except UnidentifiedImageError as error:
        raise MediaError(path, f"is {_kind(path, file)}") from error
    except DECODER_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise MediaError(path, f"cannot be read: {error.strerror}") from error
        raise MediaError(path, f"cannot be decoded: {str(error) or type(error).__name__}") from error


@contextmanager
def _stored(path: str | Path, file: BinaryIO | None) -> Iterator[BinaryIO | str | Path]:
    """What to open: `file`, the content of a URL or of a member of a tar, or else the path."""
    if file is not None or not is_stored(path):
        yield path if file is None else file
    else:
        with local_range(path).open() as content, io.BufferedReader(content) as buffered:
            yield buffered


def _check_single(path: str | Path, image: Image.Image) -> None:
    """Raise MediaError for more than MAX_PIXELS pixels, and for several images in one file."""
    if image.width * image.height > MAX_PIXELS:
        raise MediaError(path, f"has {image.width} x {image.height} pixels; the limit is {MAX_PIXELS}")
    if image.format == "MPO" or not getattr(image, "is_animated", False):  # MPO: a photograph with the camera's extras
        return
    if image.format == "TIFF":
        tag, reduced = REDUCED
        pages = 0
        for page in range(image.n_frames):
            image.seek(page)
            pages += not image.tag_v2.get(tag, 0) & reduced
        image.seek(0)
        if pages > 1:
            raise MediaError(path, f"has {pages} pages; save each as a file of its own")
    elif image.format == "GIF":
        raise MediaError(path, "is an animated GIF; rename it to .gif to read it as a video")
    else:
        kind = {"PNG": "PNG (APNG)", "WEBP": "WebP"}.get(str(image.format), image.format)
        raise MediaError(path, f"is an animated {kind} of {image.n_frames} frames; convert it to a video, such as .mp4")


def _check_undamaged(path: str | Path, image: Image.Image) -> None:
    """Raise MediaError for a PNG whose checksums are wrong, and a JPEG that ends with zeros and has no end of its own.

    Zeros are what an interrupted download leaves in a file of the full size. Pillow decodes them, as black or grey.
    """
    if image.format not in ("PNG", "JPEG", "MPO"):
        return
    position = image.fp.tell()
    if image.format == "PNG":
        damaged = not _has_checksums(image.fp)
    else:
        image.fp.seek(max(0, image.fp.seek(0, os.SEEK_END) - ZEROS))
        damaged = not image.fp.read().strip(b"\0") and not _has_end(image.fp)
    image.fp.seek(position)
    if damaged:
        raise MediaError(path, "cannot be decoded: it is damaged or incomplete; get it again")


def _has_end(file: BinaryIO) -> bool:
    """Whether the pixels of a JPEG come to their end. Some programs append zeros, or a video that ends with them."""
    file.seek(2)
    while len(head := file.read(4)) == 4 and head[0] == 0xFF and head[1] != JPEG_PIXELS:  # a preview has an end, too
        file.seek(int.from_bytes(head[2:], "big") - 2, os.SEEK_CUR)
    return JPEG_END in file.read()


def _has_checksums(file: BinaryIO) -> bool:
    """Whether the chunks of a PNG have the CRC-32 that they say, as libpng requires of those that pixels need, whose
    names begin with a capital, and Pillow does not of pixels."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        content, checksum = file.read(size), file.read(4)
        if kind[:1].isupper() and zlib.crc32(content, zlib.crc32(kind)).to_bytes(4, "big") != checksum:
            return False
        if kind == PNG_END:
            return True
    return False


def _check_opaque(path: str | Path, image: Image.Image) -> None:
    """Raise MediaError for transparent pixels: the file does not say what is behind them."""
    if not image.has_transparency_data:
        return
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        raise MediaError(path, "has a 16-bit transparent colour, which cannot be checked; flatten it")
    if image.mode.startswith("I"):  # transparency is one grey level, and Pillow cannot convert the image
        transparent = bool((np.asarray(image) == key).any())
    else:
        transparent = image.convert("RGBA").getextrema()[3][0] < 255
    if transparent:
        raise MediaError(path, "has transparent pixels; flatten it onto a background of your choice")


def _check_range(path: str | Path, image: Image.Image) -> None:
    """Raise MediaError for pixels of 32 bits: the file does not say which values are black and white."""
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):  # mode I of a PNG or PGM has 16 bits
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise MediaError(path, f"holds {kind} pixels of unknown range; store it with 8 or 16 bits")


def _check_has_alpha(path: str | Path, image: Image.Image) -> None:
    """Raise MediaError for images without alpha, and with one that has other than 8 bits."""
    if not image.has_transparency_data:
        raise MediaError(path, f"has no alpha channel ({image.mode}), which a model of 4 channels needs")
    if image.mode not in ALPHA_MODES:
        raise MediaError(path, f"has an alpha channel beside {image.mode} pixels; store it as RGBA of 8 bits")


def _kind(path: str | Path, file: BinaryIO | None) -> str:
    """What a file is that Pillow cannot read."""
    with (
        _stored(path, file) as opened,
        nullcontext(opened) if hasattr(opened, "read") else open(opened, "rb") as stream,
    ):
        stream.seek(0)
        head = stream.read(64)
    named = [kind for start, kind in SIGNATURES.items() if head.lower().lstrip().startswith(start.lower())]
    if head[4:8] == b"ftyp":
        named.append(BRANDS.get(head[8:12], "a video; rename it to .mp4"))
    return "not an image, whatever its extension says" + (f", but {named[0]}" if named else "")


def _is_turned(image: Image.Image) -> bool:
    """Whether the header asks for a rotation by 90 degrees that Pillow does not apply; it does for TIFF.

    A PNG without Exif in its header is not searched: Pillow would decode it, and hardly any has Exif after the pixels.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return False
    return image.getexif().get(ORIENTATION, 1) >= 5


def _to_8_bits(path: str | Path, image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits; Pillow's own conversion clips nearly everything to white."""
    if image.mode.startswith("I"):
        return Image.fromarray(((grey_levels(path, image) + 128) // 257).astype(np.uint8))
    return image


def load_grey(path: str | Path) -> np.ndarray:
    """[H, W] uint16 of a 16-bit image of one channel. Raises MediaError for any other."""
    with open_image(path) as image:
        _check_undamaged(path, image)
        if not image.mode.startswith("I"):
            kind = "floating-point" if image.mode == "F" else f"8-bit {image.mode}"
            raise MediaError(path, f"holds {kind} pixels; depth maps need 16-bit images of one channel")
        return grey_levels(path, image).astype(np.uint16)


def grey_levels(path: str | Path, image: Image.Image) -> np.ndarray:
    """[H, W] int64, 0 to 65535, of an image of one integer channel."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise MediaError(path, "has integer pixels beyond 16 bits; store it with 8 or 16 bits")
    return pixels


def resize_image(image: Image.Image, size: Size, box: tuple[float, ...] | None = None) -> Image.Image:
    """An image, or its part `box`, at `size`, antialiased."""
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box)


def resize_circular(frame: np.ndarray, size: Size) -> np.ndarray:
    """Resize [H, W, 3] with wrap-around at the left and right edge, antialiased: rolling commutes with it."""
    height, width = frame.shape[:2]
    margin = min(width, 2 * -(-width // size[1]) + 2)  # support of the filter
    padded = Image.fromarray(np.pad(frame, ((0, 0), (margin, margin), (0, 0)), mode="wrap"))
    return np.asarray(resize_image(padded, size, (margin, 0, margin + width, height)))


def is_sequence(path: str | Path) -> bool:
    """Whether a path is a pattern of numbered files, such as panorama_*.png."""
    return "*" in os.path.basename(path) and not is_stored(path)


def number_matcher(pattern: str) -> Callable[[str], re.Match[str] | None]:
    """A matcher of names with digits for the `*` of `pattern`; group 1 is the number.

    Other text in place of the `*` does not match: panorama_0000_mask.png for panorama_*.png.
    Raises ValueError if the pattern has no `*`, or several.
    """
    if pattern.count("*") != 1:
        raise ValueError(f"{pattern} must have one *, in place of the frame number")
    return re.compile(re.escape(pattern).replace(r"\*", "([0-9]+)")).fullmatch


def sequence_files(path: str | Path) -> list[str | Path]:
    """The files of a sequence, sorted by number; the file alone if the path has no `*`. The path of a file that is
    stored in a tar or elsewhere is text.

    Raises MediaError if there is none, or two files have the same number.
    """
    if not is_sequence(path):
        return [path if is_stored(path) else Path(path)]
    path = Path(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise MediaError(path, f"is no sequence of images; known: {' '.join(IMAGE_SUFFIXES)}")
    if not path.parent.is_dir():
        raise MediaError(path, "no such folder")
    try:
        matches = list(filter(None, map(number_matcher(path.name), sorted(os.listdir(path.parent)))))
    except (OSError, ValueError) as error:
        raise MediaError(path, str(error)) from error
    if not matches:
        raise MediaError(path, f"no file matches, with a number for *, such as {path.name.replace('*', '0')}")
    found: dict[int, str] = {}
    for match in matches:
        other = found.setdefault(int(match[1]), match[0])
        if other != match[0]:
            raise MediaError(path, f"{other} and {match[0]} have the same number; keep one")
    return [path.parent / found[number] for number in sorted(found)]


class SequenceReader:
    """Numbered images as a video. Opening it lists the folder and reads the header of the first file.

    Its rate is a nominal 24 frames per second, since 0 would mean a single image. `read` raises MediaError for a file
    of another size than the first.
    """

    def __init__(self, path: str | Path, alpha: bool | None = False) -> None:
        self.path, self.files = path if is_stored(path) else Path(path), sequence_files(path)
        self.alpha = stores_alpha(self.files[0]) if alpha is None else alpha
        self.info = replace(image_info(self.files[0]), num_frames=len(self.files), fps=SEQUENCE_RATE)

    def read(self, indices: Sequence[int], size: Size | None = None) -> np.ndarray:
        check_indices(self.path, indices, len(self.files))
        frames = {i: self.frame(self.files[i], size) for i in sorted(set(indices))}
        return np.stack([frames[i] for i in indices])

    def frame(self, file: str | Path, size: Size | None) -> np.ndarray:
        """[H, W, 3 or 4] uint8 of one file."""
        reader = ImageReader(file, alpha=self.alpha)
        self.check_same_size(file, reader.info.height, reader.info.width)
        return reader.read([0], size)[0]

    def check_same_size(self, file: str | Path, height: int, width: int) -> None:
        if (height, width) != (self.info.height, self.info.width):
            expected = f"{self.info.height}x{self.info.width}"
            raise MediaError(file, f"is {height}x{width}, but the first file of its sequence is {expected}")

    def close(self) -> None:
        """No file stays open."""
