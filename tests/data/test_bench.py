"""`vae3d bench-data`: how fast the clips of a data set are read."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vae3d.commands.bench_data import Row, needs_of, row_of
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.read_speed import File, Measured, drop_from_memory, plan
from vae3d.data.table.segments import WHOLE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    for i in range(3):
        tiny.write_video(folder / f"{i}.mp4", tiny.frames(30, 64, 80, seed=i), g="10")
    tiny.write_video(folder / "short.mp4", tiny.frames(3))
    return folder


def run(*arguments: object) -> int:
    return tiny.status("bench-data", *arguments)


def test_a_row_for_each_reader_size_and_number_of_workers(folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    options = ["--reader", "pyav", "decord", "--size", "32x40", "--frames", 5, "--workers", 1, 2, "--clips", 12]
    assert run(folder, *options, "--gpus", 4000, "--batch", 4, "--step_seconds", 0.5, "--json", out) == 0
    found = json.loads(out.read_text())
    assert (found["settings"]["workers"], found["settings"].keys() & {"json", "command"}) == ([1, 2], set())
    rows = [Row(**row) for row in found["rows"]]
    assert [(row.reader, row.workers) for row in rows] == [("pyav", 1), ("pyav", 2), ("decord", 1), ("decord", 2)]
    size = os.path.getsize(folder / "0.mp4")
    for row in rows:
        assert (row.height, row.width, row.files, row.clips) == (32, 40, 3, 12)
        assert row.clips_per_second == pytest.approx(row.clips / row.seconds)
        assert row.cpu_seconds_per_clip * row.clips_per_core_second == pytest.approx(1)
        assert row.open + row.decode + row.resize == pytest.approx(1)
        assert min(row.open, row.decode, row.resize) > 0
    alone = [row.bytes_per_clip for row in rows if row.workers == 1]
    assert 0.05 * size < alone[0] < 2 * size  # of PyAV, with the cached index
    assert alone[1] > 0.9 * size  # decord reads the file to count its frames
    needs = {need["reader"]: need for need in found["needs"]}
    assert needs["pyav"]["clips_per_second"] == 32_000
    assert needs["pyav"]["cores"] == pytest.approx(32_000 * rows[1].cpu_seconds_per_clip)
    assert found["machine"]["versions"].keys() >= {"torch", "av", "decord"}
    assert found["errors"] == []
    assert found["notes"] == ["1 of 4 files have fewer frames than a clip, and are not read"]
    printed = capsys.readouterr().out
    assert printed.count("32x40") == 6  # four rows, two needs
    assert "4000 GPUs x 4 clips in 0.5 s: 32000 clips/s" in printed


def test_bad_files_are_listed_and_give_status_1(folder, tmp_path, capsys):
    (tmp_path / "empty.mp4").write_bytes(b"")
    tiny.write_video(tmp_path / "deep.mp4", tiny.frames(9), pixels="yuv420p10le")
    options = ["--reader", "pyav", "decord", "--frames", 5, "--workers", 1, "--clips", 2, "--cold"]
    assert run(folder / "0.mp4", tmp_path, *options) == 1
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'empty.mp4'}: is empty (0 bytes)" in printed
    assert f"decord: {tmp_path / 'deep.mp4'}: has 10 bits" in printed  # a file that only decord refuses
    assert "disk" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent: no such file or folder"),
        (["--frames", "999"], "lower --frames"),
        (["--clips", "1", "--workers", "4", "--frames", "5"], "--clips 1"),
        (["--reader", "torchcodec_cuda"], "torchcodec"),
        (["--json", "absent/out.json"], "--json absent/out.json"),
        (["--json", "."], "--json .: is a folder"),
    ],
)
def test_what_cannot_be_measured_is_an_error_with_status_2(folder, capsys, arguments, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    paths = [] if arguments == ["absent"] else [folder / "0.mp4"]
    assert run(*paths, *arguments) == 2
    assert message in capsys.readouterr().err


def test_flags_that_go_together_are_asked_for_both(folder, capsys):
    for wrong in (["--batch", "4"], ["--step_seconds", "1"], ["--size", "256"], ["--size", "0x4"]):
        assert run(folder, *wrong) == 2
        assert wrong[0] in capsys.readouterr().err


def test_images_have_no_share_of_resizing(tmp_path, capsys):
    Image.fromarray(tiny.frames(1, 64, 80)[0]).save(tmp_path / "a.jpg")
    assert run(tmp_path, "--reader", "pyav", "--frames", 1, "--workers", 1, "--clips", 2, "--size", "16x16") == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "-"


def test_any_number_of_workers_reads_the_same_clips():
    files = [File(f"{i}.mp4", WHOLE) for i in range(3)]
    alone, *_ = plan(files, 1, 12, 4)
    shared = plan(files, 3, 12, 4)
    assert sorted(alone, key=repr) == sorted((opening for share in shared for opening in share), key=repr)
    assert [opening.file for opening in alone] == files
    for opening in alone:  # one clip in each quarter of the file
        assert np.floor(4 * np.array(opening.starts)).tolist() == [0, 1, 2, 3]


def test_what_feeds_the_gpus_follows_from_the_row_with_most_workers():
    settings = ClipSettings(16, 16, reader="pyav")
    one = Measured(begin=0, end=10, clips=20, cpu=10, open=1, read=9, resize=3, bytes_read=2000, disk_bytes=None)
    four = Measured(begin=0, end=4, clips=20, cpu=12, open=2, read=14, resize=None, bytes_read=None, disk_bytes=None)
    rows = [row_of(settings, 1, 3, one), row_of(settings, 4, 3, four)]
    assert (rows[0].open, rows[0].decode, rows[0].resize) == pytest.approx((0.1, 0.6, 0.3))
    (need,) = needs_of(rows, 100)
    assert need.cores == pytest.approx(60)  # 0.6 CPU seconds of a clip
    assert need.workers == 80  # of 1.25 clips per second
    assert need.bytes_per_second is None
    (need,) = needs_of(rows[:1], 100)
    assert (need.workers, need.bytes_per_second) == (50, 10_000)


def test_files_are_dropped_from_the_systems_memory(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x" * 4096)
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: asked.append((os.fstat(fd).st_size, *rest)))
    drop_from_memory(str(tmp_path / "a"))
    assert asked == [(4096, 0, 0, os.POSIX_FADV_DONTNEED)]
