"""Files of tars and of stores: the same bytes as a local file, whatever the network does, and errors that name them."""

from __future__ import annotations

import errno
import gzip
import io
import multiprocessing
import os
import tarfile
import threading
import time
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from tests import tiny
from tests.http_server import NO_RANGE, RESET, SHORT, SLOW, Store, serve
from vae3d.config.check import path_issues
from vae3d.data.decoding.index_cache import open_index
from vae3d.data.decoding.kept_sources import _kept, close_kept_sources
from vae3d.data.decoding.readers import is_image, media_info, open_media
from vae3d.data.media import DataError, MediaError
from vae3d.data.sources.folder import Folder
from vae3d.data.sources.open_source import open_source
from vae3d.data.sources.table import Table
from vae3d.data.sources.webdataset import list_shards
from vae3d.data.storage import files as storage
from vae3d.data.storage import object_cache, paths, stores
from vae3d.data.storage.files import local_range, open_range
from vae3d.data.storage.paths import member_path
from vae3d.data.storage.stores import StorageError
from vae3d.data.table.probe import fill_metadata
from vae3d.data.table.rows import mark_missing_files
from vae3d.data.table.versions import file_stamp, source_version
from vae3d.data.workers import load
from vae3d.inference.reconstruct import identifier

NAMES = ["clip.mp4", "stream.ts", "photo.png", "photo.jpg"]
PLACES = ["tar", "http", "http tar", "s3", "s3 tar"]
HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two videos, of which the demuxer must read one, and two images; and 0.tar with them, in the folder `clips`."""
    folder = tmp_path_factory.mktemp("files")
    pixels = tiny.frames(24, 32, 40)
    for name in NAMES[:2]:
        tiny.write_video(folder / name, pixels, bf="3", g="8")
    for name in NAMES[2:]:
        Image.fromarray(pixels[0]).save(folder / name)
    write_tar(folder / "0.tar", {f"clips/{name}": (folder / name).read_bytes() for name in NAMES})
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def members_of(tar: Path, address: str | None = None) -> dict[str, str]:
    """Name in the tar -> path of the member. address: of the tar, if it is elsewhere."""
    with tarfile.open(tar) as opened:
        return {each.name: member_path(address or tar, each.offset_data, each.size, each.name) for each in opened}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no waiting between two tries."""
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.001)
    stores.forget_versions()
    stores.retries.clear()
    close_kept_sources()
    return tmp_path / "cache"


@pytest.fixture
def store(files, cache):
    with serve(files) as server:
        yield server


@pytest.fixture(scope="module")
def bucket(files, s3):
    """The same files in the bucket `data` of an S3 server on this machine."""
    system = s3("data")
    for file in sorted(files.iterdir()):
        system.pipe_file(f"data/{file.name}", file.read_bytes())
    return "s3://data"


@pytest.fixture
def stored(files, store, bucket):
    """(place, name) -> the path of a file there."""
    tars = {"tar": None, "http tar": f"{store.url}/0.tar", "s3 tar": f"{bucket}/0.tar"}
    found = {
        (place, Path(name).name): path
        for place in tars
        for name, path in members_of(files / "0.tar", tars[place]).items()
    }
    for place, address in {"http": store.url, "s3": bucket}.items():
        found |= {(place, name): f"{address}/{name}" for name in NAMES}
    return found


def test_paths():
    path = member_path("https://host/0.tar?key=a@b", 1536, 20, "a@1+2/./ü b.MP4")
    assert paths.split_member(path) == ("https://host/0.tar?key=a@b", 1536, 20, "a@1+2/./ü b.MP4")
    assert paths.suffix_of(path) == paths.suffix_of("http://host/a.MP4?b=c.png") == ".mp4"
    assert is_image("https://host/a.JPG?x=1")
    assert not is_image("https://host/a.mp4?x=b.jpg")
    assert paths.is_stored(path)
    assert paths.is_stored("s3://a/b")
    assert not paths.is_url("/data/0.tar@1+2/a.mp4")
    for local in ("/data/a@1+2/b.mp4", "a.tar", "/data/0.tar@1+2", "clip.mp4"):
        assert not paths.is_stored(local)
    with pytest.raises(DataError, match=r"0\.zip"):
        member_path("0.zip", 0, 1, "a.mp4")


