"""Videos as cameras, broadcasters and tools leave them: each frame is the right one, or the file is refused."""

from __future__ import annotations

import gc
import io
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from PIL import Image

from tests import tiny
from vae3d.data.batches.clips import ClipSettings, read_clip
from vae3d.data.decoding.readers import open_media
from vae3d.data.media import MediaError
from vae3d.data.sources.table import Table
from vae3d.data.table import segments
from vae3d.data.table.probe import probe, read_metadata
from vae3d.data.table.segments import Segment, count_frames


def numbers(frames: np.ndarray) -> list[int]:
    """Which of tiny.frames these are."""
    return [round(float(frame[1:7, 1:7].mean()) / 5) for frame in frames]


def read_numbers(path: Path) -> list[int]:
    """All frames, each read alone by a reader of its own in a random order, then all in one go."""
    count = open_media(path).info.num_frames
    alone = {int(i): numbers(open_media(path).read([int(i)]))[0] for i in np.random.default_rng(0).permutation(count)}
    together = numbers(open_media(path).read(range(count)))
    assert [alone[i] for i in range(count)] == together
    return together


def copy_packets(source: Path, target: Path, change=lambda number, packet: packet) -> Path:
    """Remux; `change` gives the packet to write, or None to leave it out."""
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        stream = written.add_stream_from_template(read.streams.video[0])
        for number, packet in enumerate(read.demux(read.streams.video[0])):
            if packet.size and (changed := change(number, packet)) is not None:
                changed.stream = stream
                written.mux(changed)
    return target


# ---- frames are numbered as they come out of the decoder


def test_joined_recordings_keep_all_frames(tmp_path):
    for name in "ab":
        tiny.write_video(tmp_path / f"{name}.ts", tiny.frames(20), bf="3", g="8")
    joined = tmp_path / "joined.ts"
    joined.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    assert read_numbers(joined) == [*range(20), *range(20)]
    assert open_media(joined).info.fps == pytest.approx(24, rel=0.05)


