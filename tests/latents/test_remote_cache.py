"""Latent caches that were copied to a store: over HTTP and S3."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors import SafetensorError

from tests.http_server import SHORT, serve
from tests.latents import caches
from vae3d.commands import latent_stats
from vae3d.data import storage
from vae3d.data.workers import load
from vae3d.latents import remote_tensors, shards
from vae3d.latents.cache import LatentCache
from vae3d.latents.remote_tensors import RemoteTensors
from vae3d.latents.shards import CacheError
from vae3d.latents.tar_shards import TarLatentCache, open_cache


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Three shards of two images and their mirror images."""
    folder = tmp_path_factory.mktemp("local")
    return caches.made(caches.pictures(folder / "photos"), folder / "cache", flip=True, writers=["webdataset"])


@pytest.fixture
def store(local, tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "objects"))
    storage.forget_versions()
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
    cache = open_cache(f"{store.url}/cache/")
    assert type(cache) is LatentCache
    assert_same(cache, local)
    store.requests.clear()
    assert torch.equal(cache[5].z, LatentCache(local)[5].z)
    assert [path for path, _ in store.requests] == ["/cache/shards/00001.safetensors"] * 2
    assert not [path for path, _ in store.requests if path.endswith(".json")]
    assert type(open_cache(f"{store.url}/cache/webdataset")) is TarLatentCache


def test_a_server_that_fails_every_fifth_request_changes_nothing(store, local, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)
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
    with pytest.raises(CacheError, match=rf"{url} is not a latent cache, which has meta.json.*no such object"):
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
            storage.forget_versions()
            with pytest.raises(CacheError, match=rf"{url}/shards/00001.safetensors.* {why}.*copy it again"):
                LatentCache(url, verify=True)
        file.write_bytes(content)
        storage.forget_versions()
        with pytest.raises(SafetensorError, match="has no tensor mean/x"):
            RemoteTensors(f"{url}/shards/00001.safetensors").get_tensor("mean/x")
        LatentCache(url, verify=True)
        (copy / "complete.json").unlink()
        storage.forget_versions()
        with pytest.raises(CacheError, match=r"is not complete; it has no complete.json"):
            LatentCache(url)
    finally:
        shutil.rmtree(copy)


def test_latent_stats_of_a_remote_cache(store, local, capsys):
    latent_stats.main([str(local)])
    printed = capsys.readouterr().out
    latent_stats.main([f"{store.url}/cache"])
    assert capsys.readouterr().out == printed.replace(str(local), f"{store.url}/cache")


def test_a_cache_in_s3(local, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "objects"))
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        import s3fs

        bucket = s3fs.S3FileSystem(skip_instance_cache=True)
        bucket.mkdir("latents")
        bucket.put(f"{local}/", "latents/photos/", recursive=True)
        assert_same(LatentCache("s3://latents/photos", mode="mean"), local, mode="mean")
    finally:
        server.stop()