@pytest.mark.parametrize(
    ("root", "name", "path"),
    [
        ("/data", "s3://bucket/a.mp4", "s3://bucket/a.mp4"),
        ("/data", "file:///x/a.mp4", "/x/a.mp4"),
        ("/data", "../x/0.tar@1+2/./a.mp4", "/x/0.tar@1+2/./a.mp4"),
        ("s3://bucket/set/", "./a.mp4", "s3://bucket/set/a.mp4"),
        ("https://host/set", "0.tar@1+2/a.mp4", "https://host/set/0.tar@1+2/a.mp4"),
        ("https://host/set", "/a.mp4", "https://host/a.mp4"),
        ("https://host/set", "/data/0.tar@1+2/a.mp4", "https://host/data/0.tar@1+2/a.mp4"),
    ],
)
def test_paths_are_relative_to_the_root(root, name, path):
    assert paths.resolve(root, name) == path


def test_names_of_results():
    """As of a local file, without the query of a URL, which may be long."""
    for path in (
        "/a/clip.mp4",
        "https://host/a/clip.mp4?key=1",
        "/a/0.tar@1+2/b/clip.mp4",
        "s3://b/0.tar@1+2/clip.mp4",
    ):
        assert identifier(3, path) == "000003_clip"


def test_the_configuration_takes_urls_for_data_only():
    assert not list(
        path_issues({"data.source.path": "s3://b/a.csv", "source": "https://host/a.mp4", "data.source.root": "gs://b"})
    )
    assert [issue.key for issue in path_issues({"teacher.path": "s3://b/a.pth", "data.source.path": "no.csv"})] == [
        "teacher.path",
        "data.source.path",
    ]


@pytest.mark.smoke
@pytest.mark.parametrize("name", NAMES)
def test_every_place_gives_the_same_frames(name, files, stored):
    """With every reader that takes the file; the demuxer reads stream.ts."""
    wanted = [0] if is_image(name) else [17, 2, 23, 2, 3]
    with closing(open_media(files / name)) as reader:
        expected, info = reader.read(wanted), reader.info
    readers = ["pyav", "decord"] if name == "clip.mp4" else ["pyav"]
    for place in PLACES:
        path = stored[place, name]
        for kind in readers:
            with closing(open_media(path, kind)) as reader:
                np.testing.assert_array_equal(reader.read(wanted), expected)
        assert media_info(path) == info
    if name == "stream.ts":
        assert open_index(local_range(files / name)).seek is not None
    if name.endswith(("mp4", "ts")):
        local, member = (open_index(local_range(path)) for path in (files / name, stored["tar", name]))
        np.testing.assert_array_equal(member.packets, local.packets)
        np.testing.assert_array_equal(member.frames, local.frames)


def test_torchcodec_reads_stored_videos(files, stored):
    pytest.importorskip("torchcodec")
    with closing(open_media(files / "clip.mp4")) as reader:
        expected = reader.read([17, 2])
    for place in ("tar", "http"):
        with closing(open_media(stored[place, "clip.mp4"], "torchcodec")) as reader:
            np.testing.assert_allclose(reader.read([17, 2]), expected, atol=3)


def test_a_member_is_one_range_read_and_stays(files, store):
    path = members_of(files / "0.tar", f"{store.url}/0.tar")["clips/photo.png"]
    for _ in range(2):
        open_media(path).read([0])
    _, offset, size, _ = paths.split_member(path)
    assert store.requests == [("/0.tar", "bytes=0-0"), ("/0.tar", f"bytes={offset}-{offset + size - 1}")]


def test_a_local_member_is_read_in_place(files, cache):
    path = members_of(files / "0.tar")["clips/clip.mp4"]
    with closing(open_media(path)) as reader:
        reader.read([3])
    assert not (cache / "objects").exists()
    assert [source.path for source in _kept.values()] == [path]  # stays open for the next reader
    kept = next(iter(_kept.values()))
    with closing(open_media(path)) as reader:
        assert reader._source is kept


