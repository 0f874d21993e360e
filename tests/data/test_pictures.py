"""What single images become: colours, turns, crops, flips, and JPEGs decoded with fewer pixels."""

from __future__ import annotations

import io
import struct
import subprocess
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image, PngImagePlugin

from tests import tiny
from vae3d.data.batches.batch_schedule import BatchSchedule, FrameCounts
from vae3d.data.batches.clips import ClipDataset, ClipSettings
from vae3d.data.decoding.images import ImageReader
from vae3d.data.decoding.readers import is_image, media_info, open_media
from vae3d.data.media import MediaError

PICTURE = tiny.frames(1, 24, 40)[0]
RGB = Image.fromarray(PICTURE)
GREY = np.asarray(RGB.convert("L"))
PALETTE = RGB.quantize(256)
SEEN = {  # file, what is saved, what is seen of it
    "grey.png": (RGB.convert("L"), np.repeat(GREY[..., None], 3, axis=2)),
    "grey.jpg": (RGB.convert("L"), np.repeat(GREY[..., None], 3, axis=2)),
    "bits.png": (RGB.convert("1"), np.asarray(RGB.convert("1").convert("RGB"))),
    "cmyk.jpg": (RGB.convert("CMYK"), PICTURE),
    "cmyk.tif": (RGB.convert("CMYK"), PICTURE),
    "palette.png": (PALETTE, np.asarray(PALETTE.convert("RGB"))),
    "deep.png": (Image.fromarray(GREY.astype(np.uint16) * 257), np.repeat(GREY[..., None], 3, axis=2)),
    "opaque.png": (RGB.convert("RGBA"), PICTURE),
    "opaque.webp": (RGB.convert("RGBA"), PICTURE),
    "plain.webp": (RGB, PICTURE),
    "plain.bmp": (RGB, PICTURE),
    "called.png.jpg": (RGB, PICTURE),  # a PNG, as what is inside of it
    "deep_grey_alpha.png": (Image.fromarray(GREY).convert("LA"), np.repeat(GREY[..., None], 3, axis=2)),
}


@pytest.mark.parametrize("name", SEEN)
def test_every_kind_of_image_is_read_as_rgb(tmp_path, name):
    image, expected = SEEN[name]
    lossy = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(name.rpartition(".")[2], {})
    image.save(tmp_path / name, "PNG" if ".png." in name else None, **lossy)
    info, read = media_info(tmp_path / name), open_media(tmp_path / name).read([0])[0]
    assert (info.num_frames, info.height, info.width, info.fps) == (1, 24, 40, 0.0)
    assert np.abs(read.astype(int) - expected).max() <= (6 if name.endswith("jpg") else 0)
    assert open_media(tmp_path / name).read([0], (12, 20)).shape == (1, 12, 20, 3)


def test_images_whose_codec_changes_pixels_are_lossy(tmp_path):
    profile = {"icc_profile": b"odd"}  # a chunk before that of the pixels
    kinds = {
        "a.jpg": ({}, True), "mpo.jpg": ({"format": "MPO", "save_all": True, "append_images": [RGB]}, True),
        "a.webp": ({}, True), "b.webp": (profile, True), "c.webp": ({"lossless": True}, False),
        "d.webp": ({"lossless": True, **profile}, False), "a.png": ({}, False), "a.bmp": ({}, False),
        "a.tif": ({"compression": "jpeg"}, True), "b.tif": ({"compression": "tiff_lzw"}, False),
    }  # fmt: skip
    for name, (options, _) in kinds.items():
        RGB.save(tmp_path / name, **options)
    assert {name: media_info(tmp_path / name).lossy for name in kinds} == {name: kinds[name][1] for name in kinds}


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_transparent_pixels_are_refused(tmp_path, name):
    image = RGB.convert("RGBA")
    image.putpixel((3, 3), (0, 0, 0, 100))
    image.save(tmp_path / name)
    with pytest.raises(MediaError, match="has transparent pixels; flatten it"):
        open_media(tmp_path / name)


