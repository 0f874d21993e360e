"""Tar shards: their index, and training from them as from files."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shlex
import shutil
import signal
import tarfile
import threading
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from webdataset import tariterators

from tests import http_server, tiny, warm
from tests.test_train_cli import PYTHON, arguments, trace, wait_for_step
from vae3d.data.batches.batch_schedule import BatchSchedule, FrameCounts
from vae3d.data.batches.clips import ClipDataset, ClipSettings
from vae3d.data.batches.selection import clip_lengths
from vae3d.data.batches.streaming import StreamingData, StreamingSchedule, opened
from vae3d.data.decoding.readers import open_media
from vae3d.data.loader import read_tables
from vae3d.data.media import DataError, MediaError
from vae3d.data.prepared import rows as prepared_rows
from vae3d.data.prepared import table as prepared
from vae3d.data.sources import webdataset
from vae3d.data.sources.folder import Folder
from vae3d.data.sources.image_folder import ImageFolder
from vae3d.data.sources.open_source import open_source
from vae3d.data.sources.table import Table
from vae3d.data.sources.webdataset import WebDataset, is_shards
from vae3d.data.storage import files as storage
from vae3d.data.storage import stores
from vae3d.data.storage.paths import split_member
from vae3d.data.table.fingerprint import fingerprint_of
from vae3d.data.table.probe import Ranks
from vae3d.data.table.row_arrays import table_in_memory
from vae3d.data.tars import rows as tar_rows
from vae3d.data.tars.index import INDEX, Settings, build_index, read_index
from vae3d.data.tars.rows import SCHEMA, media_rows
from vae3d.data.tars.samples import Shard, find_shard, samples_of
from vae3d.io import FileError

DRAWS, BATCH = 1000, 20
SETTINGS = ClipSettings(16, 16, crop="random", flip=True)
Members = Iterable[tuple[str, bytes | str]]


def write_tar(path: Path, members: Members, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(first: int, count: int = 3, **values: object) -> list[tuple[str, bytes | str]]:
    found = []
    for number in range(first, first + count):
        found += [(f"{number:04d}.json", json.dumps(values | {"label": number})), (f"{number:04d}.mp4", b"v" * number)]
    return found


@pytest.fixture(scope="module")
def table(videos, tmp_path_factory) -> Path:
    """The table of `videos`, with texts, labels and splits."""
    rows = pd.read_csv(videos)
    rows["path"] = [str(videos.parent / name) for name in rows["path"]]
    rows["text"] = [f"a caption, {row}" if row % 3 else None for row in range(len(rows))]
    rows["label"] = [f"c{row % 4}" for row in range(len(rows))]
    rows["split"] = ["val" if row == 4 else "train" for row in range(len(rows))]
    file = tmp_path_factory.mktemp("table") / "videos.csv"
    rows.to_csv(file, index=False)
    return file


@pytest.fixture(scope="module")
def shards(table, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "shards"
    assert tiny.status("make-shards", table, folder, "--samples", 5, "--probe") == 0
    return folder


def training_data(source) -> tuple[pd.DataFrame, BatchSchedule]:
    table = read_tables(source, SETTINGS, 1, 0.0).train
    return table, BatchSchedule(clip_lengths(table, SETTINGS), FrameCounts(1, 3), seed=3, batch_size=BATCH)


def draws(source, first: int = 0, count: int = DRAWS, ranks: int = 1) -> list[bytes]:
    """The bytes of the clips of the steps from `first` on, of all ranks, in the order of their positions."""
    table = read_tables(source, SETTINGS, 1, 0.0).train
    clips = {}
    for rank in range(ranks):
        frames = FrameCounts(1, 3)
        schedule = BatchSchedule(
            clip_lengths(table, SETTINGS), frames, seed=3, batch_size=BATCH, rank=rank, world_size=ranks
        )
        dataset = ClipDataset(table, schedule, SETTINGS)
        for batch in schedule.micro_batches(first, first + count // BATCH):
            for index in batch:
                sample = dataset[index]
                assert not sample.errors
                clips[index.position] = sample.video.numpy().tobytes()
    assert len(clips) == count
    return [clips[position] for position in sorted(clips)]


@pytest.fixture(scope="module")
def from_files(table) -> list[bytes]:
    return draws(Table(table))


@pytest.mark.smoke
def test_a_thousand_draws_from_tars_are_those_of_files(table, shards, from_files):
    assert draws(WebDataset(f"{shards}/{{000000..000002}}.tar")) == from_files
    ours, theirs = (read_tables(s, SETTINGS, 1, 0.0, stat_files=True) for s in (WebDataset(shards), Table(table)))
    assert ours.fingerprint.digests() == theirs.fingerprint.digests()
    assert ours.fingerprint.files[:, 0].tolist() == theirs.fingerprint.files[:, 0].tolist()
    assert ours.train["text"].tolist() == theirs.train["text"].tolist()


def test_a_thousand_draws_over_http_with_a_tenth_of_the_requests_failing_are_those_of_files(
    shards, from_files, tmp_path, monkeypatch
):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path))
    monkeypatch.setenv("VAE3D_CACHE_GIB", str(40_000 / 2**30))  # of 12 members of 4 to 7 kB
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.001)
    copy = shutil.copytree(shards, tmp_path / "served", ignore=shutil.ignore_patterns(INDEX))
    with http_server.serve(copy) as store:
        store.fail_every(10, 503, http_server.RESET, http_server.SHORT, 429)
        source = WebDataset(f"{store.url}/{{000000..000002}}.tar")
        assert draws(source, count=200) == from_files[:200]
        assert sum(file.stat().st_size for file in (tmp_path / "objects").glob("??/*")) <= 40_000
        monkeypatch.delenv("VAE3D_CACHE_GIB")
        assert draws(source) == from_files
        assert min(store.faults.values()) > 1
        assert len(store.faults) == 4
        before = len(store.requests)
        again = WebDataset(f"{store.url}/{{000000..000002}}.tar")
        assert len(again.table()) == 12
        assert len(store.requests) - before < 12  # the index is in the cache
    assert len(list((tmp_path / "shards").glob("*.arrow"))) == 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_other_numbers_of_ranks_go_on_with_the_same_clips(shards, from_files, ranks):
    assert draws(WebDataset(shards), first=20, count=200, ranks=ranks) == from_files[400:600]


def test_an_index_at_the_url_of_a_folder_is_used(shards, table):
    with http_server.serve(shards) as store:
        source = open_source(f"{store.url}/{INDEX}")
        assert source.table()["path"][0].startswith(f"{store.url}/000000.tar@")
        for source in (WebDataset(f"{store.url}/"), open_source(store.url)):  # of training, and of other commands
            assert len(source.table()) == len(pd.read_csv(table))


def test_tars_at_a_url_without_an_index_need_a_pattern(tmp_path):
    write_tar(tmp_path / "0.tar", samples(1))
    with (
        http_server.serve(tmp_path) as store,
        pytest.raises(DataError, match=r"a pattern, such as \{000\.\.999\}\.tar"),
    ):
        open_source(store.url).table()


def test_a_run_killed_in_the_middle_goes_on_bit_for_bit_as_from_files(table, shards, tmp_path):
    steps = 8
    more = [
        "stage=finetune", "stage.init_from=random", "loss=recon_kl", "data.frames.min=1", "data.frames.max=1",
        "data.batch_size=4", "data.crop=random", f"trainer.max_steps={steps}", "data.workers=1",
    ]  # fmt: skip
    words = arguments(table, tmp_path, "files", *more, model="spatial")
    assert (done := tiny.run(*PYTHON, *words, cwd=tmp_path)).returncode == 0, done.stdout
    with http_server.serve(shards) as store:
        store.fail_every(10, http_server.RESET, 503)
        path = f"{store.url}/{{000000..000002}}.tar"
        words = arguments(path, tmp_path, "tars", "data=webdataset", *more, model="spatial")
        with open(os.devnull, "w") as output:
            job = warm.Job([*PYTHON, *words], tmp_path, tiny.rank_environments(1), [output.fileno()])
        wait_for_step(job, tmp_path / "tars", random.randint(3, steps - 3))
        job.signal(signal.SIGKILL)
        job.wait()
        assert (done := tiny.run(*PYTHON, *words, cwd=tmp_path)).returncode == 0, done.stdout
    launches = (tmp_path / "tars/launches.jsonl").read_text().splitlines()
    assert 0 < json.loads(launches[1])["step"] < steps
    assert trace(tmp_path / "tars") == trace(tmp_path / "files")


# ---- the index

NAMES = [
    "a/b.mp4",
    "a/b.json",
    "x.y/z.w.png",
    "./q.jpg",
    "a.b.c/d.E.MP4",
    "é.webp",
    "n" * 150 + "/k.mp4",
    "d/../up.mp4",
]
SKIPPED = ["README", "a/.hidden.mp4", "__meta__/x.mp4", "a/._z.mp4"]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_samples_are_those_of_webdataset(tmp_path, format):
    names = [*NAMES[:2], *SKIPPED, *NAMES[2:]]
    tar = write_tar(tmp_path / "0.tar", [(name, name) for name in names], format)
    with tar.open("rb") as stream:
        files = [{"__url__": "", **file} for file in tariterators.tar_file_iterator(stream)]
    expected = [dict(sample) for sample in tariterators.group_by_keys(files)]
    expected = [sample for sample in expected if not sample["__key__"].endswith("/")]  # of hidden files in folders
    found = list(samples_of(find_shard(str(tar))))
    assert [sample.key for sample in found] == [sample["__key__"] for sample in expected]
    content = tar.read_bytes()
    for ours, theirs in zip(found, expected, strict=True):
        members = {name: content[m.offset : m.offset + m.size] for name, m in ours.members.items()}
        assert members == {name: data for name, data in theirs.items() if not name.startswith("__")}


def test_sidecars_give_the_columns_of_a_table(tmp_path):
    values = {"num_frames": 9, "height": 4, "width": 6, "fps": 29.97, "caption": "two\nlines", "label": 7, "other": [1]}
    members = [
        ("0.json", json.dumps(values)), ("0.mp4", "x"),
        ("1.cls", "\ufeff12\n"), ("1.jpg", "x"), ("1.txt", "\ufeffa text"),
        ("2.json", "\ufeff" + json.dumps({"start": 1, "end": 2.5, "split": "val", "text": "t", "caption": "c", "fps": None})), ("2.mkv", "x"),
        ("3.json", '{"height": "4"}'), ("3.mp4", "x"), ("4.json", "[1]"), ("4.mp4", "x"), ("5.mp4", ""),
        ("6.json", '{"split": "all"}'), ("6.mp4", "x"), ("7.json", '{"start": 2, "end": 1}'), ("7.mp4", "x"), ("8.json", "{"), ("8.mp4", "x"),
    ]  # fmt: skip
    write_tar(tmp_path / "0.tar", members)
    table = WebDataset(tmp_path / "0.tar").table()
    assert table.loc[0, ["num_frames", "height", "width", "fps", "text", "label"]].tolist() == [
        9,
        4,
        6,
        29.97,
        "two\nlines",
        7,
    ]
    assert table.loc[1, ["text", "label"]].tolist() == ["a text", 12]
    assert table.loc[2, ["start", "end", "split", "text"]].tolist() == [1, 2.5, "val", "t"]
    assert table["error"].isna().tolist() == [True] * 3 + [False] * 6
    assert "`height` of 3.json" in table["error"][3]
    assert "`split` of 6.json" in table["error"][6]
    assert "0 bytes" in table["error"][5]
    assert table["name"].tolist() == [f"{row}.{kind}" for row, kind in enumerate(["mp4", "jpg", "mkv", *["mp4"] * 6])]


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def link(path: Path, kind: bytes) -> None:
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("x.mp4")
        info.type, info.linkname = kind, "0001.mp4"
        tar.addfile(info)


def joined(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(2**20) + path.read_bytes())


def replaced(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new))


MALFORMED = {
    "empty": (lambda path: cut(path, 0), "0 bytes"),
    "cut in a header": (lambda path: cut(path, 1536 + 100), "truncated"),
    "cut in a content": (lambda path: cut(path, 512 + 5), "truncated"),
    "cut between members": (lambda path: cut(path, 1024), "truncated: it ends at byte 1024"),
    "overwritten header": (lambda path: replaced(path, b"0002.json", b"XXXX.json"), "damaged"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), "compressed (gzip)"),
    "joined": (joined, "several tars"),
    "joined and small": (lambda path: path.write_bytes(2 * path.read_bytes()), "several tars"),
    "symbolic link": (lambda path: link(path, tarfile.SYMTYPE), "x.mp4 is a link"),
    "hard link": (lambda path: link(path, tarfile.LNKTYPE), "x.mp4 is a link"),
    "pipe": (lambda path: link(path, tarfile.FIFOTYPE), "x.mp4 is no file"),
    "no media": (lambda path: write_tar(path, [("a.json", "{}"), ("b.mp4", "x")]), "the sample a has no video or image"),
    "two media": (lambda path: write_tar(path, [("a.mp4", "x"), ("a.jpg", "x")]), "--media mp4"),
    "twice": (lambda path: write_tar(path, [("a.mp4", "x"), ("a.mp4", "x")]), "a.mp4 twice"),
    "apart": (lambda path: write_tar(path, [("a.mp4", "x"), ("b.mp4", "x"), ("a.mp4", "y")]), "the key a twice"),
    "no tar": (lambda path: path.write_bytes(b"x" * 5000), "damaged"),
    "no samples": (lambda path: write_tar(path, [("README", "x")]), "no samples"),
    "not UTF-8": (lambda path: write_surrogate(path), "not UTF-8"),
}  # fmt: skip


def write_surrogate(path: Path) -> None:
    write_tar(path, [("00\udcff2.mp4", "x")], tarfile.GNU_FORMAT)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_tars_are_errors_that_name_them(tmp_path, name):
    damage, message = MALFORMED[name]
    tar = write_tar(tmp_path / "0.tar", samples(1))
    damage(tar)
    with pytest.raises(DataError) as error:
        WebDataset(tar).table()
    assert str(error.value).count(str(tar)) == 1
    assert message in str(error.value)


@pytest.mark.parametrize("pattern", ["a.mp4", "*"])
def test_a_file_of_another_name_is_no_shard(tmp_path, pattern):
    write_tar(tmp_path / "0.tar", samples(1))
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=rf"^{tmp_path / 'a.mp4'} is no tar"):
        WebDataset(tmp_path / pattern).table()


def test_a_sparse_member_is_an_error(tmp_path):
    info = tarfile.TarInfo("a.mp4")
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "a.mp4",
        "GNU.sparse.realsize": "9",
    }
    content = b"1\n0\n9\n".ljust(512, b"\0") + b"123456789"
    info.size = len(content)
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match=r"a\.mp4 is a sparse member"):
        WebDataset(tmp_path / "0.tar").table()


def test_an_index_without_shards_is_an_error_that_names_it(tmp_path):
    write_tar(tmp_path / "0.tar", samples(1))
    WebDataset(tmp_path).table()
    table, header = read_index(tmp_path / INDEX)
    table = table.slice(0, 0).replace_schema_metadata({tar_rows.KEY: json.dumps({**header, "shards": []})})
    with pa.ipc.new_file(str(tmp_path / "none.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=rf"{tmp_path}/none\.arrow has no samples"):
        WebDataset(tmp_path / "none.arrow").table()


def test_a_key_in_two_shards_names_both(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", samples(7))
    with pytest.raises(DataError, match=r"0\.tar and .*1\.tar both have the key 0007 \(3 keys in all\)"):
        WebDataset(tmp_path).table()


def test_compressed_tars_are_refused_by_name(tmp_path):
    assert is_shards(tmp_path / "x.tar.gz")
    write_tar(tmp_path / "0.tar", samples(1))
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    with pytest.raises(DataError, match=r"x\.tar\.gz is compressed"):
        open_source(tmp_path / "x.tar.gz").table()


def test_the_member_to_read_can_be_chosen(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.thumb.jpg", "jj"), ("a.mp4", "v"), ("b.mp4", "vv"), ("b.thumb.jpg", "j")])
    for media, sizes in (("mp4", [1, 2]), (".THUMB.jpg", [2, 1])):
        found = WebDataset(tmp_path / "0.tar", media=media).table()["path"]
        assert [split_member(path)[2] for path in found] == sizes
    with pytest.raises(DataError, match=r"no member \.mkv"):
        WebDataset(tmp_path / "0.tar", media="mkv").table()


def counting(monkeypatch) -> list[str]:
    read = []
    scan = tar_rows.samples_of
    monkeypatch.setattr(tar_rows, "samples_of", lambda shard: read.append(Path(shard.path).name) or scan(shard))
    return read


def test_an_index_is_resumed_and_only_what_changed_is_read_again(tmp_path, monkeypatch):
    read = counting(monkeypatch)
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", samples(10 * number + 1, label=number))
    cut(tmp_path / "2.tar", 700)
    out = tmp_path / INDEX

    def build() -> pa.Table:
        read.clear()
        return build_index([find_shard(str(tar)) for tar in sorted(tmp_path.glob("*.tar"))], out, Settings())

    with pytest.raises(DataError, match=r"1 of 4 shards cannot be indexed:\n.*2\.tar"):
        build()
    assert sorted(read) == ["0.tar", "1.tar", "2.tar", "3.tar"]
    write_tar(tmp_path / "2.tar", samples(21))
    first = build()
    assert read == ["2.tar"]
    assert not list(tmp_path.glob("*.parts"))
    assert build().equals(first)
    assert read == []
    write_tar(tmp_path / "1.tar", samples(11, 5))
    assert build()["key"].to_pylist() == [
        f"{10 * n + 1 + i:04d}" for n, count in enumerate((3, 5, 3, 3)) for i in range(count)
    ]
    assert read == ["1.tar"]
    ours = build()
    out.unlink()
    assert build().equals(ours)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tar: os.utime(tar, (1, 1)), "has another modification time"),
        (lambda tar: cut(tar, 1000), "has 1000 bytes; it had"),
        (lambda tar: tar.unlink(), "no such file"),
    ],
)
def test_a_changed_shard_is_named_when_a_run_starts(tmp_path, damage, message):
    (tmp_path := tmp_path / "my shards").mkdir()
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", samples(10 * number + 1))
    table = WebDataset(tmp_path).table()
    assert len(table) == 9
    damage(tmp_path / "1.tar")
    with pytest.raises(DataError) as error:
        WebDataset(tmp_path / INDEX).table()
    assert f"{tmp_path}/1.tar {message}" in str(error.value)
    assert f"vae3d index {shlex.quote(str(tmp_path))} " in str(error.value)
    others = WebDataset([str(tmp_path / "0.tar"), str(tmp_path / "2.tar")]).table()
    assert others["path"].tolist() == [path for path in table["path"] if "/1.tar" not in path]


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/0.tar", samples(1))
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("tars"))
    first = WebDataset(tmp_path / "tars").table()
    assert not (tmp_path / "tars" / INDEX).exists()
    read = counting(monkeypatch)
    assert WebDataset(tmp_path / "tars").table().equals(first)
    assert read == []


def test_two_machines_that_index_the_same_shards_at_once_do_not_disturb_each_other(plain, tmp_path, monkeypatch):
    copy = shutil.copytree(plain, tmp_path / "copy", ignore=shutil.ignore_patterns(INDEX))
    monkeypatch.setattr(webdataset, "processor_count", lambda: 1)
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "one"))
    found = []

    def scan(shard: Shard) -> pa.Table:
        if Path(shard.path).name == "000002.tar":  # the other machine begins and ends meanwhile
            monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "other"))
            found.append(webdataset.open_shard_index([str(copy)], Settings())[0])
        return media_rows(shard)

    found.append(webdataset.open_shard_index([str(copy)], Settings(), scan=scan)[0])
    assert found[0].equals(found[1])
    assert (copy / INDEX).is_file()
    assert not list(tmp_path.rglob("*.parts"))


def killed(shard: Shard) -> pa.Table:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_while_it_indexes_is_an_error_with_the_usual_reason(tmp_path):
    shards = [find_shard(str(write_tar(tmp_path / f"{number}.tar", samples(number)))) for number in range(2)]
    with pytest.raises(DataError, match="memory"):
        build_index(shards, tmp_path / INDEX, Settings(), scan=killed, workers=2)


def test_two_processes_that_write_an_index_at_once_both_have_it(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", samples(10 * number + 1))
    shards = [find_shard(str(tar)) for tar in sorted(tmp_path.glob("*.tar"))]
    others: list[threading.Thread] = []
    found: list[pa.Table] = []

    def build(scan=media_rows) -> None:
        found.append(build_index(shards, tmp_path / INDEX, Settings(), scan=scan))

    def scan(shard: Shard) -> pa.Table:
        if Path(shard.path).name == "1.tar":  # the other begins meanwhile
            others.append(threading.Thread(target=build))
            others[0].start()
            others[0].join(0.2)
        return media_rows(shard)

    build(scan)
    others[0].join()
    assert found[0].equals(found[1])
    assert len(read_index(tmp_path / INDEX)[0]) == 9


def test_a_folder_that_is_not_there_and_a_cache_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="typo: no such file"):
        WebDataset(tmp_path / "typo").table()
    tar = write_tar(tmp_path / "0.tar", samples(1))
    (tmp_path / "file").touch()
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "file"))
    with pytest.raises(FileError, match=r"file/shards cannot be written .* set VAE3D_CACHE"):
        build_index([find_shard(str(tar))], tmp_path / INDEX, Settings())


def test_the_folder_of_an_index_is_made_and_tried_before_shards_are_read(tmp_path):
    tar = write_tar(tmp_path / "0.tar", samples(1))
    assert len(build_index([find_shard(str(tar))], tmp_path / "a/b" / INDEX, Settings())) == 3
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"file/index\.arrow: cannot be written"):
        build_index([find_shard(str(tar))], tmp_path / "file" / INDEX, Settings(), scan=pytest.fail)


def test_headers_of_remote_shards_are_read_in_few_ranges(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tars").mkdir()
    members = [(f"{n:03d}.{kind}", size) for n in range(40) for kind, size in (("mp4", b"x" * 30_000), ("txt", b"t"))]
    write_tar(tmp_path / "tars/0.tar", members)
    with http_server.serve(tmp_path / "tars") as store:
        shard = find_shard(f"{store.url}/0.tar")
        store.requests.clear()
        rows = media_rows(shard)
        assert rows.equals(media_rows(find_shard(str(tmp_path / "tars/0.tar"))))
        assert len(store.requests) <= 4  # 1.2 MB in blocks of 512 KiB
        assert rows["text"].to_pylist() == ["t"] * 40


def test_an_index_of_a_million_samples_has_less_than_64_mib(tmp_path, monkeypatch):
    """Per sample, with numbers, labels and splits."""
    shards = [Shard(f"{tmp_path}/{number:06d}.tar", 10**11, "mtime:1") for number in range(20)]
    columns = dict.fromkeys(SCHEMA.names)

    def rows(shard: Shard) -> pa.Table:
        first, count = 1000 * shards.index(shard), 1000
        numbers = np.arange(first, first + count)
        values = {"offset": numbers * 1_000_000, "size": numbers + 10**6, "key": [f"{n:09d}" for n in numbers]}
        values |= {
            "extension": ["mp4"] * count,
            "num_frames": numbers % 300 + 1,
            "height": [720] * count,
            "width": [1280] * count,
        }
        values |= {"fps": [29.97] * count, "label": [str(n % 400) for n in numbers], "split": ["train"] * count}
        filled = [values.get(name, [None] * count) for name in columns]
        table = pa.table([pa.array(v, f.type) for v, f in zip(filled, SCHEMA, strict=True)], SCHEMA)
        return table.replace_schema_metadata({tar_rows.KEY: '{"integer_labels": true}'})

    build_index(shards, tmp_path / INDEX, Settings(), scan=rows)
    assert (tmp_path / INDEX).stat().st_size * 50 < 64 * 2**20
    table, header = read_index(tmp_path / INDEX)
    assert len(table) == 20_000
    assert header["integer_labels"]
    assert table.slice(19_999, 1).drop_columns("shard").to_pylist()[0]["key"] == "000019999"


# ---- the source


def test_sources_of_shards_are_recognised(shards, table, tmp_path):
    assert isinstance(open_source(shards), WebDataset)
    assert isinstance(open_source(shards / "000000.tar"), WebDataset)
    assert isinstance(open_source(f"{shards}/{{000000..000002}}.tar"), WebDataset)
    assert len(open_source(f"{shards}/*.tar").table()) == 12
    assert not is_shards(table.parent)
    write_tar(tmp_path / "0.tar", samples(1))
    assert isinstance(open_source(tmp_path), WebDataset)
    shutil.copy(shards.parent / "shards/000000.tar", tmp_path / "a.mp4")
    assert isinstance(open_source(tmp_path), Folder)
    with pytest.raises(DataError, match="data=webdataset"):
        Folder(shards / "000000.tar").table()
    with pytest.raises(DataError, match=r"000003\.tar: no such file"):
        open_source(f"{shards}/{{000000..000003}}.tar").table()
    with pytest.raises(DataError, match="listed twice"):
        WebDataset([str(shards / "000000.tar"), str(shards / "*.tar")], index=str(tmp_path / "none.arrow")).table()
    assert len(ImageFolder(shards).table()) == 2


def test_a_tar_is_looked_up_once_for_all_its_rows(shards, monkeypatch):
    rows = table_in_memory(WebDataset(shards).table())
    seen, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, *a, **k: seen.append(str(path)) or stat(path, *a, **k))
    fingerprint_of(rows, rows.numbers("facts"))
    assert sorted(path for path in seen if path.endswith(".tar")) == [str(shards / f"{n:06d}.tar") for n in range(3)]


def test_shards_for_validation_can_be_named(shards, monkeypatch):
    listed, list_shards = [], webdataset.list_shards
    monkeypatch.setattr(webdataset, "list_shards", lambda path: listed.append(path) or list_shards(path))
    source = WebDataset(f"{shards}/{{000000..000001}}.tar", val_path=str(shards / "000002.tar"))
    table = source.table()
    assert len(source.stream("train").paths) == 2
    assert source.stream("val").paths == [str(shards / "000002.tar")]
    assert listed.count(str(shards / "000002.tar")) == 1
    assert table["split"].tolist() == ["train"] * 10 + ["val"] * 2
    assert table["row"].tolist() == list(range(1, 13))
    assert len(source.notes) == 2


def shards_of(paths: Iterable[str]) -> list[str]:
    """Names of the tars of rows, each once, in order."""
    return list(dict.fromkeys(Path(split_member(path)[0]).name for path in paths))


@pytest.mark.parametrize("path", ["*.tar", INDEX, "."])
def test_shards_for_validation_are_not_trained_on(shards, path):
    source = WebDataset(str(shards / path), val_path=str(shards / "000002.tar"))
    table = source.table()
    assert shards_of(table["path"][table["split"] == "train"]) == ["000000.tar", "000001.tar"]
    assert shards_of(table["path"][table["split"] == "val"]) == ["000002.tar"]
    source = WebDataset(str(shards / path), val_path=str(shards / "000002.tar"), streaming=True)
    assert [Path(tar).name for tar in source.stream("train").paths] == ["000000.tar", "000001.tar"]
    source = WebDataset(str(shards / path), val_path=str(shards / "*.tar"))
    for read in (source.table, lambda: source.stream("train")):
        with pytest.raises(DataError, match=r"data\.source\.val_path"):
            read()


def test_shards_for_validation_are_known_through_a_link(shards, tmp_path):
    (tmp_path / "link").symlink_to(shards)
    source = WebDataset(str(shards / "*.tar"), val_path=str(tmp_path / "link/000002.tar"))
    table = source.table()
    assert not set(table["name"][table["split"] == "val"]) & set(table["name"][table["split"] == "train"])


def test_shards_for_validation_at_a_url_with_an_index_are_not_trained_on(shards):
    with http_server.serve(shards) as store:
        source = WebDataset(store.url, val_path=f"{store.url}/000002.tar")
        assert source.table()["split"].tolist() == ["train"] * 10 + ["val"] * 2
        assert len(WebDataset(store.url, streaming=True).stream("train").paths) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_a_shard_that_is_listed_twice_is_an_error_also_with_an_index(shards, streaming):
    source = WebDataset([str(shards / f"{n:06d}.tar") for n in (0, 0, 1)], streaming=streaming)
    with pytest.raises(DataError, match=r"000000\.tar is listed twice"):
        source.stream("train") if streaming else source.table()


# ---- streams


@pytest.fixture(scope="module")
def plain(videos, tmp_path_factory) -> Path:
    """Shards without splits."""
    folder = tmp_path_factory.mktemp("plain") / "shards"
    assert tiny.status("make-shards", videos, folder, "--samples", 3) == 0
    return folder


def test_a_stream_gives_the_files_in_order(videos, plain, tmp_path, monkeypatch):
    files = [videos.parent / name for name in pd.read_csv(videos)["path"]]
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.001)
    with http_server.serve(plain) as store:
        store.fail_every(5, 503, http_server.RESET, http_server.SHORT)
        for path in (str(plain), f"{store.url}/{{000000..000003}}.tar"):
            stream = WebDataset(path, streaming=True).stream("train")
            assert stream.shards == 4
            found = [item for shard in range(4) for item in stream.read(shard)]
            assert [item.content for item in found] == [file.read_bytes() for file in files]
            assert [item.kind for item in found] == ["video"] * 10 + ["image"] * 2
            assert list(stream.read(1, 2)) == found[5:6]
            with opened(found[0], SETTINGS) as ours, closing(open_media(files[0])) as theirs:
                assert np.array_equal(ours.read([3]), theirs.read([3]))
    assert not list(plain.glob("*.parts"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_gives_the_same_clips(plain, workers):
    def data(positions=None) -> StreamingData:
        stream = WebDataset(plain, streaming=True).stream("train")
        found = StreamingData(stream, StreamingSchedule(FrameCounts(1, 1), 3, 4), SETTINGS, 2, workers, 2, [], [])
        found.positions = positions or found.positions
        return found

    whole, batches, positions = [], (run := data()).clips(0, 5), None
    for step in range(5):
        whole.append(next(batches))
        positions = run.positions_at(step) if step == 3 else positions
    again = list(data(positions).clips(3, 5))
    assert [batch.paths for batch in again] == [batch.paths for batch in whole[3:]]
    assert all(torch.equal(one.video, two.video) for one, two in zip(again, whole[3:], strict=True))


def test_what_a_stream_cannot_do_is_an_error(shards, tmp_path):
    stream = WebDataset(shards, streaming=True)
    with pytest.raises(DataError, match="streaming=false"):
        stream.table()
    assert stream.stream("val") is None
    with pytest.raises(DataError, match=r"0000000\d\d has split=val.*data\.source\.val_path"):
        [item for shard in range(3) for item in stream.stream("train").read(shard)]
    write_tar(tmp_path / "0.tar", samples(1, start=1.5))
    with pytest.raises(DataError, match=r"0001 is a part of its file"):
        next(WebDataset(tmp_path, streaming=True).stream("train").read(0))
    write_tar(tmp_path / "0.tar", samples(1, height="x"))
    item = next(WebDataset(tmp_path, streaming=True).stream("train").read(0))
    with pytest.raises(MediaError, match=r"0001\.mp4: `height` of 0001\.json"), opened(item, SETTINGS):
        pass
    with pytest.raises(DataError, match=r"data\.source\.shuffle=0"):
        WebDataset(tmp_path, streaming=True, shuffle=0)


def test_an_index_elsewhere_and_streams_of_an_index(plain, tmp_path, monkeypatch):
    copy = shutil.copytree(plain, tmp_path / "copy", ignore=shutil.ignore_patterns(INDEX))
    monkeypatch.chdir(tmp_path)
    source = WebDataset("copy/{000000..000003}.tar", index="own.arrow")
    assert len(source.table()) == 12
    assert (tmp_path / "own.arrow").is_file()
    assert not (copy / INDEX).exists()
    assert WebDataset("own.arrow").table().equals(source.table())
    assert tiny.status("index", copy, "--out", "other.arrow") == 0
    assert read_index("other.arrow")[0].equals(read_index("own.arrow")[0])
    assert WebDataset("own.arrow", streaming=True).stream("train").paths == sorted(map(str, copy.glob("*.tar")))
    with pytest.raises(DataError, match="no index of shards"):
        WebDataset(shutil.copy(copy / "000000.tar", "tar.arrow")).table()


@pytest.fixture(scope="module")
def bucket(plain, s3):
    """The shards, without their index, in the bucket `shards` of an S3 server on this machine."""
    system = s3("shards")
    for file in plain.glob("*.tar"):
        system.pipe_file(f"shards/{file.name}", file.read_bytes())
    return "s3://shards"


def test_shards_in_s3_are_listed_indexed_and_read(bucket, plain, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path))
    local = WebDataset(plain).table()
    for path in (bucket, f"{bucket}/*.tar", f"{bucket}/{{000000..000003}}.tar"):
        table = WebDataset(path).table()
        assert table["path"].tolist() == [f"{bucket}/{found.rpartition('/shards/')[2]}" for found in local["path"]]
    chosen = [0, 7, 11]
    for ours, theirs in zip(table["path"].iloc[chosen], local["path"].iloc[chosen], strict=True):
        assert storage.local_range(ours).read() == storage.local_range(theirs).read()
    stream = WebDataset(bucket, streaming=True).stream("train")
    assert [item.content for item in stream.read(3)] == [storage.local_range(path).read() for path in local["path"][9:]]
    assert tiny.status("index", bucket) == 0
    [index] = (tmp_path / "shards").glob("*.arrow")
    assert str(index) in capsys.readouterr().out
    with pytest.raises(DataError, match="s3://none"):
        WebDataset("s3://none/0.tar").table()


@pytest.mark.parametrize("val", [False, True])
def test_large_indices_are_prepared_once_and_give_the_same_clips(shards, plain, tmp_path, monkeypatch, val):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path))
    path = f"{plain}/{{000001..000003}}.tar" if val else str(shards)
    arguments = {"val_path": f"{plain}/000000.tar"} if val else {}
    small = read_tables(WebDataset(path, **arguments), SETTINGS, 1, 0.0)
    monkeypatch.setattr(prepared, "LARGE", 5)
    for _ in range(2):
        source = WebDataset(path, **arguments)
        large = read_tables(source, SETTINGS, 1, 0.0)
        for ours, theirs in ((large.train, small.train), (large.val, small.val)):
            assert ours.to_pandas()[["path", "name"]].equals(theirs.to_pandas()[["path", "name"]])
            assert ours.numbers("num_frames").tolist() == theirs.numbers("num_frames").tolist()
        assert large.notes == small.notes
        assert len(list((tmp_path / "tables").glob("*/table.arrow"))) == 1
        monkeypatch.setattr(prepared_rows, "_write", None)


def test_a_tar_that_arrives_later_is_used_though_its_index_was_prepared_before(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepared, "LARGE", 2)
    copy = shutil.copytree(shards, tmp_path / "copy")
    late = (copy / "000002.tar").rename(tmp_path / "late.tar")
    counts = []
    for arrived in (False, True):
        if arrived:
            late.rename(copy / "000002.tar")
        large, _ = prepared.find_large(WebDataset(str(copy / "*.tar")), Ranks())
        counts.append(len(prepared.prepare(large)))
    assert counts == [10, 12]
