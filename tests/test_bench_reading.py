"""scripts/benchmarks/bench_reading.py --shards: all methods read the same frames, from files and from a tar."""

from __future__ import annotations

import numpy as np
import pytest

from tests import tiny

bench = tiny.load_script("bench_reading")


@pytest.fixture
def video(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHARD_FILES", 2)
    return tiny.write_video(tmp_path / "a.mp4", tiny.frames(30, 64, 80), bf="3", g="10")


def test_a_line_for_each_way_of_reading(tmp_path, video, capsys):
    bench.compare_shards(tmp_path, video, 1, "")
    printed = capsys.readouterr().out
    names = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    expected = {"vae3d, files", "vae3d, tar", "decord, files", "webdataset, decord", "webdataset, whole videos"}
    assert expected <= set(names)
    ours = next(line for line in printed.splitlines() if line.startswith("| vae3d, files"))
    assert "1.00x" in ours


def test_a_method_that_reads_other_frames_ends_the_measurement(tmp_path, video, monkeypatch):
    methods = bench.shard_methods

    def shifted(rate):
        found = methods(rate)
        read = found["webdataset, whole videos"]
        found["webdataset, whole videos"] = lambda *given: [np.roll(clip, 1, axis=0) for clip in read(*given)]
        return found

    monkeypatch.setattr(bench, "shard_methods", shifted)
    with pytest.raises(SystemExit, match="webdataset, whole videos reads other frames"):
        bench.compare_shards(tmp_path, video, 1, "")