def test_one_transparent_level_of_16_bit_grey_is_refused_only_where_it_is_used(tmp_path):
    """Pillow cannot convert this kind to RGBA."""
    deep = Image.fromarray(GREY.astype(np.uint16) * 256 + 1)
    deep.save(tmp_path / "a.png", transparency=2)
    np.testing.assert_allclose(open_media(tmp_path / "a.png").read([0])[0, ..., 0], GREY, atol=1)
    deep.save(tmp_path / "b.png", transparency=int(GREY[0, 0]) * 256 + 1)
    with pytest.raises(MediaError, match="has transparent pixels"):
        open_media(tmp_path / "b.png")


def test_a_transparent_colour_of_16_bits_is_refused(tmp_path):
    """Pillow keeps 8 bits of the pixels and would find it nowhere."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    colour = struct.pack(">HHH", 1000, 2000, 3000)
    parts = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)), chunk(b"tRNS", colour)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + colour)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + pixels)
    with pytest.raises(MediaError, match="transparent colour"):
        open_media(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "gif.png"])
def test_several_pictures_in_a_file_are_refused_as_what_they_are(tmp_path, name):
    more = [RGB.transpose(Image.Transpose.ROTATE_180)]
    RGB.save(tmp_path / name, "GIF" if name == "gif.png" else None, save_all=True, append_images=more)
    reason = {
        "a.png": "animated PNG", "a.webp": "animated WebP", "a.tif": "has 2 pages", "gif.png": "animated GIF"
    }  # fmt: skip
    for opens in (media_info, open_media):
        with pytest.raises(MediaError, match=reason[name]):
            opens(tmp_path / name)


def test_the_small_copy_in_a_tiff_is_no_second_page(tmp_path):
    small = RGB.resize((10, 6))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    RGB.save(tmp_path / "a.tif", save_all=True, append_images=[small], tiffinfo={254: 0})
    with Image.open(tmp_path / "a.tif") as image:
        assert image.n_frames == 2
        image.seek(1)
        if not image.tag_v2.get(254):
            pytest.skip("this Pillow does not write the tag of a second page")
    np.testing.assert_array_equal(open_media(tmp_path / "a.tif").read([0])[0], PICTURE)


# --- what is no image, or a hostile one


@pytest.mark.parametrize(
    ("start", "named"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) print\n", "PostScript"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b"\0\0\0\x20ftypavif", "AVIF"),
    ],
)
def test_what_is_no_image_is_called_what_it_is_and_starts_nothing(tmp_path, monkeypatch, start, named):
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("started a program"))
    (tmp_path / "a.png").write_bytes(start)
    for opens in (media_info, open_media):
        with pytest.raises(MediaError, match=rf"a\.png: .*{named}"):
            opens(tmp_path / "a.png")


def test_an_image_of_too_many_pixels_is_refused_from_its_header(tmp_path):
    header = struct.pack(">IIBBBBB", 2**14, 2**13 + 1, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(content + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    with (
        pytest.raises(MediaError, match=r"a\.png: has 16384 x 8193 pixels"),
        pytest.warns(Image.DecompressionBombWarning),
    ):
        media_info(tmp_path / "a.png")


@pytest.mark.parametrize(
    "error", [struct.error("x"), TypeError("x"), KeyError("x"), MemoryError(), ZeroDivisionError()]
)
def test_whatever_a_decoder_raises_is_an_error_of_the_file(tmp_path, monkeypatch, error):
    RGB.save(tmp_path / "a.png")

    def fails(*_):
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fails)
    with pytest.raises(MediaError, match=r"a\.png: cannot be decoded: "):
        open_media(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore")
def test_damaged_images_are_errors_of_the_file(tmp_path):
    """A TIFF of one byte changed raises TypeError, KeyError and SyntaxError in Pillow, among others."""
    file = io.BytesIO()
    RGB.save(file, "TIFF", exif=Image.Exif())
    whole, failed = file.getvalue(), 0
    for place in range(4, 150):  # the directory
        for value in (0, 255):
            try:
                ImageReader("row", io.BytesIO(whole[:place] + bytes([value]) + whole[place + 1 :])).read([0])
            except MediaError:
                failed += 1
    assert failed > 20


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_images_are_upright_at_every_size(tmp_path, suffix, turn):
    """The file holds what turns into PICTURE."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # members of Image.Transpose that undo the Exif number
    stored = RGB if turn == 1 else RGB.transpose(Image.Transpose(back[turn]))
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **options)
    info = media_info(tmp_path / f"a.{suffix}")
    assert (info.height, info.width) == (24, 40)
    opened = open_media(tmp_path / f"a.{suffix}")
    assert np.abs(opened.read([0])[0].astype(int) - PICTURE).max() <= 6
    expected = np.asarray(RGB.resize((10, 6), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(opened.read([0], (6, 10))[0] - expected).max() <= 8


def test_only_single_images_are_images():
    assert is_image("/a/b.JPEG")
    assert is_image("/a/train/image/3.hfimage")
    assert not any(map(is_image, ("/a/b_*.png", "/a/b.mp4", "/a/b.gif", "/a/png", "/a/b.txt")))


# --- crops and flips


def clips_of(folder, settings, count=200):
    table = pd.DataFrame({"path": [str(folder / "a.png")]})
    schedule = BatchSchedule(np.array([1]), FrameCounts(1, 1), seed=3, batch_size=count)
    dataset = ClipDataset(table, schedule, settings)
    return [dataset[index].video[:, 0].permute(1, 2, 0).numpy() for index in schedule.step(0)[0]]


@pytest.fixture
def ramp(tmp_path):
    """A pixel's red and green are its column and row."""
    y, x = np.mgrid[:20, :30]
    Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8)).save(tmp_path / "a.png")
    return tmp_path


