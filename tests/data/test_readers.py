from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import shutil
import sys
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import av
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests import tiny
from vae3d.config.validate import reader_issues
from vae3d.data import workers
from vae3d.data.batches.batch_schedule import BatchSchedule, FrameCounts
from vae3d.data.batches.clips import ClipSettings, Stream
from vae3d.data.decoding.frame_source import FrameSource
from vae3d.data.decoding.kept_sources import KEPT, _kept, close_kept_sources
from vae3d.data.decoding.readers import PyAVReader, check_reader, open_media
from vae3d.data.loader import TrainingData
from vae3d.data.media import DataError, MediaError

KINDS = {
    "b_frames.mp4": {"bf": "3", "g": "8"},
    "b_frames.mkv": {"bf": "3", "g": "8"},
    "all_key.mp4": {"g": "1"},
    "one_key.mp4": {"g": "1000"},
    "open_gop.mp4": {"codec": "libx265", "x265-params": "open-gop=1:keyint=8:bframes=3:log-level=none"},
    "open_gop264.mp4": {"x264-params": "open-gop=1:keyint=8:bframes=3"},
    "mpeg4.avi": {"codec": "mpeg4", "g": "8"},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", "bf": "2", "g": "8"},
    "h264_b_frames.avi": {"bf": "3", "g": "8"},
    "dropped.avi": {"codec": "mpeg4", "bf": "2", "g": "8", "times_ms": [40 * i + 40 * (i > 20) for i in range(40)]},
    "program.mpg": {"codec": "mpeg2video", "bf": "2", "g": "8", "fps": 25},
    "refresh.mp4": {"x264-params": "intra-refresh=1:keyint=8"},
    "equal_times.mkv": {"codec": "ffv1", "g": "8", "times_ms": [80 * (i // 2) for i in range(40)]},
    "vp8_alt_ref.webm": {"codec": "libvpx", "g": "20", "auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k"},
    "vp9.webm": {"codec": "libvpx-vp9", "g": "8"},
    "stream.ts": {"bf": "3", "g": "8"},
    "rotated.mp4": {"rotation": 90, "bf": "2"},
    "upside_down.mp4": {"rotation": 180, "bf": "2"},
    "variable.mp4": {"bf": "3", "g": "8", "times_ms": np.cumsum(np.random.default_rng(1).integers(5, 90, 40)).tolist()},
    "variable.mkv": {"bf": "3", "g": "8", "times_ms": np.cumsum(np.random.default_rng(2).integers(5, 90, 40)).tolist()},
}

NOT_DECORD = {
    *("open_gop.mp4", "open_gop264.mp4", "stream.ts", "program.mpg", "refresh.mp4"),
    *("mpeg4_b_frames.avi", "h264_b_frames.avi", "dropped.avi", "equal_times.mkv"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    for name, options in KINDS.items():
        size = (128, 128) if options.get("codec") == "libx265" else (32, 40)  # x265 crashes on smaller pictures
        tiny.write_video(folder / name, tiny.frames(40, *size), **options)
    tiny.write_video(folder / "odd.mp4", tiny.frames(5, 33, 41), pixels="yuv444p")
    tiny.write_video(folder / "ten_bit.mp4", tiny.frames(5), pixels="yuv420p10le")
    return folder


def decode_all(path) -> np.ndarray:
    """Every frame in order, the plain way."""
    with av.open(str(path)) as container:
        frames = [(f.to_ndarray(format="rgb24"), f.rotation) for f in container.decode(video=0)]
    return np.stack([np.rot90(frame, rotation // 90) for frame, rotation in frames])


@pytest.mark.parametrize("reader", ["pyav", "decord", "torchcodec"])
@pytest.mark.parametrize("name", KINDS)
def test_any_frames_are_those_of_a_full_decode(folder, name, reader):
    if reader == "torchcodec":
        pytest.importorskip("torchcodec")
    if name in NOT_DECORD and reader != "pyav":
        with pytest.raises(MediaError, match=f"{reader} returns wrong frames; use reader=pyav"):
            open_media(folder / name, reader)
        return
    expected = decode_all(folder / name)
    opened = open_media(folder / name, reader)
    assert opened.info.num_frames == len(expected) == 40
    assert (opened.info.height, opened.info.width) == expected.shape[1:3]
    rng = np.random.default_rng(0)
    for _ in range(12):
        start = int(rng.integers(40))
        for indices in (range(start, min(start + 17, 40)), rng.integers(0, 40, 5).tolist(), range(0, 40, 7)):
            np.testing.assert_array_equal(opened.read(indices), expected[list(indices)])
    opened.close()


def test_reading_on_does_not_seek(folder, monkeypatch):
    opened = open_media(folder / "b_frames.mp4")
    opened.read([0])
    seeks = []
    monkeypatch.setattr(type(opened), "_restart", lambda self, pts: seeks.append(pts))
    for start in range(1, 33, 8):
        opened.read(range(start, start + 8))
    assert seeks == []


@pytest.mark.parametrize("count", [3, 4, 5, 7])
def test_reading_on_decodes_no_frame_twice(tmp_path, monkeypatch, count):
    """Also where a B-frame after the last frame of a read is decoded before it."""
    path = tiny.write_video(tmp_path / "a.mp4", tiny.frames(60), bf="3", g="30")
    opened, restarts = open_media(path), []
    restart = PyAVReader._restart
    monkeypatch.setattr(
        PyAVReader, "_restart", lambda self, *args, **options: restarts.append(args) or restart(self, *args, **options)
    )
    for start in range(0, 60 - count, count):
        opened.read(range(start, start + count))
    assert len(restarts) <= 2  # at the start, and once until the reader sees that it is read on


def test_resizing_is_antialiased_in_both_readers(tmp_path):
    """A zone plate: shrunk without a low-pass filter, its fine rings turn into coarse ones."""
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    grey = (127.5 + 127.5 * np.cos(128 * np.pi * (x**2 + y**2) / 2)).astype(np.uint8)
    plate = np.repeat(grey[None, ..., None], 3, axis=3)
    tiny.write_video(tmp_path / "plate.mp4", plate, crf="0", pixels="yuv444p")
    full = open_media(tmp_path / "plate.mp4").read([0])[0]
    reference = np.asarray(Image.fromarray(full).resize((48, 40), Image.Resampling.BICUBIC)).astype(float)
    aliased = np.asarray(Image.fromarray(full).resize((48, 40), Image.Resampling.NEAREST)).astype(float)
    for reader in ("pyav", "decord"):
        small = open_media(tmp_path / "plate.mp4", reader).read([0], (40, 48))[0].astype(float)
        assert small.shape == (40, 48, 3)
        assert np.abs(small - reference).mean() < 2.0
    assert np.abs(aliased - reference).mean() > 20.0


def test_rotated_videos_are_resized_upright(folder):
    opened = open_media(folder / "rotated.mp4")
    assert opened.read([3], (20, 16)).shape == (1, 20, 16, 3)
    whole, small = opened.read([3])[0], opened.read([3], (20, 16))[0]
    expected = np.asarray(Image.fromarray(np.ascontiguousarray(whole)).resize((16, 20), Image.Resampling.BICUBIC))
    assert np.abs(small.astype(float) - expected).mean() < 8.0


def test_images_are_videos_of_one_frame(tmp_path):
    picture = tiny.frames(1, 20, 30)[0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    opened = open_media(tmp_path / "a.png")
    assert (opened.info.num_frames, opened.info.height, opened.info.width, opened.info.fps) == (1, 20, 30, 0.0)
    np.testing.assert_array_equal(opened.read([0])[0], picture)
    assert opened.read([0, 0], (10, 15)).shape == (2, 10, 15, 3)


def test_16_bit_grey_is_scaled_and_pixels_of_unknown_range_are_refused(tmp_path):
    ramp = np.linspace(0, 65535, 600).reshape(20, 30)
    for name in ("deep.tiff", "deep.png"):
        Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / name)
        opened = open_media(tmp_path / name)
        assert opened.info.bits == 16
        assert np.abs(opened.read([0])[0, :, :, 0] - ramp / 257).max() <= 0.51
    for kind, dtype in (("32-bit integer", np.int32), ("floating-point", np.float32)):
        Image.fromarray(ramp.astype(dtype)).save(tmp_path / "unknown.tiff")
        with pytest.raises(MediaError, match=f"{kind} pixels of unknown range"):
            open_media(tmp_path / "unknown.tiff")


def test_an_image_beyond_pillows_limit_is_refused(tmp_path, monkeypatch):
    Image.fromarray(tiny.frames(1, 20, 30)[0]).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(MediaError, match="exceeds limit"):
        open_media(tmp_path / "a.png")


def test_photographs_are_turned_as_their_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(tiny.frames(1, 20, 30)[0]).save(tmp_path / "a.jpg", exif=exif)
    info = open_media(tmp_path / "a.jpg").info
    assert (info.height, info.width) == (30, 20)


def test_odd_sizes_and_ten_bits_are_read(folder):
    assert open_media(folder / "odd.mp4").read([4]).shape == (1, 33, 41, 3)
    source = tiny.frames(5)
    ten = open_media(tiny.write_video(folder / "ten.mp4", source, pixels="yuv444p10le", crf="1"))
    assert ten.info.bits == 10
    assert np.abs(ten.read([2])[0].astype(float) - source[2]).mean() < 2.0


def index_first(source, target):
    """Copy a video with its index in front of the pictures, as for streaming."""
    with av.open(str(source)) as read, av.open(str(target), "w", options={"movflags": "+faststart"}) as written:
        stream = written.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(read.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                written.mux(packet)


def make_faulty(folder, source):
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video")
    (folder / "text.png").write_text("this is no image")
    (folder / "video.xyz").write_bytes((source / "all_key.mp4").read_bytes())
    (folder / "folder.mp4").mkdir()
    Image.fromarray(tiny.frames(1)[0]).save(folder / "picture.png")
    shutil.copy(folder / "picture.png", folder / "picture_called.mp4")
    shutil.copy(source / "all_key.mp4", folder / "video_called.png")
    whole = (source / "all_key.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # the index is at the end, and gone
    tiny.write_video(folder / "index_last.mp4", tiny.frames(40), g="8")
    index_first(folder / "index_last.mp4", folder / "index_first.mp4")
    content = (folder / "index_first.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    (folder / "cut_front.mp4").write_bytes(content[: (content.index(b"mdat") + len(content)) // 2])
    damaged = bytearray(whole)
    middle = len(whole) // 3
    damaged[middle : middle + len(whole) // 4] = b"\xff" * (len(whole) // 4)
    (folder / "damaged.mp4").write_bytes(damaged)
    with av.open(str(folder / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    tiny.write_video(folder / "hdr.mp4", tiny.frames(2), pixels="yuv420p10le", transfer=16)
    # Of this codec only the container says it here.
    tiny.write_video(folder / "hdr.mkv", tiny.frames(2), codec="prores_ks", pixels="yuv422p10le", transfer=18)


FAULTY = {
    "absent.mp4": "no such file",
    "videos\\absent.mp4": "no such file; write / instead",
    "empty.mp4": r"is empty \(0 bytes\)",
    "text.mp4": "is not a readable video",
    "text.png": "is not an image, whatever its extension says",
    "video.xyz": r"unknown extension '\.xyz'; known: \.mp4",
    "folder.mp4": "is a folder, not a file",
    "picture_called.mp4": r"is an image \(png_pipe\), not a video",
    "video_called.png": "is not an image, whatever its extension says",
    "cut.mp4": "is not a readable video",
    "cut_front.mp4": r"is cut short: its header promises 40 frames, \d+ are there",
    "damaged.mp4": "is damaged|cannot be decoded",
    "audio.mp4": "has no video stream, only audio",
    "hdr.mp4": r"is HDR \(PQ\); tone-map it",
    "hdr.mkv": r"is HDR \(HLG\); tone-map it",
}


@pytest.fixture(scope="module")
def faulty(folder, tmp_path_factory):
    where = tmp_path_factory.mktemp("faulty")
    make_faulty(where, folder)
    return where


@pytest.mark.parametrize("name", FAULTY)
def test_invalid_files_are_refused_with_name_and_reason(faulty, name):
    with pytest.raises(MediaError, match=FAULTY[name]) as error:
        opened = open_media(faulty / name)
        opened.read(range(opened.info.num_frames))
    assert str(error.value).startswith(str(faulty / name))


def test_what_decord_cannot_read_is_refused(folder):
    with pytest.raises(
        MediaError, match="has 10 bits per channel, which decord converts to wrong colours; use reader=pyav"
    ):
        open_media(folder / "ten_bit.mp4", "decord")


def test_frames_behind_the_end_are_refused(folder):
    with pytest.raises(MediaError, match="has 40 frames; frames 38 to 40"):
        open_media(folder / "all_key.mp4").read([38, 40])


def test_errors_survive_the_way_out_of_a_worker_process():
    error = pickle.loads(pickle.dumps(MediaError("a.mp4", "is empty")))
    assert (str(error), error.path, error.reason) == ("a.mp4: is empty", "a.mp4", "is empty")


def test_frames_that_no_other_needs_are_skipped_and_read_when_wanted(tmp_path, monkeypatch):
    path = tmp_path / "b_frames.mp4"
    tiny.write_video(path, tiny.frames(60, 64, 80), bf="3", g="60")
    expected = decode_all(path)
    opened = open_media(path)
    assert opened.read([50]).shape == expected[[50]].shape
    skipped = set(opened._wanted.skipped)
    assert len(skipped) > 15
    frames = [i for i, (packet, _) in enumerate(opened.index.frames.tolist()) if packet in skipped]
    for i in (frames[-1], frames[3], 50):
        np.testing.assert_array_equal(opened.read([i]), expected[[i]])
    for start in range(0, 60, 6):  # reading on
        np.testing.assert_array_equal(opened.read(range(start, start + 6)), expected[start : start + 6])


@pytest.mark.parametrize("fails", ["the flushed decoder", "skipping"])
def test_a_frame_that_a_shortcut_does_not_give_is_decoded_without_it(folder, monkeypatch, fails):
    expected = decode_all(folder / "b_frames.mp4")
    opened = open_media(folder / "b_frames.mp4")
    opened.read([3])
    whole = FrameSource.decode

    def decode(source, start, wanted=None, fresh=True):
        damaged = not fresh if fails == "the flushed decoder" else wanted.packets is not None
        return iter([(len(source.index.packets), [])]) if damaged else whole(source, start, wanted, fresh)

    opened._source.reused = True
    monkeypatch.setattr(FrameSource, "decode", decode)
    np.testing.assert_array_equal(opened.read([20]), expected[[20]])


def test_files_stay_open_but_not_more_than_a_few(folder, tmp_path):
    close_kept_sources()
    names = []

    def opened_files():
        links = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        return links.count(os.path.realpath(folder / "b_frames.mp4"))

    for i in range(3 * KEPT):
        names.append(tmp_path / f"{i}.mp4")
        names[-1].symlink_to(folder / "b_frames.mp4")
        for _ in range(2):
            with closing(open_media(names[-1])) as opened:
                opened.read([5])
    assert len(_kept) == KEPT
    assert opened_files() == KEPT
    with closing(open_media(names[-1])) as first, closing(open_media(names[-1])) as second:  # one decoder for each
        np.testing.assert_array_equal(first.read(range(3, 9)), second.read(range(3, 9)))
    close_kept_sources()
    assert opened_files() == 0


def test_a_file_that_is_replaced_while_it_is_kept_open_is_read_anew(tmp_path):
    path, other = tmp_path / "a.mp4", tmp_path / "b.mp4"
    tiny.write_video(path, tiny.frames(20))
    tiny.write_video(other, tiny.frames(20)[::-1])
    with closing(open_media(path)) as opened:
        old = opened.read([4])
    expected = decode_all(other)[[4]]
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    os.replace(other, path)
    with closing(open_media(path)) as opened:
        new = opened.read([4])
    np.testing.assert_array_equal(new, expected)
    assert (new != old).any()


def read_in_a_child(path, index, queue):
    with closing(open_media(path)) as opened:
        queue.put((index, opened.read([index])))


def test_files_kept_open_serve_forked_workers(folder):
    path = folder / "b_frames.mp4"
    with closing(open_media(path)) as opened:
        opened.read([7])  # the file is kept
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    children = [context.Process(target=read_in_a_child, args=(path, i, queue)) for i in (11, 30)]
    for child in children:
        child.start()
    read = dict(queue.get() for _ in children)
    for child in children:
        child.join()
    with closing(open_media(path)) as opened:  # the parent's decoder is as it was
        read[3] = opened.read([3])
    expected = decode_all(path)
    for i in (3, 11, 30):
        np.testing.assert_array_equal(read[i], expected[[i]])


def test_torchcodec_that_is_not_there_is_named_with_the_command_that_helps(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(DataError, match="pip install torchcodec"):
        open_media(folder / "b_frames.mp4", "torchcodec")


@pytest.fixture
def nvdec(monkeypatch) -> list[dict]:
    """A machine with a GPU and torchcodec, played by PyAV on the CPU. Returns the options of each decoder."""
    opened = []

    class VideoDecoder:
        cpu_fallback = False

        def __init__(self, path: str, **options: object) -> None:
            opened.append({"path": path, **options})
            self.frames = torch.from_numpy(decode_all(path))

        def __len__(self) -> int:
            return len(self.frames)

        def get_frames_at(self, indices: list[int]) -> SimpleNamespace:
            return SimpleNamespace(data=self.frames[indices])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setitem(sys.modules, "torchcodec", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", SimpleNamespace(VideoDecoder=VideoDecoder))
    return opened


def test_nvdec_gives_the_frames_of_the_file_at_the_size_that_is_asked(folder, nvdec):
    expected = open_media(folder / "b_frames.mp4")
    opened = open_media(folder / "b_frames.mp4", "torchcodec_cuda")
    assert opened.info == expected.info
    indices = [7, 3, *range(36), 3]  # more than are decoded at once
    np.testing.assert_array_equal(opened.read(indices), expected.read(indices))
    small, reference = (reader.read(indices, (20, 28)).astype(int) for reader in (opened, expected))
    assert small.shape == (39, 20, 28, 3)
    assert (np.abs(small - reference) > 1).mean() < 0.01
    assert nvdec[0]["dimension_order"] == "NHWC"
    assert nvdec[0]["device"] == torch.device("cuda", 0)


def test_nvdec_decodes_on_the_gpu_of_its_rank(folder, nvdec, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    open_media(folder / "b_frames.mp4", "torchcodec_cuda")
    open_media(folder / "b_frames.mp4", "torchcodec")
    assert [options["device"] for options in nvdec] == [torch.device("cuda", 3), torch.device("cpu")]


def test_a_file_that_nvdec_leaves_to_the_cpu_is_named(folder, nvdec, monkeypatch):
    decoder = sys.modules["torchcodec.decoders"].VideoDecoder
    monkeypatch.setattr(decoder, "cpu_fallback", "unsupported codec")
    opened = open_media(folder / "b_frames.mp4", "torchcodec_cuda")
    with pytest.warns(UserWarning, match=r"b_frames\.mp4 on the CPU: unsupported codec"):
        opened.read([0])


def test_nvdec_without_a_gpu_or_in_a_fork_is_an_error(folder, nvdec, monkeypatch):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(DataError, match="torchcodec_cuda cannot decode in a forked process"):
        open_media(folder / "b_frames.mp4", "torchcodec_cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for use in (check_reader, partial(open_media, folder / "b_frames.mp4")):
        with pytest.raises(DataError, match=r"torchcodec_cuda needs an NVIDIA GPU.*reader=auto"):
            use("torchcodec_cuda")
    for reader in ("torchcodec", "auto"):
        check_reader(reader)  # need none


def test_workers_that_decode_on_a_gpu_are_spawned(folder, monkeypatch):
    started = []

    class Loader:
        def __init__(self, dataset, multiprocessing_context, **options):
            started.append(multiprocessing_context)

        def __iter__(self):
            return iter(())

    monkeypatch.setattr(workers, "DataLoader", Loader)
    table = pd.DataFrame({"path": [str(folder / "b_frames.mp4")], "num_frames": 40})
    plan = BatchSchedule(np.array([40]), FrameCounts(5, 5), seed=0, batch_size=1)
    for reader in ("auto", "torchcodec", "torchcodec_cuda"):
        list(TrainingData([Stream(table, plan, ClipSettings(16, 16, reader=reader))], plan, 1, 2, [], []).clips(0, 1))
    assert started == [None, None, "spawn"]


def test_a_reader_whose_package_is_not_installed_is_a_configuration_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for reader, package in {"torchcodec_cuda": "torchcodec", "torchcodec": "torchcodec", "decord": "decord"}.items():
        (issue,) = reader_issues(SimpleNamespace(data=SimpleNamespace(reader=reader)))
        assert (issue.key, issue.value) == ("data.reader", reader)
        assert package in issue.hint
    assert list(reader_issues(SimpleNamespace(reader="pyav"))) == []