def test_a_rewritten_tar_is_indexed_again(files, tmp_path, cache):
    """The index of a video in a tar is that of the tar's time and the range."""
    content = (files / "clip.mp4").read_bytes()
    tiny.write_video(tmp_path / "other.mp4", tiny.frames(24, 32, 40)[::-1], bf="3", g="8")
    other = (tmp_path / "other.mp4").read_bytes()
    size = max(len(content), len(other))
    frames = []
    for written in (content, other):
        write_tar(tmp_path / "a.tar", {"a.mp4": written.ljust(size, b"\0")})
        with closing(open_media(members_of(tmp_path / "a.tar")["a.mp4"])) as reader:
            frames.append(reader.read([5])[0])
    with closing(open_media(tmp_path / "other.mp4")) as reader:
        np.testing.assert_array_equal(frames[1], reader.read([5])[0])
    assert (frames[0] != frames[1]).any()


@pytest.mark.parametrize("fault", [408, 429, 500, 502, 503, 504, RESET, SHORT, SLOW])
def test_passing_faults_cost_only_time(fault, files, store, monkeypatch):
    monkeypatch.setattr(stores, "TIMEOUT", 0.1)
    store.fail_every(2, fault)
    content = (files / "clip.mp4").read_bytes()
    assert all(
        open_range(f"{store.url}/clip.mp4", offset, 100) == content[offset : offset + 100] for offset in range(4)
    )
    assert store.faults[fault] > 2
    if fault != RESET:  # aiohttp tries once more itself if a connection that it used before is cut
        assert stores.retries.total() == store.faults[fault]


def test_retries_are_logged_once_in_a_while(store, caplog):
    store.fail_every(2, 500)
    stores._last_log = time.monotonic() - stores.LOG_EVERY
    for offset in range(4):
        open_range(f"{store.url}/clip.mp4", offset, 1)
    (record,) = [record for record in caplog.records if "retr" in record.message]
    assert store.url.removeprefix("http://") in record.message


@pytest.mark.parametrize(("status", "word"), [(404, "no such object"), (403, "denied")])
def test_lasting_errors_are_raised_at_once(status, word, store):
    store.fail_every(1, status)
    path = f"{store.url}/clip.mp4"
    with pytest.raises(MediaError) as error:
        open_media(path)
    assert error.value.path == path
    assert word in error.value.reason
    assert str(status) in error.value.reason
    assert len(store.requests) == 1


@pytest.mark.parametrize(("fault", "word"), [(500, "500"), (SHORT, "gave 50 bytes of 100"), (SLOW, "in time")])
def test_a_store_that_stays_away_stops_the_run(fault, word, store, monkeypatch):
    """It is no property of the file, which would be replaced by another."""
    monkeypatch.setattr(stores, "TIMEOUT", 0.02)
    monkeypatch.setattr(stores, "TRIES", 3)
    store.fail_every(1, fault)
    with pytest.raises(StorageError) as error:
        open_range(f"{store.url}/clip.mp4", 7, 100)
    assert f"{store.url}/clip.mp4 (bytes 7 to 107)" in str(error.value)
    assert word in str(error.value)
    assert len(store.requests) == 3
    assert not error.value.on_every_rank


def test_a_range_beyond_the_end(files, store, bucket, monkeypatch):
    size = (files / "0.tar").stat().st_size
    monkeypatch.setattr(stores, "TRIES", 2)
    for address in (files, store.url, bucket):
        with pytest.raises(MediaError, match=rf"bytes {size - 3} to {size + 2}.*3|{size}"):
            open_range(f"{address}/0.tar", size - 3, 5)
        path = member_path(f"{address}/0.tar", size - 3, 5, "a.png")
        with pytest.raises(MediaError) as error:
            open_media(path)
        assert error.value.path == path
        assert str(size) in error.value.reason


def test_a_server_without_ranges(files, store, monkeypatch):
    """It serves whole objects, as python -m http.server does, but no members: a run ends at the first one, instead of
    trying another that it cannot read either."""
    store.fail_every(1, NO_RANGE)
    assert open_media(f"{store.url}/photo.png").read([0]).shape == (1, 32, 40, 3)
    with pytest.raises(StorageError, match=r"/0\.tar: its server ignores ranges"):
        open_range(f"{store.url}/0.tar", 512, 10)
    monkeypatch.setattr(stores, "PIECE", 1000)
    with pytest.raises(MediaError, match="ignores ranges"):
        open_media(f"{store.url}/clip.mp4")


