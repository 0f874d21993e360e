"""Indices of videos beside a table, for machines that have not read the videos."""

from __future__ import annotations

import json
import math
import os
import shutil
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tests import tiny
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.decoding import index_cache, video_index
from vae3d.data.decoding.readers import open_media
from vae3d.data.loader import read_tables
from vae3d.data.sources.table import Table
from vae3d.data.storage.files import local_range
from vae3d.data.table import parts, probe, shared_index
from vae3d.data.table.parts import parts_of
from vae3d.loading import merge


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A table of five videos, probed on a machine whose cache is gone."""
    monkeypatch.setattr(index_cache, "look_in", {})
    monkeypatch.setattr(probe, "look_in", index_cache.look_in)
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for i in range(5):
        tiny.write_video(tmp_path / f"set/{i}.mp4", tiny.frames(5 + i))
    pd.DataFrame({"path": [f"{i}.mp4" for i in range(5)]}).to_csv(tmp_path / "set/t.csv", index=False)
    read(tmp_path / "set")
    shutil.rmtree(tmp_path / "cache")
    index_cache.look_in.clear()
    return tmp_path / "set"


def read(folder):
    return read_tables(Table(folder / "t.csv"), ClipSettings(16, 16), num_val_files=0, max_broken=0)


def built(monkeypatch) -> list[str]:
    names, original = [], index_cache.build
    monkeypatch.setattr(index_cache, "build", lambda file: names.append(os.path.basename(file.name)) or original(file))
    return names


def frames_of(folder, name: str):
    reader = open_media(str(folder / name))
    return reader.read([0, 3]).tolist()


def test_a_machine_that_never_read_the_videos_finds_their_indices(folder, monkeypatch, tmp_path):
    names = built(monkeypatch)
    expected = frames_of(folder, "0.mp4")
    assert names == ["0.mp4"]  # without the table, nobody knows
    shutil.rmtree(tmp_path / "cache")
    folder.rename(tmp_path / "mounted elsewhere")
    folder = tmp_path / "mounted elsewhere"
    read(folder)
    assert frames_of(folder, "0.mp4") == expected
    assert len(frames_of(folder, "4.mp4")) == 2
    assert names == ["0.mp4"]


def test_a_changed_video_is_indexed_anew(folder, monkeypatch):
    names = built(monkeypatch)
    tiny.write_video(folder / "2.mp4", tiny.frames(9))
    read(folder)
    assert open_media(str(folder / "2.mp4")).info.num_frames == 9
    assert names == ["2.mp4"]


@pytest.mark.parametrize("damage", ["deleted", "junk", "cut off", "entry", "offsets"])
def test_damaged_parts_are_not_used(folder, monkeypatch, damage):
    names = built(monkeypatch)
    (part,) = parts_of(folder / "t.csv.probe", "index")
    content = part.read_bytes()
    flipped = bytearray(content)
    for place in range(len(content) // 4, len(content) // 2, 50):
        flipped[place] ^= 1
    _, places, _ = pa.ipc.open_file(content).read_all()["index"].chunk(0).buffers()
    outside = content.replace(places.to_pybytes()[8:], b"\x40" * (places.size - 8))  # would be read far behind the file
    assert outside != content
    wrong = {"junk": b"junk" * 9, "cut off": content[:-9], "entry": bytes(flipped), "offsets": outside}
    if damage == "deleted":
        part.unlink()
    else:
        part.write_bytes(wrong[damage])
    read(folder)
    for i in range(5):
        assert open_media(str(folder / f"{i}.mp4")).info.num_frames == 5 + i
    assert names


def packed(head: dict, rows: bytes) -> bytes:
    line = json.dumps(head).encode()
    return video_index._crc(line, rows) + line + b"\n" + rows


HOSTILE = {
    "no keys": lambda head, rows: packed({}, rows),
    "a list": lambda head, rows: packed([1], rows),
    "no header": lambda head, rows: packed({**head, "header": {}}, rows),
    "more frames": lambda head, rows: packed({**head, "counts": {**head["counts"], "frames": 10**9}}, rows),
    "unknown rows": lambda head, rows: packed({**head, "counts": {"programs": 1}}, rows),
    "other packets": lambda head, rows: packed(head, rows[:-8] + b"\xff" * 8),
    "other attributes": lambda head, rows: packed(
        {**head, "header": {**head["header"], "decoder": {**head["header"]["decoder"], "numbers": {"__class__": 1}}}},
        rows,
    ),
    "many bytes": lambda head, rows: bytes(2**26),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_indices_that_a_stranger_made_are_not_used(folder, monkeypatch, case):
    """Also with the right checksums."""
    monkeypatch.setattr(shared_index, "MAX_INDEX", 2**20)
    names = built(monkeypatch)
    (part,) = parts_of(folder / "t.csv.probe", "index")
    table = pa.ipc.open_file(part.read_bytes()).read_all()
    changed = []
    for content in table["index"].to_pylist():
        head, _, rows = zlib.decompress(content)[video_index.CRC_BYTES :].partition(b"\n")
        changed.append(zlib.compress(HOSTILE[case](json.loads(head), rows)))
    part.unlink()
    table = table.set_column(table.column_names.index("index"), "index", pa.array(changed, pa.large_binary()))
    parts.write_part(part.parent, "index", shared_index.SCHEMA, [table])
    read(folder)
    tracemalloc.start()
    assert open_media(str(folder / "3.mp4")).info.num_frames == 8
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert names == ["3.mp4"]
    assert peak < 2**25


def test_merged_parts_are_found(folder, monkeypatch):
    names = built(monkeypatch)
    monkeypatch.setattr(parts, "MAX_PARTS", 2)
    monkeypatch.setattr(shared_index, "BATCH", 2)
    for i in range(3):
        pd.DataFrame({"path": [f"new{i}.mp4"]}).to_csv(folder / "t.csv", mode="a", header=False, index=False)
        tiny.write_video(folder / f"new{i}.mp4", tiny.frames(4))
        read(folder)
    assert len(parts_of(folder / "t.csv.probe", "index")) <= 2
    shutil.rmtree(folder.parent / "cache")
    names.clear()
    results = probe.results_for_table(folder / "t.csv")
    for name in [*(f"{i}.mp4" for i in range(5)), *(f"new{i}.mp4" for i in range(3))]:
        assert results.indices.find(index_cache.key_of(local_range(folder / name))) is not None
        assert open_media(str(folder / name)).info.num_frames
    assert names == []


HOSTILE_HEADERS = {
    "a size that its frames do not have": {"info": {"height": 2**40}},
    "a size of the other way round": {"orientation": [True, False, False]},
    "no rate": {"info": {"fps": float("nan")}},
    "an infinite rate": {"info": {"fps": float("inf")}},
    "pixels without a width": {"info": {"aspect": 0.0}},
    "an unknown pixel format": {"info": {"pixels": "bogus"}},
    "no decoder": {"decoder": None},
    "a decoder of sound": {"decoder": {"codec": "aac"}},
    "an unknown decoder": {"decoder": {"codec": "bogus"}},
    "negative sizes of the decoder": {"decoder": {"numbers": {"width": -1}}},
}


def test_headers_of_indices_that_a_stranger_made_are_not_used(tmp_path):
    tiny.write_video(tmp_path / "0.mp4", tiny.frames(5, 16, 32))
    video = local_range(tmp_path / "0.mp4")
    key, index = index_cache.key_of(video), index_cache.build(video)
    head, _, rows = video_index.pack(key, index)[video_index.CRC_BYTES :].partition(b"\n")
    assert video_index.parse(packed(json.loads(head), rows), key) is not None
    for case, change in HOSTILE_HEADERS.items():
        value = json.loads(head)
        value["header"] = merge(value["header"], change)
        assert video_index.parse(packed(value, rows), key) is None, case
    for times in ([0, 1, 2, 3, math.nan], [0, 1, 2, 1, 4]):
        assert video_index.parse(video_index.pack(key, replace(index, times=np.array(times, float))), key) is None