@pytest.mark.parametrize("start", [0.3, 0.55])
def test_a_transport_stream_begins_at_its_first_key_frame(tmp_path, start):
    whole = tiny.write_video(tmp_path / "a.ts", tiny.frames(40), bf="2", g="8").read_bytes()
    (tmp_path / "cut.ts").write_bytes(whole[int(len(whole) * start) // 188 * 188 :])
    found = read_numbers(tmp_path / "cut.ts")
    assert found[0] % 8 == 0
    assert found == list(range(found[0], 40))


def test_matroska_cut_before_a_key_frame_begins_at_it(tmp_path):
    tiny.write_video(tmp_path / "a.mkv", tiny.frames(30), bf="0", g="8")
    cut = copy_packets(tmp_path / "a.mkv", tmp_path / "cut.mkv", lambda i, packet: packet if i >= 5 else None)
    assert read_numbers(cut) == list(range(8, 30))


def test_times_of_decoding_in_place_of_those_of_showing_are_seen_through(tmp_path):
    tiny.write_video(tmp_path / "a.mp4", tiny.frames(30), bf="3", g="10")

    def confuse(number, packet):
        packet.pts = packet.dts = number * packet.duration
        return packet

    assert read_numbers(copy_packets(tmp_path / "a.mp4", tmp_path / "b.mp4", confuse)) == list(range(30))


def test_a_palette_that_comes_once_holds_for_all_frames(tmp_path):
    path, levels = tmp_path / "a.avi", np.arange(256, dtype=np.uint8)
    palette = np.stack([np.full(256, 255, np.uint8), levels, levels, levels], axis=1)  # alpha, red, green, blue
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 40, "pal8"
        for picture in tiny.frames(12)[..., 0]:
            frame = av.VideoFrame.from_ndarray((picture, palette), format="pal8")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert read_numbers(path) == list(range(12))


def test_a_file_without_any_timestamps_is_read(tmp_path):
    tiny.write_video(tmp_path / "a.h264", tiny.frames(20), bf="3", g="8")
    raw = (tmp_path / "a.h264").rename(tmp_path / "raw.mp4")
    assert read_numbers(raw) == list(range(20))


def test_frames_that_no_key_frame_begins_exactly_are_decoded_from_further_back(tmp_path):
    """A GIF marks every frame as a key frame, though most hold only what changed."""
    path = tmp_path / "a.gif"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("gif", rate=25)
        stream.width, stream.height, stream.pix_fmt = 40, 32, "rgb8"
        for i, array in enumerate(tiny.frames(12)):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format="rgb8")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    for i in (7, 3, 11, 0):
        np.testing.assert_array_equal(open_media(path).read([i])[0], expected[i])


# ---- time

VARIABLE = [*(round(i * 1000 / 30) for i in range(60)), *(2000 + 200 * i for i in range(10))]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_segment_holds_the_frames_of_its_time(tmp_path, suffix):
    path = tiny.write_video(tmp_path / f"a.{suffix}", tiny.frames(70)[:, :24, :32], bf="2", times_ms=VARIABLE)
    for bounds, expected in (((2, 3), range(60, 65)), ((1, 2), range(30, 60)), ((2.5, 4), range(63, 70))):
        part = Segment(open_media(path), str(path), bounds)
        assert (part.first, part.info.num_frames) == (expected[0], len(expected))
    row = {"path": str(path), "start": 2, "end": 3, "num_frames": 70, "fps": 18.0}  # of which 2 to 3 s is 36 to 54
    pd.DataFrame([row]).to_csv(tmp_path / "t.csv", index=False)
    assert count_frames(Table(tmp_path / "t.csv").table())[0]["num_frames"].tolist() == [5]


def test_files_of_segments_are_opened_once_in_whatever_order_the_rows_are(tmp_path, monkeypatch):
    tiny.write_video(tmp_path / "a.mp4", tiny.frames(24), fps=24)
    tiny.write_video(tmp_path / "b.mp4", tiny.frames(12), fps=24)
    lines = ["path,start,end", "a.mp4,0,0.5", "gone.mp4,0,1", "b.mp4,0,0.25", "a.mp4,0.5,1", "b.mp4,0.5,1"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    opened = []
    monkeypatch.setattr(segments, "open_media", lambda path, **_: opened.append(Path(path).name) or open_media(path))
    table, errors = count_frames(Table(tmp_path / "t.csv").table())
    assert opened == ["a.mp4", "gone.mp4", "b.mp4"]
    assert table[["row", "num_frames"]].values.tolist() == [[1, 12], [3, 6], [4, 12]]
    assert [(name.split()[1], reason.split(";")[0]) for name, reason in errors] == [
        ("2", "no such file"),
        ("5", "is 0.5 s long"),
    ]


def test_mp4_and_matroska_have_the_same_rate(tmp_path):
    def rates(**options):
        files = (tiny.write_video(tmp_path / f"a.{suffix}", tiny.frames(25), **options) for suffix in ("mp4", "mkv"))
        return [open_media(path).info.fps for path in files]

    assert rates(fps=30) == [30.0, 30.0]
    for rate in (24, 30):  # as in a WebM copied into an MP4, whose unit is finer: whole milliseconds
        assert rates(times_ms=[round(1000 * i / rate) for i in range(25)])[0] == rate
    jumps = [40 * i + 2 * (i % 2) for i in range(24)]  # more than rounding
    assert open_media(tiny.write_video(tmp_path / "b.mp4", tiny.frames(24), times_ms=jumps)).info.fps < 25
    assert rates(times_ms=[1000 * i // 30 + 500 * (i > 10) for i in range(25)]) == pytest.approx(
        [24 / 1.3] * 2, rel=1e-6
    )


# ---- pictures


@pytest.mark.parametrize("orientation", [1, 6])
def test_motion_jpeg_of_a_camera_has_exif_in_its_frames(tmp_path, orientation):
    """PyAV 18 has no name for Exif as side data: reading ended in a ValueError."""
    file, exif, image = tmp_path / "a.avi", Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", (32, 16), "red").save(image, "JPEG", exif=exif)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuvj420p"
        for number in range(3):
            packet = av.Packet(image.getvalue())
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, number, number, True
            container.mux(packet)
    if orientation == 1 or "EXIF" in SideData.__members__:
        assert open_media(file).read(range(3)).shape == ((3, 16, 32, 3) if orientation == 1 else (3, 32, 16, 3))
    else:
        with pytest.raises(MediaError, match=r"a\.avi: is turned by -90 degrees"):
            open_media(file)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_all_eight_display_matrices_are_applied(tmp_path, rotation, mirrored):
    source = tiny.frames(2)
    path = tiny.write_video(tmp_path / "a.mp4", source, rotation=rotation, mirrored=mirrored, qp="0", pixels="yuv444p")
    expected = np.rot90(source[1], rotation // 90)
    expected = expected[:, ::-1] if mirrored else expected
    reader = open_media(path)
    assert (reader.info.height, reader.info.width) == expected.shape[:2]
    assert np.abs(reader.read([1])[0].astype(int) - expected).mean() < 3
    assert reader.read([1], (16, 20)).shape == (1, 16, 20, 3)


def test_another_display_matrix_is_refused(tmp_path):
    path = tiny.write_video(tmp_path / "a.mp4", tiny.frames(2), rotation=45)
    with pytest.raises(MediaError, match="45 degrees"):
        open_media(path)


def write_wide(path: Path, aspect: Fraction) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"qp": "10"})
        stream.width, stream.height, stream.pix_fmt = 40, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for array in tiny.frames(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")))
        container.mux(stream.encode())
    return path


def test_pixels_that_are_not_square_become_so_when_a_clip_is_scaled(tmp_path):
    path = write_wide(tmp_path / "a.mp4", Fraction(2))
    reader = open_media(path)
    stored = reader.read([1])
    assert stored.shape[1:3] == (32, 40)
    clip = read_clip(reader, str(path), ClipSettings(32, 80), 1, 0.5)  # all of the picture, twice as wide
    np.testing.assert_array_equal(clip, reader.read([1], (32, 80)))
    clip = read_clip(reader, str(path), ClipSettings(32, 40), 1, 0.5)  # at its own size, as it is stored
    np.testing.assert_array_equal(clip, stored)
    clip = read_clip(reader, str(path), ClipSettings(16, 16), 1, 0.5)
    np.testing.assert_array_equal(clip, reader.read([1], (16, 40))[:, :, 12:28])
    assert read_metadata(str(path)) == {"num_frames": 3, "height": 32, "width": 80, "fps": 24}
    with pytest.raises(MediaError, match="20 times as wide as high"):
        open_media(write_wide(tmp_path / "a.mp4", Fraction(20)))


def test_interlaced_frames_are_refused_with_the_command_that_helps(tmp_path):
    clip = np.zeros((2, 576, 720, 3), np.uint8)
    path = tiny.write_video(tmp_path / "a.avi", clip, codec="dvvideo", fps=25)  # always two fields
    with pytest.raises(MediaError, match="bwdif"):
        open_media(path)


def test_transparent_videos_are_refused_and_opaque_ones_read(tmp_path):
    for opacity in (255, 100):
        with av.open(str(tmp_path / "a.mov"), "w") as container:
            stream = container.add_stream("png", rate=24)
            stream.width, stream.height, stream.pix_fmt = 40, 32, "rgba"
            for array in tiny.frames(3):
                picture = np.dstack([array, np.full((32, 40), opacity, np.uint8)])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
            container.mux(stream.encode())
        if opacity == 255:
            np.testing.assert_array_equal(open_media(tmp_path / "a.mov").read([0, 1, 2]), tiny.frames(3))
        else:
            with pytest.raises(MediaError, match="has transparent pixels"):
                open_media(tmp_path / "a.mov")


@pytest.mark.parametrize("size", [(32, 40), (33, 41)])
def test_chroma_lies_at_the_same_place_whatever_the_bits_and_the_size(tmp_path, size):
    colours = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    clip = colours.repeat(8, 1).repeat(8, 2)[:, 1:, 1:]
    clip = np.pad(clip, ((0, 0), (0, 2), (0, 2), (0, 0)), mode="edge")[:, : size[0], : size[1]]
    read = {}
    for pixels in ("yuv420p", "yuv420p10le"):
        path = tiny.write_video(tmp_path / f"{pixels}.mkv", clip, codec="ffv1", pixels=pixels)
        reader = open_media(path)
        read[pixels] = reader.read(range(3))
        assert read[pixels].shape[1:3] == size
        np.testing.assert_array_equal(reader.read(range(3), size), read[pixels])
    # Planes of 8 bits made of the 10-bit ones, whose chroma each covers two by two pixels.
    with av.open(str(tmp_path / "yuv420p10le.mkv")) as container:
        frame = next(container.decode(video=0))
        y, u, v = (
            np.frombuffer(plane, np.uint16).reshape(plane.height, -1)[:, : plane.width].astype(float) / 4
            for plane in frame.planes
        )
    u, v = (plane.repeat(2, 0).repeat(2, 1)[: size[0], : size[1]] - 128 for plane in (u, v))
    y = (y - 16) * 255 / 219
    red, blue = y + 1.402 * 255 / 224 * v, y + 1.772 * 255 / 224 * u
    green = (y - 0.299 * red - 0.114 * blue) / 0.587
    expected = np.stack([red, green, blue], -1).clip(0, 255)
    assert np.abs(read["yuv420p10le"][0] - expected).max() < 4


# ---- errors


def with_bytes(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def test_metadata_of_another_encoding_does_no_harm(tmp_path):
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "a cafeXXXX"
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 40, 32, "yuv420p"
        for array in tiny.frames(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    assert open_media(with_bytes(path, b"cafeXXXX", b"caf\xe9\xff\xfe\xe9X")).info.num_frames == 3


def test_an_unknown_codec_is_named_as_such(tmp_path):
    path = tiny.write_video(tmp_path / "a.avi", tiny.frames(3), codec="mpeg4")
    with pytest.raises(MediaError, match="no decoder"):
        open_media(with_bytes(path, b"FMP4", b"ZQZQ"))


RAISED = [MemoryError(), IndexError("list"), ValueError("odd"), UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "x")]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_the_library_raises_is_an_error_of_the_file(tmp_path, monkeypatch, error):
    path = tiny.write_video(tmp_path / "a.mp4", tiny.frames(3))

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(MediaError, match="is not a readable video") as caught:
        open_media(path)
    assert caught.value.path == str(path)


def test_refused_files_are_closed(tmp_path):
    tiny.write_video(tmp_path / "hdr.mp4", tiny.frames(2), pixels="yuv420p10le", transfer=16)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    kept = []
    for _ in range(20):
        with pytest.raises(MediaError) as caught:
            open_media(tmp_path / "hdr.mp4")
        kept.append(caught)  # with its traceback, as a list of errors keeps it
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("suffix", ["mkv", "avi", "mp4", "gif"])
def test_a_file_that_was_cut_short_is_refused_at_opening(tmp_path, suffix):
    clip = np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), dtype=np.uint8)
    settings = {"codec": "gif", "pixels": "rgb8"} if suffix == "gif" else {"codec": "mpeg4", "g": "5"}
    path = tiny.write_video(tmp_path / f"a.{suffix}", clip, **settings)
    assert open_media(path).info.num_frames == 30
    if suffix == "mp4":  # in fragments, which are read up to the last whole one
        with (
            av.open(str(path)) as read,
            av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "frag_keyframe+empty_moov"}) as written,
        ):
            stream = written.add_stream_from_template(read.streams.video[0])
            for packet in read.demux(read.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    written.mux(packet)
        path = tmp_path / "b.mp4"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    with pytest.raises(MediaError, match="cut short"):
        open_media(path)


@pytest.mark.parametrize(
    ("suffix", "codec", "pixels"),
    [
        *[("mkv", "ffv1", "yuv420p"), ("avi", "huffyuv", "rgb24"), ("gif", "gif", "rgb8")],
        *[("wmv", "wmv2", "yuv420p"), ("flv", "flv", "yuv420p"), ("mpg", "mpeg2video", "yuv420p")],
        ("ts", "mpeg2video", "yuv420p"),
    ],
)
def test_a_file_whose_second_half_is_zeros_is_refused_at_opening(tmp_path, suffix, codec, pixels):
    """As an interrupted download leaves it. The demuxer skips zeros: the video had fewer frames."""
    clip = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    path = tiny.write_video(tmp_path / f"a.{suffix}", clip, codec=codec, pixels=pixels)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(100))  # some programs fill files up
    assert open_media(path).info.num_frames == 6
    for half in (len(whole) // 2, len(whole) // 2 + 1):
        path.write_bytes(whole[:half] + bytes(len(whole) - half))
        with pytest.raises(MediaError, match=r"ends in \d+ zeros"):
            open_media(path)


def test_frames_that_an_edit_list_leaves_out_are_not_missed(tmp_path):
    path = tiny.write_video(tmp_path / "a.mp4", tiny.frames(12), g="4", bf="0")

    def earlier(number, packet):  # by 5 frames, of which the last needs the key frame before it
        step = int(1 / (24 * packet.time_base))
        packet.pts, packet.dts = packet.pts - 5 * step, packet.dts - 5 * step
        return packet

    path = copy_packets(path, tmp_path / "b.mp4", earlier)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert sum(packet.size > 0 for packet in container.demux(stream)) < stream.frames
    assert read_numbers(path) == list(range(5, 12))


def test_the_cover_of_an_album_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        sound, cover = container.add_stream("aac", rate=48000, layout="mono"), container.add_stream("png")
        cover.height, cover.width, cover.pix_fmt = 32, 40, "rgb24"
        cover.disposition = Disposition.attached_pic.value
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 48000
        container.mux(cover.encode(av.VideoFrame.from_ndarray(tiny.frames(1)[0], format="rgb24")))
        container.mux(sound.encode(samples))
        container.mux([*cover.encode(), *sound.encode()])
    with pytest.raises(MediaError, match="no video stream, only a still picture, audio"):
        open_media(tmp_path / "a.mp4")


def test_a_playlist_that_calls_itself_a_video_opens_no_other_file(tmp_path):
    tiny.write_video(tmp_path / "other.ts", tiny.frames(3))
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:1", "#EXTINF:1,", str(tmp_path / "other.ts"), "#EXT-X-ENDLIST", ""]
    (tmp_path / "list.mp4").write_text("\n".join(lines))
    with pytest.raises(MediaError, match="is not a readable video"):
        open_media(tmp_path / "list.mp4")


# ---- the index


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_a_clip_reads_its_own_packets_whatever_the_length_of_the_file(tmp_path, monkeypatch, suffix):
    read = {}
    for count in (20, 400):
        clip = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)[np.arange(count) % 20]
        path = tiny.write_video(tmp_path / f"{count}.{suffix}", clip, codec="mpeg4", g="10", qmin="2", qmax="2")
        expected = open_media(path).read(range(count))
        with monkeypatch.context() as patch:
            patch.setattr(av, "open", lambda *args, **kwargs: pytest.fail("read the whole file again"))
            before = bytes_read()
            clip = open_media(path).read(range(12, 17))
            read[count] = bytes_read() - before
        np.testing.assert_array_equal(clip, expected[12:17])
        assert read[count] < path.stat().st_size
    assert read[400] < 1.5 * read[20]


