"""Tables and JSON lists as people's programs write them."""

from __future__ import annotations

import gzip
import io
import json
import os
import time
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vae3d.data.media import DataError
from vae3d.data.sources.json_clips import JsonClips
from vae3d.data.sources.open_source import open_source
from vae3d.data.sources.table import Table
from vae3d.data.table.rows import absolute_paths

CSV = "path,text,num_frames\na.mp4,ein Café,5\nb.mp4,,\n"
TSV = CSV.replace(",", "\t")
LIST = [{"path": "a.mp4", "text": "ein Café", "frames": 5}, {"path": "b.mp4"}]
LINES = "\n".join(map(json.dumps, LIST)) + "\n\n"


def parquet(columns: list[tuple[str, pa.Array]]) -> bytes:
    names, arrays = zip(*columns, strict=True)
    pq.write_table(pa.Table.from_arrays(arrays, names), sink := io.BytesIO())
    return sink.getvalue()


FILES = {
    "t.csv": CSV.encode(),
    "bom.csv": CSV.encode("utf-8-sig"),
    "crlf.csv": CSV.replace("\n", "\r\n").encode(),
    "T.CSV": CSV.encode(),
    "t.tsv": TSV.encode(),
    "t.csv.gz": gzip.compress(CSV.encode()),
    "T.Tsv.GZ": gzip.compress(TSV.encode()),
    "t.json": json.dumps(LIST).encode(),
    "bom.json": json.dumps({"list": LIST}, ensure_ascii=False).encode("utf-8-sig"),
    "T.JSON": json.dumps(LIST, indent=1).encode(),
    "t.jsonl": LINES.encode(),
    "t.jsonl.gz": gzip.compress(LINES.encode()),
    "bytes.parquet": parquet(
        [  # texts as older writers store them: bytes, not marked as text
            ("path", pa.array([b"a.mp4", b"b.mp4"])),
            ("text", pa.array(["ein Café".encode(), None])),
            ("num_frames", pa.array([5, None])),
        ]
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    for media in ("a.mp4", "b.mp4"):  # a list looks whether they are there
        (tmp_path / media).touch()
    table = open_source(tmp_path / name).table()
    assert table["name"].tolist() == ["a.mp4", "b.mp4"]
    assert table["text"][0] == "ein Café"
    assert pd.isna(table["text"][1])
    assert table["num_frames"][0] == 5
    assert pd.isna(table["num_frames"][1])
    assert not table["error"].notna().any()


@pytest.mark.parametrize("word", ["None", "NA", "null", "nan", "-nan", "N/A", "NaN"])
def test_no_word_stands_for_a_missing_label(tmp_path, word):
    (tmp_path / "t.csv").write_text(f"path,label,text,fps\n{word},{word},{word},{word}\n")
    row = Table(tmp_path / "t.csv").table().iloc[0]
    assert (row["name"], row["label"], row["text"]) == (word, word, word)
    assert pd.isna(row["fps"])  # of a number it does
    assert row["error"] is None


def test_a_row_with_another_number_of_fields_is_named_and_the_others_are_read(tmp_path):
    (tmp_path / "t.csv").write_text('path,text\na.mp4,"a dog, running"\nb.mp4,a dog, running\nc.mp4\n\nd.mp4,x\n')
    table = Table(tmp_path / "t.csv").table()
    assert table["row"].tolist() == [1, 2, 3, 4]
    assert table["text"][0] == "a dog, running"
    assert "3 fields in line 3" in table["error"][1]
    assert '"..."' in table["error"][1]
    assert "1 fields in line 4" in table["error"][2]
    assert table["error"].isna().tolist() == [True, False, False, True]


def test_a_column_more_in_every_row_shifts_nothing(tmp_path):
    """pandas takes the first column for an index then."""
    (tmp_path / "t.csv").write_text("path,text\na.mp4,one, two\nb.mp4,one, two\n")
    assert Table(tmp_path / "t.csv").table()["error"].notna().all()


REFUSED = {
    "latin.csv": ("path,text\na.mp4,x\nb.mp4,Café au lait\n".encode("latin-1"), ["line 3", "WINDOWS-1252", "Café"]),
    "latin.json": ('[{"path": "a.mp4",\n"text": "Café"}]'.encode("latin-1"), ["WINDOWS-1252"]),
    "utf16.csv": (CSV.encode("utf-16"), ["UTF-16"]),
    "binary.csv": (b"\x00\x01\x02\xff\xfe\n" * 9, ["line 1", "not text"]),
    "tar_called.csv": (b"a.mp4" + bytes(507) + b"x" * 512, ["line 1", "not text"]),
    "semicolon.csv": (b"path;text\na.mp4;x\n", ["';'", "','"]),
    "tabs.csv": (TSV.encode(), [r"'\t'"]),
    "quote.csv": (b'path,text\na.mp4,"x\nb.mp4,y\n', ["line 3", "quotation mark"]),
    "twice.csv": (b"path,path\na,b\n", ["two columns `path`"]),
    "headless.csv": (b"a.mp4,x\nb.mp4,y\n", ["no column `path`", "first line"]),
    "cut.csv.gz": (gzip.compress(CSV.encode() * 99)[:-20], ["cut.csv.gz"]),
    "bomb.json.gz": (gzip.compress(b" " * (2**26 + 1), 1), ["bomb.json.gz", "67,108,864 bytes"]),
    "plain.csv.gz": (CSV.encode(), ["plain.csv.gz"]),
    "t.parquet": (b"PAR1 not really", ["not a readable parquet file"]),
    "twice.parquet": (parquet([("path", pa.array(["a"])), ("path", pa.array(["b"]))]), ["two columns `path`"]),
    "binary.parquet": (parquet([("path", pa.array(["a"])), ("text", pa.array([b"\xff"]))]), ["`text`", "not UTF-8"]),
    "bad.jsonl": (b'{"path": "a.mp4"}\n{"path": \n', ["line 2"]),
    "lines.json": (LINES.encode(), ["line 2", ".jsonl"]),
    "deep.json": (b"[" * 100_000, ["deep.json"]),
    "digits.json": (b'[{"path": "a", "start": ' + b"9" * 5000 + b"}]", ["digits.json"]),
    "clips.tar": (b"x", ["damaged"]),
    "clips.zip": (b"x", [".zip", "extract it"]),
    "t.xlsx": (b"x", [".xlsx", ".csv"]),
    "videos": (b"x", ["without extension"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_the_place_and_the_reason(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        open_source(tmp_path / name).table()
    assert all(part in str(error.value) for part in (str(tmp_path / name), *message)), str(error.value)


def test_a_list_given_as_a_table_is_refused_with_the_right_setting(tmp_path):
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(DataError, match="data=json_clips"):
        Table(tmp_path / "t.json").table()


def test_paths_and_numbers_that_cannot_be_are_errors_of_their_rows(tmp_path):
    rows = [
        {"path": "a\0.mp4"},
        {"path": "\ud800.mp4"},
        {"path": "a.mp4", "fps": 10**400},
        {"path": "a.mp4", "fps": 1e999},
        {"path": "a caption in its place " * 20},
    ]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    errors = JsonClips(tmp_path / "t.json").table()["error"]
    assert "NUL" in errors[0]
    assert r'`path` is "\ud800.mp4"' in errors[1]
    assert "`fps`" in errors[2]
    assert "`fps`" in errors[3]
    assert "255 bytes" in errors[4]


def test_a_number_of_any_length_is_an_error_of_its_row(tmp_path):
    (tmp_path / "t.csv").write_text(f"path,fps\na.mp4,{'9' * 400}\nb.mp4,1e999\nc.mp4,24\n")
    table = Table(tmp_path / "t.csv").table()
    assert table["error"].notna().tolist() == [True, True, False]
    assert table["fps"][2] == 24


@pytest.mark.parametrize("root", [Path("/"), Path("/data/a b"), Path("data"), Path("../data"), Path(".")])
def test_paths_are_joined_as_pathlib_and_abspath_join_them(root):
    names = [
        "a.mp4",
        "a/b c.mp4",
        "a//b",
        "./a",
        "../a",
        "..a",
        ".a",
        "a/./b",
        "a/../../b",
        "a/.b",
        "a/b/",
        "a/..",
        ".",
        "",
        "/a/b",
    ]
    names += ["//a/b", "///a", "/a/../b", "/", "/.a/b", "a*b/ü.mp4", "a\\b", "a.", "a/b.."]
    assert absolute_paths(root, names) == [os.path.abspath(root / name) for name in names]


def test_a_million_paths_are_joined_in_a_second():
    names = [f"part{i % 997}/clip {i}.mp4" for i in range(10**5)]
    start = time.process_time()
    absolute_paths(Path("/data"), names)
    assert time.process_time() - start < 0.1