def test_large_objects_are_read_in_pieces(files, store, monkeypatch):
    monkeypatch.setattr(stores, "PIECE", 1000)
    store.fail_every(3, RESET)
    assert storage.local_range(f"{store.url}/clip.mp4").read() == (files / "clip.mp4").read_bytes()
    assert len(store.requests) > (files / "clip.mp4").stat().st_size / 1000


@pytest.mark.parametrize("kind", ["object", "member"])
def test_pieces_of_an_object_in_s3_that_is_replaced_are_not_mixed(bucket, cache, monkeypatch, kind):
    monkeypatch.setattr(stores, "PIECE", 1000)
    path, other = "data/big.tar", fsspec.filesystem("s3", skip_instance_cache=True)
    url = f"s3://{path}" if kind == "object" else member_path(f"s3://{path}", 100, 2500, "a.mp4")
    other.pipe_file(path, b"1" * 3000)
    read, mixed = stores.read_range, []

    def replaced(where: str, offset: int, size: int, name: str) -> bytes:
        content = read(where, offset, size, name)
        if not mixed:
            other.pipe_file(path, b"2" * 3000)
        mixed.append(content[:1])
        return content

    monkeypatch.setattr(storage, "read_range", replaced)
    with pytest.raises(MediaError, match="replaced while it was read"):
        storage.local_range(url)
    assert mixed == [b"1", b"2", b"2"]
    assert set(storage.local_range(url).read()) == set(b"2")


def test_a_copy_is_on_the_disk_before_it_has_its_name(cache, monkeypatch):
    """Else a machine that goes down leaves a copy of the right size that is full of zeros."""
    synced, replace = {}, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: synced.update({os.fstat(file).st_ino: os.pread(file, 9, 0)}))
    monkeypatch.setattr(os, "replace", lambda old, new: (synced[os.stat(old).st_ino], replace(old, new)))
    copy = object_cache.cached_copy("a.mp4", 5, 1, lambda first, count: b"12345")
    assert synced[copy.stat().st_ino] == b"12345"


def test_settings_are_those_of_fsspec(store, monkeypatch):
    """As from the variable FSSPEC_HTTP."""
    store.token = "Bearer abc"
    with pytest.raises(MediaError, match="denied"):
        open_media(f"{store.url}/photo.png")
    monkeypatch.setattr(stores, "_systems", {})
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"Authorization": store.token}})
    assert open_media(f"{store.url}/photo.png").read([0]).shape == (1, 32, 40, 3)


def test_errors_of_backends_that_pass():
    exceptions, errors = pytest.importorskip("botocore.exceptions"), pytest.importorskip("s3fs.errors")

    def s3(code: str) -> Exception:
        return errors.translate_boto_error(exceptions.ClientError({"Error": {"Code": code}}, "GetObject"))

    class HttpError(Exception):  # as that of gcsfs
        code = 503

    unreachable = exceptions.EndpointConnectionError(endpoint_url="x", error="y")
    passing = [*map(s3, ("SlowDown", "InternalError", "503", "RequestTimeout")), unreachable, HttpError(), EOFError()]
    passing += [
        exceptions.ReadTimeoutError(endpoint_url="x", error="y"),
        ConnectionResetError(),
        fsspec.exceptions.FSTimeoutError(),
    ]
    lasting = [*map(s3, ("NoSuchKey", "NoSuchBucket", "AccessDenied", "InvalidRange", "ExpiredToken"))]
    lasting += [exceptions.NoCredentialsError(), ValueError("bad bucket"), KeyError("a bug")]
    assert [stores._is_passing(error) for error in passing] == [True] * len(passing)
    assert [stores._is_passing(error) for error in lasting] == [False] * len(lasting)
    kinds = [type(stores._lasting(error, "s3://b/a", "s3://b/a")) for error in lasting]
    assert kinds == [*[MediaError] * 5, StorageError, MediaError, KeyError]


def test_lasting_errors_of_s3(bucket, cache):
    for path in (f"{bucket}/no.mp4", "s3://no-bucket/a.mp4"):
        with pytest.raises(MediaError, match="no such object") as error:
            open_media(path)
        assert error.value.path == path