def test_an_index_is_read_again_only_if_it_is_whole_and_of_this_file(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    path = tiny.write_video(tmp_path / "a.mp4", tiny.frames(9))
    assert open_media(path).info.num_frames == 9
    tiny.write_video(path, tiny.frames(12))
    assert open_media(path).info.num_frames == 12
    (cached,) = (file for file in (tmp_path / "cache").rglob("*") if file.is_file())
    for content in (
        cached.read_bytes()[:-3],
        b"",
        bytes(4),
        cached.read_bytes()[:60] + b"x" + cached.read_bytes()[61:],
    ):
        cached.write_bytes(content)
        assert read_numbers(path) == list(range(12))


def test_a_flipped_bit_of_an_index_never_gives_other_frames(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    path = tiny.write_video(tmp_path / "a.mp4", tiny.frames(9))
    expected = open_media(path).read(range(9))
    (cached,) = (file for file in (tmp_path / "cache").rglob("*") if file.is_file())
    content = cached.read_bytes()
    for place in range(0, len(content), 11):
        cached.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        np.testing.assert_array_equal(open_media(path).read(range(9)), expected)
        assert cached.read_bytes() == content  # rebuilt


def test_without_a_cache_files_are_read_with_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "file"))
    path = tiny.write_video(tmp_path / "a.mp4", tiny.frames(9))
    with pytest.warns(UserWarning, match="VAE3D_CACHE"):
        assert open_media(path).read([3]).shape == (1, 32, 40, 3)
    with pytest.warns(UserWarning, match="VAE3D_CACHE"):
        assert probe([str(path)])[str(path)]["num_frames"] == 9
