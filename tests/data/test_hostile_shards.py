"""Tars and indices that a stranger made: each gives a clear error, in bounded time and memory."""

from __future__ import annotations

import itertools
import json
import os
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pytest

from tests import http_server
from tests.data.test_webdataset import samples, write_tar
from vae3d.data.media import DataError
from vae3d.data.sources.webdataset import WebDataset
from vae3d.data.storage import stores
from vae3d.data.storage.stores import StorageError
from vae3d.data.tars.index import INDEX, read_index
from vae3d.data.tars.rows import KEY, media_rows
from vae3d.data.tars.samples import find_shard, samples_of

END = bytes(1024)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (size % 2**95 if size >= 0 else size + 2**96).to_bytes(12, "big")
    block[124] |= 0x80
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(key: str, value: str) -> bytes:
    record = f"{len(key) + len(value) + 5} {key}={value}\n".encode()
    assert len(record) == int(record.split()[0])
    return header("pax", len(record), tarfile.XHDTYPE) + record + bytes(-len(record) % 512)


TARS = {
    "a size below 0, back to an earlier member": header("a.mp4", 0) + header("b.mp4", 0) + header("c.mp4", -1024) + END,
    "a size below 0 in a PAX header": header("a.mp4", 0) + pax("size", "-2048") + header("b.mp4", 4) + bytes(512) + END,
    "a size beyond all files": header("a.mp4", 2**80) + END,
    "a name of a TiB": header("././@LongLink", 2**40, tarfile.GNUTYPE_LONGNAME) + END,
    "a PAX header of a TiB": header("pax", 2**40, tarfile.XHDTYPE) + END,
    "a name of a negative size": header("././@LongLink", -512, tarfile.GNUTYPE_LONGNAME) + END,
    "thousands of PAX headers of one member": pax("path", "a") * 3000 + header("b.mp4", 0) + END,
    # Over whose digits tarfile goes once for each of them, before Python 3.11.10 and 3.12.6 (CVE-2024-6232).
    "a PAX header of digits": header("pax", 2**20, tarfile.XHDTYPE) + b"1" * 2**20 + header("b.mp4", 0) + END,
}


@pytest.mark.parametrize("case", TARS)
def test_a_hostile_header_is_an_error_that_names_the_tar(tmp_path, case):
    (tmp_path / "0.tar").write_bytes(TARS[case])
    with pytest.raises(DataError, match=r"0\.tar is damaged"):
        list(itertools.islice(samples_of(find_shard(str(tmp_path / "0.tar"))), 10))


def test_a_name_of_many_folders_takes_no_time(tmp_path):
    record = b" path=" + b"a/" * 2**18 + b"\n"
    record = b"%d" % (len(record) + 6) + record
    content = header("pax", len(record), tarfile.XHDTYPE) + record + bytes(-len(record) % 512)
    (tmp_path / "0.tar").write_bytes(content + header("a", 0) + header("b.mp4", 0) + END)
    before = time.process_time()
    assert [sample.key for sample in samples_of(find_shard(str(tmp_path / "0.tar")))] == ["b"]
    assert time.process_time() - before < 1


@pytest.mark.parametrize("value", ["1" + "0" * 400, str(2**60 + 1), "1e999", "NaN", "true"])
def test_a_number_that_no_column_holds_is_an_error_of_its_row(tmp_path, value):
    write_tar(tmp_path / "0.tar", [("a.json", f'{{"fps": {value}, "start": 1}}'), ("a.mp4", "x")])
    assert "`fps` of a.json" in media_rows(find_shard(str(tmp_path / "0.tar")))["error"][0].as_py()


def test_many_empty_members_of_one_sample_are_read_in_bounded_time(tmp_path):
    with (tmp_path / "0.tar").open("wb") as file:
        file.writelines(header(f"a.{number}", 0) for number in range(10_000))
        file.write(END)
    with pytest.raises(DataError) as error:
        media_rows(find_shard(str(tmp_path / "0.tar")))
    assert "has no video or image" in str(error.value)
    assert len(str(error.value)) < 5000


def test_a_store_that_does_not_answer_does_not_make_its_tar_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "TRIES", 1)
    write_tar(tmp_path / "0.tar", samples(1))
    with http_server.serve(tmp_path) as store:
        shard = find_shard(f"{store.url}/0.tar")
        store.fault = lambda number, path: 503
        with pytest.raises(StorageError, match="does not answer"):
            list(samples_of(shard))


def test_a_pipe_is_no_shard_and_no_index(tmp_path):
    """To open one waits until something is written to it."""
    for name in ("0.tar", INDEX):
        os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=r"0\.tar is no file"):
        WebDataset(tmp_path / "0.tar").table()
    with pytest.raises(DataError, match="no such file"):
        WebDataset(tmp_path / INDEX).table()