def test_a_missing_package_and_an_unknown_protocol(monkeypatch, cache):
    def missing(protocol: str):
        raise ImportError

    with pytest.raises(StorageError, match="ftp"):
        open_media("ftp://host/a.mp4")
    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    for url, package in {"s3://a/b.mp4": "s3fs", "gs://a/b.mp4": "gcsfs", "https://a/b.mp4": "aiohttp"}.items():
        with pytest.raises(StorageError, match=f"pip install {package}"):
            open_media(url)


def objects(cache: Path) -> list[Path]:
    return [file for file in (cache / "objects").glob("*/*") if file.is_file()]


def blobs(folder: Path, count: int, size: int = 10_000) -> dict[str, bytes]:
    """Objects of random bytes in a folder."""
    contents = {f"{i}.bin": np.random.default_rng(i).bytes(size) for i in range(count)}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return contents


def test_the_cache_is_bounded(tmp_path, cache, monkeypatch):
    """What was used last stays; a deleted copy can be read on, and is fetched again."""
    limit = 100_000
    monkeypatch.setenv("VAE3D_CACHE_GIB", str((limit + 0.5) / object_cache.GIB))
    monkeypatch.setattr(object_cache, "USED_AGAIN", -1)
    contents = blobs(tmp_path, 30)
    with serve(tmp_path) as store:
        first = storage.local_range(f"{store.url}/0.bin")
        second = storage.local_range(f"{store.url}/1.bin")
        opened = second.open()
        for name, content in contents.items():
            assert storage.local_range(f"{store.url}/{name}").read() == content
            storage.local_range(f"{store.url}/0.bin")
            assert sum(file.stat().st_size for file in objects(cache)) <= limit
        assert first.file.exists()
        assert not second.file.exists()
        assert opened.read() == second.read() == contents["1.bin"]
        opened.close()
        assert sum(path == "/0.bin" for path, _ in store.requests) == 2
        with pytest.raises(DataError, match="VAE3D_CACHE_GIB"):
            (tmp_path / "large.bin").write_bytes(bytes(limit + 1))
            storage.local_range(f"{store.url}/large.bin")


def test_unfinished_files_stay_for_an_hour(cache, monkeypatch):
    folder = cache / "objects" / "ab"
    folder.mkdir(parents=True)
    for name, age in {"new": 10, "old": 2 * object_cache.ABANDONED}.items():
        (folder / f"{name}{object_cache.UNFINISHED}").write_bytes(bytes(1000))
        os.utime(folder / f"{name}{object_cache.UNFINISHED}", (time.time() - age,) * 2)
    assert object_cache._delete_oldest(cache / "objects", 0) == 1000
    assert [file.name for file in objects(cache)] == [f"new{object_cache.UNFINISHED}"]


def fetch(store_url: str, count: int, seed: int, failed) -> None:
    expected = {f"{i}.bin": np.random.default_rng(i).bytes(10_000) for i in range(count)}
    for i in np.random.default_rng(seed).integers(count, size=30):
        if storage.local_range(f"{store_url}/{i}.bin").read() != expected[f"{i}.bin"]:
            failed.value += 1


def test_processes_share_the_cache(tmp_path, cache, monkeypatch):
    """Forked after the parent used the store: each makes its own connections, and none sees half a file."""
    monkeypatch.setenv("VAE3D_CACHE_GIB", str(50_000 / object_cache.GIB))
    contents = blobs(tmp_path, 10)
    context = multiprocessing.get_context("fork")
    failed = context.Value("i", 0)
    with serve(tmp_path) as store:
        assert storage.local_range(f"{store.url}/0.bin").read() == contents["0.bin"]
        store.fail_every(7, RESET, 500)
        processes = [context.Process(target=fetch, args=(store.url, 10, seed, failed)) for seed in range(4)]
        for process in processes:
            process.start()
        fetch(store.url, 10, 4, failed)
        for process in processes:
            process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert failed.value == 0
    assert sum(file.stat().st_size for file in objects(cache)) <= 50_000
    assert not list((cache / "objects").glob(f"*/*{object_cache.UNFINISHED}"))


def test_the_error_of_a_worker_is_one_line(store, monkeypatch):
    monkeypatch.setattr(stores, "TRIES", 1)
    store.fail_every(1, 500)
    path = f"{store.url}/clip.mp4"
    with pytest.raises(StorageError) as error:
        list(load(Frames([path]), workers=1, batch_size=None))
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


