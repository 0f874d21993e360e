"""Latent caches that were copied to a store: over HTTP and S3."""

from __future__ import annotations

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import SafetensorError

from tests import tiny
from tests.http_server import SHORT, serve
from tests.latents import caches
from tests.latents.processes import wait_for
from vae3d.commands import encode_status, latent_stats
from vae3d.commands.flags import parse_encode_status, parse_latent_stats
from vae3d.config.issues import ConfigError
from vae3d.config.latents import check_encoding
from vae3d.data.storage import objects, stores
from vae3d.data.workers import load
from vae3d.latents import remote_tensors, shards
from vae3d.latents.cache import LatentCache
from vae3d.latents.claims import StoreClaims
from vae3d.latents.encode import encode_cache
from vae3d.latents.remote_tensors import RemoteTensors
from vae3d.latents.shards import CacheError


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Three shards of two images and their mirror images."""
    folder = tmp_path_factory.mktemp("local")
    return caches.made(caches.pictures(folder / "photos"), folder / "cache", flip=True, writers=["webdataset"])


@pytest.fixture
def store(local, tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "objects"))
    stores.forget_versions()
    with serve(local.parent) as store:
        yield store


def assert_same(cache, local, **settings):
    expected = LatentCache(local, **settings)
    assert len(cache) == len(expected)
    assert cache.index.equals(expected.index)
    assert cache.statistics == expected.statistics
    for entry, other in zip(cache, expected, strict=True):
        assert torch.equal(entry.z, other.z)
        assert entry[1:] == other[1:]


@pytest.mark.parametrize("first", [remote_tensors.FIRST, 64])  # the second does not hold the header
def test_a_cache_over_http_is_read_by_one_range_per_tensor(first, store, local, monkeypatch):
    monkeypatch.setattr(remote_tensors, "FIRST", first)
    cache = LatentCache(f"{store.url}/cache/")
    assert_same(cache, local)
    store.requests.clear()
    assert torch.equal(cache[5].z, LatentCache(local)[5].z)
    assert [path for path, _ in store.requests] == ["/cache/shards/00001.safetensors"] * 2
    assert not [path for path, _ in store.requests if path.endswith(".json")]
    LatentCache(f"{store.url}/cache/webdataset")[5]
    assert store.requests[-1][0] == "/cache/webdataset/00001.tar"


def test_a_server_that_fails_every_fifth_request_changes_nothing(store, local, monkeypatch):
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.01)
    store.fail_every(5, 503, SHORT, 429)
    assert_same(
        LatentCache(f"{store.url}/cache", split=None, flips=False, mode="mean"), local, flips=False, mode="mean"
    )
    assert store.faults.total() > 3


def test_workers_read_a_remote_cache(store, local):
    cache = LatentCache(f"{store.url}/cache")
    cache[0]  # its connection is not that of the workers
    assert [entry.key for entry in load(cache, workers=2, batch_size=None)] == [
        entry.key for entry in LatentCache(local)
    ]


def test_errors_of_a_remote_cache_name_what_is_missing_or_damaged(store, local, tmp_path):
    url = f"{store.url}/copy"
    with pytest.raises(CacheError, match=rf"{url} is no latent cache, which has complete.json, and no tars of latents"):
        LatentCache(url)
    copy = local.parent / "copy"
    shutil.copytree(local, copy)
    try:
        file = shards.shard_file(copy, 1)
        content = file.read_bytes()
        for damaged, why in [
            (content[:-1] + bytes([content[-1] ^ 4]), "has changed since it was written: its checksum differs"),
            (content[:-8], r"is at bytes \d+ to \d+, which its shape does not fit"),
            (b"\xff" * 100, "is no safetensors file: its header would have"),
            (content[:8] + b"[" * 100, "is no safetensors file"),
        ]:
            file.write_bytes(damaged)
            stores.forget_versions()
            with pytest.raises(CacheError, match=rf"{url}/shards/00001.safetensors.* {why}.*copy it again"):
                LatentCache(url, verify=True)
        file.write_bytes(content)
        stores.forget_versions()
        with pytest.raises(SafetensorError, match="has no tensor mean/x"):
            RemoteTensors(f"{url}/shards/00001.safetensors").get_tensor("mean/x")
        LatentCache(url, verify=True)
        (copy / "complete.json").unlink()
        stores.forget_versions()
        with pytest.raises(CacheError, match=r"is not complete; it has no complete.json"):
            LatentCache(url)
    finally:
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2.0, 2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0.0, 16.0]},
        {"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
        "F32",
    ],
)
def test_a_header_that_a_stranger_made_is_an_error(store, local, entry):
    header = json.dumps({"a": entry}).encode()
    (local.parent / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    stores.forget_versions()
    tensors = RemoteTensors(f"{store.url}/odd.safetensors")
    with pytest.raises(SafetensorError, match=r"odd\.safetensors"):
        tensors.get_tensor("a")


def test_latent_stats_of_a_remote_cache(store, local, capsys):
    latent_stats.main(parse_latent_stats([str(local)]))
    printed = capsys.readouterr().out
    latent_stats.main(parse_latent_stats([f"{store.url}/cache"]))
    assert capsys.readouterr().out == printed.replace(str(local), f"{store.url}/cache")


# ---- object stores


@pytest.fixture(scope="module")
def bucket(s3):
    s3("latents")


def of_store(url, tmp_path):
    """The objects under a URL, by name."""
    file = tmp_path / "object"
    return {name: objects.get(f"{url}/{name}", file) and file.read_bytes() for name in objects.listing(url)}


def test_a_cache_that_is_encoded_into_a_store_is_that_of_a_folder(bucket, local, tmp_path, monkeypatch, capsys):
    """By two at once, after another was lost that had written half a shard."""
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "objects"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    url = "s3://latents/photos"
    settings = {"flip": True, "writers": ["webdataset"], "stale": 3.0}

    def job(**changes):
        return caches.job(local.parent / "photos", url, **settings | changes)

    class Lost(BaseException):
        pass

    def lost(file, url):
        put(file, url)
        if url.endswith("00001.safetensors"):
            raise Lost

    put = objects.put
    with monkeypatch.context() as patch, pytest.raises(Lost):
        patch.setattr(objects, "put", lost)
        patch.setattr(objects, "remove", lambda url: None)  # its claim is left
        encode_cache(job(), 1, 3)
    assert shards.numbers_of(objects.listing(f"{url}/shards")) == set()
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(encode_cache, [job(), job()], (0, 2), (3, 3))) == [True, True]
    assert of_store(url, tmp_path) == caches.files(local)
    assert_same(LatentCache(url), local)
    latent_stats.main(parse_latent_stats([url, "--partial"]))
    latent_stats.main(parse_latent_stats([str(local)]))
    of_shards, of_file = (printed.splitlines() for printed in capsys.readouterr().out.split(f"{local}: ", 1))
    assert of_shards[0] == "3 of 3 shards (100.0%) are complete; of these:"
    assert of_shards[3:10] == of_file[2:9]  # the table
    # A shard that is damaged in the store is encoded again.
    objects.put(local / "meta.json", f"{url}/shards/00002.safetensors")
    encode_cache(job())
    assert of_store(url, tmp_path) == caches.files(local)
    with monkeypatch.context() as reading:
        for name in ("put", "remove"):
            reading.delattr(objects, name)
        assert encode_status.main(parse_encode_status([url])) == 0
    objects.remove(f"{url}/complete.json")
    stores.forget_versions()
    with pytest.raises(CacheError, match=r"s3://latents/photos is not complete; it has no complete.json"):
        LatentCache(url)  # and is not taken for its tars
    with pytest.raises(CacheError, match=r"s3://latents/none is no latent cache"):
        LatentCache("s3://latents/none")
    with pytest.raises(CacheError, match="s3://latents/photos was begun with other settings: dtype is fp16 there"):
        encode_cache(job(dtype="fp32"))
    with pytest.raises(CacheError, match="s3://latents is not empty, and not a latent cache"):
        encode_cache(caches.job(local.parent / "photos", "s3://latents"))


def test_claims_in_a_store(bucket, tmp_path, caplog):
    url = "s3://latents/claims"
    with StoreClaims(url, tmp_path / "one", 3.0) as one, StoreClaims(url, tmp_path / "other", 3.0) as other:
        assert one.take("a")
        assert not other.take("a")
        assert not one.take("a")
        assert other.take("b")
        assert [(holder.name, holder.stale) for holder in one.holders()] == [("a", False), ("b", False)]
        assert one.owns("a")
        one._ended.set()  # it is silent from now on
        one._thread.join()
        wait_for(lambda: other.take("a"))
        assert f"a is taken over from process {os.getpid()}" in caplog.text
        assert not one.owns("a")
        assert not other.take("b")
        assert other.owns("b")  # refreshed all the time
        other.release("a")
        assert one.take("c")
    assert not objects.listing(url)


def test_two_that_claim_at_once_do_not_both_get_it(bucket, tmp_path, monkeypatch):
    one, other = (StoreClaims("s3://latents/race", tmp_path / name, 60.0) for name in ("one", "other"))
    listed = one._others
    monkeypatch.setattr(one, "_others", lambda name: listed(name) if one._own else {})
    monkeypatch.setattr(one, "release", lambda name: None)
    assert other.take("a")
    assert not one.take("a")  # though it saw nothing before it wrote its own


def test_a_claim_that_is_released_while_it_is_refreshed_is_gone(bucket, tmp_path, monkeypatch):
    claims = StoreClaims("s3://latents/beat", tmp_path / "claims", 60.0)
    assert claims.take("a")
    find, threads = objects.find, []

    def found(url):
        threads.append(threading.Thread(target=claims.release, args=("a",)))
        threads[0].start()
        threads[0].join(0.2)
        return find(url)

    monkeypatch.setattr(objects, "find", found)
    claims._refresh("a")
    threads[0].join()
    assert not objects.listing("s3://latents/beat")


def test_stores_that_cannot_be_written_are_refused():
    with pytest.raises(ConfigError, match=r"cache=http://host/x: cannot be written"):
        check_encoding(tiny.compose("checkpoint=.", "source=.", "cache=http://host/x", config="latents"))