# ---- indices


@pytest.fixture
def index(tmp_path) -> Path:
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", samples(10 * number, num_frames=1))
    WebDataset(tmp_path).table()
    return tmp_path / INDEX


def rewrite(index: Path, change_table=lambda table: table, change_header=lambda header: None) -> None:
    table, header = read_index(index)
    header = json.loads(json.dumps(header))
    change_header(header)
    table = change_table(table.replace_schema_metadata(None)).replace_schema_metadata({KEY: json.dumps(header)})
    with pa.OSFile(f"{index}.new", "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    Path(f"{index}.new").replace(index)


def column(name: str, values: list | pa.Array):
    def changed(table: pa.Table) -> pa.Table:
        array = values if isinstance(values, pa.Array) else pa.array(values)
        return table.set_column(table.column_names.index(name), name, array)

    return changed


def shard_column(numbers: list, names: list[str] = ("0.tar", "1.tar")):
    return column("shard", pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int8()), pa.array(names)))


TABLES = {
    "an offset below 0": column("offset", [-5, 1, 1, 1, 1, 1]),
    "an offset outside of the shard": column("offset", [2**62, 1, 1, 1, 1, 1]),
    "a size below 0": column("size", [-1, 1, 1, 1, 1, 1]),
    "a size outside of the shard": column("size", [2**63 - 1, 1, 1, 1, 1, 1]),
    "an offset that is missing": column("offset", [None, 1, 1, 1, 1, 1]),
    "offsets of another type": column("offset", ["1"] * 6),
    "texts as numbers": column("key", [1, 2, 3, 4, 5, 6]),
    "no column size": lambda table: table.drop_columns("size"),
    "no extension": lambda table: table.drop_columns("extension"),
    "rows of another shard": shard_column([0, 0, 0, 0, 1, 1]),
    "other shards in the column than in the header": shard_column([0, 0, 0, 1, 1, 1], ["1.tar", "0.tar"]),
    "shards as texts": column("shard", ["0.tar"] * 3 + ["1.tar"] * 3),
    "fewer rows": lambda table: table.slice(0, 5),
    "a billion rows without bytes": lambda table: pa.table({name: pa.nulls(10**9) for name in table.column_names}),
}
HEADERS = {
    "no shards": lambda header: header.pop("shards"),
    "shards that are none": lambda header: header.update(shards=[1, 2]),
    "no settings": lambda header: header.update(settings=None),
    "settings of no kind": lambda header: header["settings"].update(kind="programs"),
    "a count below 0": lambda header: header["shards"][0].update(rows=-3),
    "a count of a billion": lambda header: header["shards"][0].update(rows=2**40),
    "a size that is a text": lambda header: header["shards"][0].update(bytes="many"),
}


@pytest.mark.parametrize("case", [*TABLES, *HEADERS])
def test_an_index_that_nobody_can_have_written_is_an_error(index, case):
    rewrite(index, TABLES.get(case, lambda table: table), HEADERS.get(case, lambda header: None))
    with pytest.raises(DataError, match=r"index\.arrow is no index of shards"):
        WebDataset(index).table()


def test_an_index_from_a_store_names_no_file_of_this_machine(index, tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    private = write_tar(tmp_path / "private.tar", samples(50))
    rewrite(index, shard_column([0, 0, 0, 1, 1, 1], ["0.tar", f"file://{private}"]), lambda header: header["shards"][1].update(name=f"file://{private}"))  # fmt: skip
    with http_server.serve(tmp_path) as store, pytest.raises(DataError, match=r"private\.tar"):
        WebDataset(f"{store.url}/{INDEX}").table()


def test_a_run_says_which_shards_an_index_lists_elsewhere(index, tmp_path):
    source = WebDataset(index)
    source.table()
    assert not any("not beside it" in note for note in source.notes)
    rewrite(index, shard_column([0, 0, 0, 1, 1, 1], ["0.tar", "sub/../1.tar"]), lambda header: header["shards"][1].update(name="sub/../1.tar"))  # fmt: skip
    (tmp_path / "sub").mkdir()
    source = WebDataset(index)
    source.table()
    assert any("1 shard" in note and "sub/../1.tar" in note for note in source.notes)


def test_a_remote_index_is_mapped_from_the_cache(index, tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    with http_server.serve(tmp_path) as store:
        before = pa.total_allocated_bytes()
        table, _ = read_index(f"{store.url}/{INDEX}")
        assert table.equals(read_index(index)[0])
        assert pa.total_allocated_bytes() - before < table.nbytes
        assert len(list((tmp_path / "cache/objects").rglob("*.arrow"))) == 1