class Frames:
    """A data set of frame 5 of each path."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> np.ndarray:
        with closing(open_media(self.paths[row])) as reader:
            return reader.read([5])[0]


def test_workers_read_stored_videos(files, stored):
    """Forked workers, while the parent has connections, a kept file and goes on using them."""
    paths = [stored[place, name] for name in NAMES[:2] for place in PLACES]
    expected = [Frames([str(files / name)])[0] for name in NAMES[:2] for _ in PLACES]
    np.testing.assert_array_equal(Frames(paths)[1], expected[1])
    stores.forget_versions()
    loader = DataLoader(Frames(paths), batch_size=None, num_workers=2, timeout=30)
    np.testing.assert_array_equal(np.stack(list(loader)), expected)
    stores.forget_versions()
    np.testing.assert_array_equal(Frames(paths)[3], expected[3])


@pytest.mark.parametrize(("number", "setting"), [(errno.ENOSPC, "VAE3D_CACHE_GIB"), (errno.EACCES, "VAE3D_CACHE")])
def test_a_full_or_closed_disk_is_an_error(number, setting, store, cache, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(object_cache.os, "replace", fail)
    with pytest.raises(StorageError) as error:
        open_media(f"{store.url}/clip.mp4")
    assert setting in str(error.value)
    assert str(cache) in str(error.value)
    assert not list((cache / "objects").glob(f"*/*{object_cache.UNFINISHED}"))


@pytest.mark.parametrize("value", ["0", "-1", "much", "nan", "inf"])
def test_the_limit_of_the_cache_is_checked(value, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE_GIB", value)
    with pytest.raises(DataError, match="VAE3D_CACHE_GIB"):
        object_cache.cache_limit()


def test_versions(tmp_path, cache):
    """A replaced object or tar has another version, and the new content is read."""
    write_tar(tmp_path / "0.tar", {"a.png": b"old"})
    with serve(tmp_path) as store:
        paths = [f"{store.url}/0.tar", members_of(tmp_path / "0.tar")["a.png"]]
        paths.append(members_of(tmp_path / "0.tar", paths[0])["a.png"])
        old = [(file_stamp(path), source_version(path), source_version(path, hashed=True)) for path in paths]
        assert [stamp[0] for stamp, _, _ in old] == [(tmp_path / "0.tar").stat().st_size, 3, 3]
        assert old[1][2]["sha256"] == old[2][2]["sha256"]
        assert old == [(file_stamp(path), source_version(path), source_version(path, hashed=True)) for path in paths]
        write_tar(tmp_path / "0.tar", {"a.png": b"new"})
        stores.forget_versions()
        for path, (stamp, version, hashed) in zip(paths, old, strict=True):
            assert file_stamp(path) != stamp
            assert source_version(path) != version
            assert source_version(path, hashed=True)["sha256"] != hashed["sha256"]
        assert storage.local_range(paths[2]).read() == b"new"
        assert file_stamp(f"{store.url}/no.png") is source_version(f"{store.url}/no.png") is None


def test_an_object_that_is_replaced_meanwhile(tmp_path, cache):
    """Its pieces are not mixed; the next read takes the new one."""
    (tmp_path / "a.bin").write_bytes(b"old")
    with serve(tmp_path) as store:
        url = f"{store.url}/a.bin"
        assert storage.size_and_version(url)[0] == 3
        (tmp_path / "a.bin").write_bytes(b"other")
        with pytest.raises(MediaError, match="replaced"):
            storage.local_range(url)
        assert storage.local_range(url).read() == b"other"


def test_tables_of_urls(files, store, bucket, tmp_path):
    member = members_of(files / "0.tar")["clips/clip.mp4"]
    names = ["clip.mp4", f"{bucket}/stream.ts", member.removeprefix(f"{files}/"), str(files / "photo.png"), "no.mp4"]
    (tmp_path / "a.csv").write_text("\n".join(["path", *names]))
    table = Table(tmp_path / "a.csv", root=files).table()
    assert table["path"].tolist() == [str(files / names[0]), names[1], member, names[3], str(files / "no.mp4")]
    mark_missing_files(table)
    assert table["error"].tolist() == [None] * 4 + ["no such file"]
    filled, errors = fill_metadata(table)
    assert filled["num_frames"].tolist() == [24, 24, 24, 1]
    assert len(errors) == 1

    remote = Table(tmp_path / "a.csv", root=store.url).table()
    assert remote["path"].tolist()[:2] == [f"{store.url}/clip.mp4", f"{bucket}/stream.ts"]
    mark_missing_files(remote)
    assert "404" in remote["error"].iloc[4]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.parquet", "a.jsonl"])
def test_a_table_at_a_url(name, tmp_path, cache):
    """Its paths are relative to its folder, and errors name the URL."""
    frame = pd.DataFrame({"path": ["clip.mp4"], "split": ["train"]})
    if name.endswith("parquet"):
        frame.to_parquet(tmp_path / name)
    elif name.endswith("jsonl"):
        frame.to_json(tmp_path / name, orient="records", lines=True)
    else:
        frame.to_csv(tmp_path / name, index=False)
    (tmp_path / f"bad_{name}").write_bytes(b"\0\1\2")
    tiny.write_video(tmp_path / "clip.mp4", tiny.frames(2))
    with serve(tmp_path) as store:
        table = open_source(f"{store.url}/{name}").table()
        assert table["path"].tolist() == [f"{store.url}/clip.mp4"]
        assert table["error"].isna().all()
        for bad in (f"bad_{name}", f"no_{name}"):
            with pytest.raises(DataError) as error:
                open_source(f"{store.url}/{bad}").table()
            assert f"{store.url}/{bad}" in str(error.value)
            assert str(cache) not in str(error.value)


def test_folders_at_urls(files, store, bucket):
    assert open_source(f"file://{files}/").table()["path"].tolist() == [str(files / name) for name in sorted(NAMES)]
    for address in (store.url, bucket):
        table = open_source(f"{address}/").table()
        assert table["name"].tolist() == sorted(NAMES)
        assert table["path"].tolist() == [f"{address}/{name}" for name in sorted(NAMES)]
        assert Folder(f"{address}/photo.*").table()["name"].tolist() == ["photo.jpg", "photo.png"]
        assert Folder(f"{address}/{{clip.mp4,stream.ts}}").table()["name"].tolist() == ["clip.mp4", "stream.ts"]
        assert Folder(f"{address}/clip.mp4").table()["path"].tolist() == [f"{address}/clip.mp4"]
        with pytest.raises(DataError, match="no"):
            Folder(f"{address}/no_*.mp4").table()
    (found,) = stores.list_urls(f"file://{files}/*.png")
    assert open_media(found).read([0]).shape == (1, 32, 40, 3)
    assert stores.list_urls("s3://b/{000..002}.tar") == ["s3://b/000.tar", "s3://b/001.tar", "s3://b/002.tar"]


def test_errors_name_the_stored_path(files, tmp_path, cache):
    write_tar(
        tmp_path / "0.tar", {"cut.mp4": (files / "clip.mp4").read_bytes()[:-300], "bad.png": b"<html>", "no.mp4": b""}
    )
    with serve(tmp_path) as store:
        for address in (None, f"{store.url}/0.tar"):
            for path in members_of(tmp_path / "0.tar", address).values():
                with pytest.raises(MediaError) as error:
                    open_media(path)
                assert error.value.path == path
                assert str(cache) not in str(error.value)


def test_names_of_members_are_not_written_to(files, tmp_path, cache):
    """A member may have any name; copies have names of their own."""
    content = (files / "photo.png").read_bytes()
    names = ["../../../evil.png", "/evil.png", f"{'x' * 300}.png", "a\nb*?.png"]
    for name in names:
        (tmp_path / "0.tar").write_bytes(content)
        with serve(tmp_path) as store:
            path = member_path(f"{store.url}/0.tar", 0, len(content), name)
            assert open_media(path).read([0]).shape == (1, 32, 40, 3)
    assert {file.suffix for file in objects(cache)} == {".png"}
    assert {path.name for path in tmp_path.iterdir()} == {"0.tar", "cache"}


@pytest.mark.parametrize("suffix", ["mp4", "gif", "ts"])
@pytest.mark.parametrize("kind", ["hls", "concat", "image2"])
def test_a_member_opens_no_other_file(kind, suffix, files, tmp_path, cache):
    text = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{files / 'stream.ts'}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{files / 'clip.mp4'}'\n",
        "image2": "no picture",
    }[kind]
    Image.new("RGB", (8, 8)).save(tmp_path / f"other.{'gif' if suffix == 'gif' else 'png'}")
    write_tar(tmp_path / "0.tar", {f"../../other.{suffix}": text.encode()})
    (path,) = members_of(tmp_path / "0.tar").values()
    with pytest.raises(MediaError):
        open_media(path)


def test_the_server_of_these_tests_keeps_to_its_folder(files, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.bin").write_bytes(b"secret")
    with serve(tmp_path / "in") as store:
        assert isinstance(store, Store)
        with pytest.raises(MediaError, match="404"):
            open_range(f"{store.url}/%2e%2e/secret.bin", 0, 6)


# ---- servers that do not do as they should


class Odd(BaseHTTPRequestHandler):
    """Answers by the name of the file that is asked for."""

    protocol_version = "HTTP/1.1"
    sent = 0

    def log_message(self, *_: object) -> None: ...

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        name = self.path.strip("/")
        if name.startswith("folder"):
            self.answer(200, b'<a href="folder/">' * (self.path.count("/") < 100), Content_Type="text/html")
        elif name == "endless":
            self.send_response(206)
            self.send_header("Content-Range", "bytes 0-999/1000000")
            self.end_headers()
            self.close_connection = True
            with suppress(OSError):
                while Odd.sent < 2**28:
                    Odd.sent += self.wfile.write(bytes(2**16))
        elif name == "table.csv.gz":  # as Apache and buckets do that store it with this header
            content = gzip.compress(b"path\na.mp4\n", mtime=0)
            self.answer(
                206, content, Content_Range=f"bytes 0-{len(content) - 1}/{len(content)}", Content_Encoding="gzip"
            )
        elif name == "bomb":
            content = gzip.compress(bytes(2**26))
            self.answer(206, content, Content_Range="bytes 0-999/1000000", Content_Encoding="gzip")
        elif name == "elsewhere":
            self.answer(206, bytes(1000), Content_Range="bytes 500-1499/1000000")
        elif name == "nowhere":
            self.answer(206, bytes(1000), Content_Range="bytes all of it")
        elif name == "loop":
            self.answer(302, Location="/loop")
        elif name == "file":
            self.answer(302, Location="file:///etc/passwd")
        elif name == "nothing":
            self.answer(204)


@pytest.fixture
def odd(cache, monkeypatch):
    monkeypatch.setattr(stores, "TRIES", 2)
    Odd.sent = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["endless", "bomb", "elsewhere", "nowhere", "loop", "file", "nothing"])
def test_an_odd_answer_is_an_error_of_the_object(name, odd):
    with pytest.raises(MediaError, match=name):
        open_range(f"{odd}/{name}", 0, 1000)
    assert Odd.sent < 2**25


def test_folders_in_folders_without_end_are_listed_to_some_depth(odd, monkeypatch):
    asked = []
    monkeypatch.setattr(Odd, "log_message", lambda self, *_: asked.append(self.path))
    with pytest.raises(DataError, match="no tar files"):
        list_shards(f"{odd}/folder")
    assert len(asked) < 50


def test_content_is_read_as_it_is_stored(odd):
    assert storage.local_range(f"{odd}/table.csv.gz").read() == gzip.compress(b"path\na.mp4\n", mtime=0)


@pytest.mark.parametrize("path", [".tar?" * 40_000 + "@1", ".tar?" + "@1+1/" * 40_000, "@1+1/" * 40_000 + "a.tar@"])
def test_a_long_path_takes_no_time(path):
    before = time.process_time()
    assert paths.split_member(f"a{path}") in (None, ("a.tar?", 1, 1, "@1+1/" * 39_999))
    assert time.process_time() - before < 1


def test_a_path_with_a_number_of_many_digits_is_no_member():
    assert paths.split_member(f"a.tar@{'9' * 5000}+1/a.mp4") is None
    assert not paths.is_stored(f"a.tar@1+{'9' * 19}/a.mp4")
