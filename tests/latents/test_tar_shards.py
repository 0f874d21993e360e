"""A latent cache in tar shards gives what the cache itself gives."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pyarrow as pa
import pytest
import torch

from tests import http_server
from tests.latents import caches
from vae3d.data.tars.index import read_index
from vae3d.latents.cache import LatentCache
from vae3d.latents.shards import CacheError


@pytest.fixture(scope="module", params=[{"flip": True, "dtype": "fp32"}, {"store": "mean"}], ids=["moments", "mean"])
def cached(request, tmp_path_factory):
    photos = caches.pictures(tmp_path_factory.mktemp("photos"))
    return caches.made(photos, tmp_path_factory.mktemp("cached") / "cache", writers=["webdataset"], **request.param)


def test_entries_are_those_of_the_cache(cached):
    whole = LatentCache(cached, caches.codec("spatial"), seed=3)
    tars = LatentCache(cached / "webdataset", caches.codec("spatial"), seed=3)
    assert (len(tars), tars.mode, tars.classes, tars.labels) == (len(whole), whole.mode, whole.classes, whole.labels)
    assert set(whole.index.columns) == set(tars.index.columns)
    assert tars.index["key"].tolist() == whole.index["key"].tolist()
    tars = pickle.loads(pickle.dumps(tars))
    for index in range(len(whole)):
        for ours, theirs in zip(tars[index, 7], whole[index, 7], strict=True):
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert tars.statistics == whole.statistics


def test_some_shards_and_no_mirrored_entries_can_be_opened(cached):
    all_tars = sorted((cached / "webdataset").glob("*.tar"))
    few = LatentCache(str(all_tars[1]), flips=False)
    whole = LatentCache(cached, flips=False)
    assert few.index["key"].tolist() == whole.index.loc[whole.index["shard"] == 1, "key"].tolist()
    assert torch.equal(few.moments(0).mean, whole.moments(whole.index["key"].tolist().index(few.index["key"][0])).mean)


def test_a_folder_that_lacks_a_shard_is_an_error_and_its_tars_can_be_named(cached, tmp_path, caplog):
    caplog.set_level("INFO", "vae3d")
    copy = shutil.copytree(cached, tmp_path / "copy")
    LatentCache(copy / "webdataset")
    last = sorted((copy / "webdataset").glob("*.tar"))[-1]
    last.unlink()
    for folder in (copy / "webdataset", copy / "webdataset/index.arrow"):
        with pytest.raises(CacheError, match=f"{last.name}"):
            LatentCache(folder)
    assert len(LatentCache(f"{copy}/webdataset/*.tar")) < len(LatentCache(cached))
    assert "2 of 3 shards" in caplog.text


def test_a_shard_of_which_no_clip_could_be_read_is_not_missing(tmp_path):
    photos = caches.pictures(tmp_path / "photos")
    for name in ("cat/2.png", "dog/0.png"):  # the second shard
        (photos / name).write_bytes(b"no picture")
    folder = caches.made(photos, tmp_path / "cache", writers=["webdataset"], max_broken=0.5)
    assert len(LatentCache(folder / "webdataset")) == 4


def test_another_autoencoder_a_changed_tar_and_a_missing_meta_are_errors(cached, tmp_path):
    with pytest.raises(CacheError, match="another autoencoder"):
        LatentCache(cached / "webdataset", caches.codec("wan"))
    copy = tmp_path / "copy"
    shutil.copytree(cached, copy)
    [tar, *_] = sorted((copy / "webdataset").glob("*.tar"))
    (copy / "webdataset/index.arrow").unlink(missing_ok=True)
    LatentCache(copy / "webdataset")
    content = bytearray(tar.read_bytes())
    where = read_index(copy / "webdataset/index.arrow")[0]["offset"][0].as_py()
    content[where + 130] ^= 1  # behind the header of a .npy
    stat = tar.stat()
    tar.write_bytes(content)
    with pytest.raises(CacheError, match=f"{tar} has another modification time"):
        LatentCache(copy / "webdataset")
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(CacheError, match=r"checksum|NaN"):
        LatentCache(copy / "webdataset", verify=True)
    (copy / "meta.json").unlink()
    with pytest.raises(CacheError, match=r"no meta\.json"):
        LatentCache(copy / "webdataset")


def test_shards_at_a_url_are_read_by_one_range_per_entry(cached, tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    copy = shutil.copytree(cached, tmp_path / "copy")
    (copy / "webdataset/index.arrow").unlink(missing_ok=True)
    count = len(list((copy / "webdataset").glob("*.tar")))
    whole = LatentCache(cached)
    with http_server.serve(copy) as store:
        tars = LatentCache(f"{store.url}/webdataset/{{00000..{count - 1:05d}}}.tar")
        store.requests.clear()
        for index in range(len(whole)):
            ours, theirs = tars.moments(index), whole.moments(index)
            assert torch.equal(ours.mean, theirs.mean)
            assert torch.equal(ours.std, theirs.std)
        assert len(store.requests) == len(whole)
        assert tars.statistics == whole.statistics


@pytest.mark.parametrize(
    "row",
    [
        "[]",
        "{",
        {"number": "1"},
        {"number": -1},
        {"flip": "no"},
        {"latent": "4x0x1x1"},
        {"latent": 4},
        {"latent": "3x1x8x8"},
        {"crc32": None},
        {"crc32": 10**25},
        {"shard": 99},
        {"key": ""},
    ],
    ids=str,
)
def test_rows_of_an_index_that_a_stranger_made_are_errors(cached, tmp_path, row):
    copy = tmp_path / "copy"
    shutil.copytree(cached, copy)
    LatentCache(copy / "webdataset")
    file = copy / "webdataset/index.arrow"
    table, _ = read_index(file)
    rows = table["row"].to_pylist()
    rows[0] = row if isinstance(row, str) else json.dumps(json.loads(rows[0]) | row)
    table = table.set_column(table.column_names.index("row"), "row", pa.array(rows))
    with pa.OSFile(f"{file}.new", "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    os.replace(f"{file}.new", file)
    with pytest.raises(CacheError, match=r"a row of its index|its index has a"):
        LatentCache(file)