def test_images_are_cropped_everywhere_and_mirrored_every_other_time(ramp):
    drawn = clips_of(ramp, ClipSettings(16, 16, short_side=20, crop="random", flip=True))
    mirrored = [bool(clip[0, 0, 0] > clip[0, -1, 0]) for clip in drawn]
    places = {(int(clip[0, :, 0].min()), int(clip[0, 0, 1])) for clip in drawn}
    assert 70 < sum(mirrored) < 130
    assert {left for left, _ in places} == set(range(15))
    assert {top for _, top in places} == set(range(5))
    for clip, turned in zip(drawn, mirrored, strict=True):
        assert np.diff(clip[0, :, 0].astype(int)).tolist() == [-1 if turned else 1] * 15
    again = clips_of(ramp, ClipSettings(16, 16, short_side=20, crop="random", flip=True))
    assert all(map(np.array_equal, drawn, again))


def test_without_either_every_clip_is_the_centre(ramp):
    for clip in clips_of(ramp, ClipSettings(16, 16, short_side=20), 4):
        assert (clip[0, 0, 0], clip[0, 0, 1]) == (7, 2)


# --- JPEGs


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A JPEG of 403 x 601, no multiple of 8: fine and coarse structure, sharp edges."""
    rng = np.random.default_rng(0)
    layers = [rng.integers(0, 256, (403 // n + 1, 601 // n + 1, 3), dtype=np.uint8) for n in (1, 4, 16, 64)]
    sizes = [Image.fromarray(layer).resize((601, 403), Image.Resampling.BICUBIC) for layer in layers]
    mixed = sum(np.asarray(size, float) * n for size, n in zip(sizes, (1, 4, 16, 64), strict=True)) / 85
    mixed[100:180, 200:320] = 255 - mixed[100:180, 200:320]
    path = tmp_path_factory.mktemp("photo") / "a.jpg"
    Image.fromarray(mixed.astype(np.uint8)).save(path, quality=90)
    return path


@pytest.mark.parametrize(
    "size", [(25, 38), (50, 75), (64, 64), (100, 149), (100, 150), (101, 150), (202, 301), (403, 601)]
)
def test_a_jpeg_decoded_with_fewer_pixels_is_close_to_all_of_them(photograph, size, monkeypatch):
    decoded = []
    convert = Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda image, *a: decoded.append(image.size) or convert(image, *a))
    small = open_media(photograph).read([0], size)[0]
    (width, height) = decoded[0]
    assert small.shape == (*size, 3)
    assert height >= min(403, 2 * size[0])
    assert width >= min(601, 2 * size[1])
    assert width < 601 or 4 * size[1] > 601 or 4 * size[0] > 403
    full = np.asarray(convert(Image.open(photograph), "RGB").resize(size[::-1], Image.Resampling.BICUBIC))
    error = np.square(small.astype(float) - full).mean()
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > 42
    if width == 601:
        np.testing.assert_array_equal(small, full)


def test_a_larger_size_enlarges_the_whole_decode(photograph):
    large = open_media(photograph).read([0], (500, 700))[0]
    full = Image.open(photograph).convert("RGB").resize((700, 500), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(large, np.asarray(full))


def test_an_image_in_memory_is_read_as_often_as_wanted(photograph):
    opened = ImageReader("row", io.BytesIO(photograph.read_bytes()))
    first = opened.read([0, 0], (50, 75))
    np.testing.assert_array_equal(first[0], open_media(photograph).read([0], (50, 75))[0])
    np.testing.assert_array_equal(opened.read([0])[0], open_media(photograph).read([0])[0])
    with pytest.raises(MediaError, match=r"^row: is not an image"):
        ImageReader("row", io.BytesIO(b"junk"))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_an_image_whose_second_half_is_zeros_is_an_error(tmp_path, suffix):
    """As an interrupted download leaves it. Pillow decodes it, as black or grey."""
    file = tmp_path / f"a{suffix}"
    Image.fromarray(tiny.frames(1, 64, 64)[0]).save(file)
    whole, pixels = file.read_bytes(), open_media(file).read([0])
    file.write_bytes(whole + bytes(100))  # some programs fill files up
    np.testing.assert_array_equal(open_media(file).read([0]), pixels)
    half = len(whole) // 2
    file.write_bytes(whole[:half] + bytes(len(whole) - half))
    with pytest.raises(MediaError, match=rf"a\{suffix}: cannot be decoded: it is damaged"):
        open_media(file).read([0])


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_photograph_before_other_data_that_ends_with_zeros_is_read(tmp_path, kind):
    """As phones append a video, whose last box may be padding. A preview in the header is not the photograph."""
    file, exif, preview = tmp_path / "a.jpg", Image.Exif(), io.BytesIO()
    image = Image.fromarray(tiny.frames(1, 64, 64)[0])
    image.resize((16, 16)).save(preview, "JPEG")
    exif[0x010E] = preview.getvalue()
    image.save(file, kind, exif=exif, **({"save_all": True, "append_images": [image]} if kind == "MPO" else {}))
    whole, pixels = file.read_bytes(), open_media(file).read([0])
    file.write_bytes(whole + b"\0\0\0\x18ftypmp42" + bytes(100))
    np.testing.assert_array_equal(open_media(file).read([0]), pixels)
    cut = whole.rindex(b"\xff\xda", 0, len(whole) // (1 + (kind == "MPO"))) + 100  # in the photograph's pixels
    file.write_bytes(whole[:cut] + bytes(1000))
    with pytest.raises(MediaError, match=r"a\.jpg: cannot be decoded: it is damaged"):
        open_media(file).read([0])


def test_a_wrong_checksum_counts_only_in_chunks_of_a_png_that_its_pixels_need(tmp_path):
    file, info = tmp_path / "a.png", PngImagePlugin.PngInfo()
    info.add(b"teSt", b"a private chunk", after_idat=True)
    Image.fromarray(tiny.frames(1, 8, 8)[0]).save(file, pnginfo=info)
    whole, pixels = file.read_bytes(), open_media(file).read([0])
    for chunk, is_read in ((b"teSt", True), (b"IDAT", False)):
        start = whole.index(chunk)
        end = start + 4 + int.from_bytes(whole[start - 4 : start], "big")  # of its content, where the checksum is
        file.write_bytes(whole[:end] + bytes(4) + whole[end + 4 :])
        if is_read:
            np.testing.assert_array_equal(open_media(file).read([0]), pixels)
        else:
            with pytest.raises(MediaError, match=r"a\.png: cannot be decoded: it is damaged"):
                open_media(file)


def test_pixels_that_do_not_decode_are_found_when_read(photograph, tmp_path):
    whole = photograph.read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    assert media_info(tmp_path / "cut.jpg").height == 403
    for size in (None, (50, 75)):
        with pytest.raises(MediaError, match="cannot be decoded: image file is truncated"):
            open_media(tmp_path / "cut.jpg").read([0], size)
