"""A cache gives what encoding on the fly gives, and only of the autoencoder and the transform that it is asked for."""

from __future__ import annotations

import pickle
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from tests.latents import caches, families
from vae3d.diffusion.data import Batch, LatentData
from vae3d.latents.cache import NONE, LatentCache, class_names
from vae3d.latents.codec import LatentCodec, Moments
from vae3d.latents.shards import CacheError, shard_file
from vae3d.seeding import seed_of

ROUNDING = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8}  # relative error of what is stored


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return caches.pictures(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def cached(photos, tmp_path_factory):
    return caches.made(photos, tmp_path_factory.mktemp("cached") / "cache", flip=True, dtype="fp32")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("spatial", "fp32"), ("spatial", "fp16"), ("wan", "bf16"), ("temporal_vae", "fp16"), ("taehv", "fp32")],
)
def test_cached_latents_are_those_of_a_batch_and_of_encoding_on_the_fly(name, dtype, videos, tmp_path):
    ours = caches.codec(name)
    table = pd.read_csv(videos)[:4].assign(path=lambda t: [str(videos.parent / path) for path in t["path"]])
    table.to_csv(tmp_path / "few.csv", index=False)
    job = caches.job(tmp_path / "few.csv", tmp_path / "cache", ours, frames=5, dtype=dtype, shard_size=3)
    caches.encode_cache(job)
    cache = LatentCache(tmp_path / "cache", ours, seed=7, transform={"height": 16, "frames": 5})
    clips = torch.cat([caches.pixels(job, number) for number in range(4)])
    batch, raw = ours.moments(clips), ours.raw_moments(clips)
    positions = [11, 5, 8, 20]
    generators = [torch.Generator().manual_seed(seed_of(7, position, "noise")) for position in positions]
    flying = ours.encode(clips, "sample", generators)
    scale = ours.scale(flying)
    off_mean = ROUNDING[dtype] * raw.mean.abs() / scale + 1e-6
    off_std = ROUNDING[dtype] * (flying - batch.mean).abs() + 1e-6
    for place, position in enumerate(positions):
        kept, drawn = cache.moments(place), cache[place, position]
        assert ((kept.mean - batch.mean[place]).abs() <= off_mean[place]).all()
        assert ((kept.std - batch.std[place]).abs() <= ROUNDING[dtype] * batch.std[place] + 1e-6).all()
        assert ((drawn.z - flying[place]).abs() <= off_mean[place] + off_std[place]).all()
        assert torch.equal(drawn.z, cache[place, position].z)
        assert drawn.z.dtype == torch.float32
        assert drawn.z.shape == ours.latent_shape(5, 16, 16)
    assert torch.equal(cache[1].z, cache[1, 1].z)
    assert (name == "taehv") == torch.equal(cache[1, 0].z, cache[1, 1].z)  # only of it there is nothing to draw
    assert cache.index["fps"].tolist() == [24.0] * 4


def test_samples_are_the_same_on_every_device(monkeypatch):
    """A cache draws on the CPU; what is encoded as needed comes from the device of training."""
    draw, devices = torch.randn, []
    monkeypatch.setattr(torch, "randn", lambda *a, **told: (devices.append(str(told["device"])), draw(*a, **told))[1])
    data = SimpleNamespace(sample=True, plan=SimpleNamespace(seed=0), codec=caches.codec())
    data.codec.moments = lambda pixels: Moments(*torch.zeros(2, 2, 4, 1, 8, 8, device="meta"))
    batch = Batch(torch.zeros(2, 3, 1, 16, 16, dtype=torch.uint8), torch.zeros(2), [3, 4], [])
    assert LatentData.latents(data, batch, torch.device("meta")).device.type == "meta"
    assert devices == ["cpu", "cpu"]


def test_a_mirrored_entry_is_the_mirrored_image_encoded(photos, cached):
    ours, cache = caches.codec(), LatentCache(cached, mode="mean")
    job = caches.job(photos, cached)
    keys = list(cache.index["key"])
    assert len(cache) == 12
    place = keys.index("dog/1.png")
    number = [item.key for item in job.items].index("dog/1.png")
    mirrored = ours.encode(caches.pixels(job, number).flip(-1))[0]
    torch.testing.assert_close(cache[keys.index("dog/1.png#flip")].z, mirrored, rtol=1e-5, atol=1e-6)
    assert (cache[place].z.flip(-1) - mirrored).abs().max() > 0.01
    assert len(LatentCache(cached, flips=False)) == 6


def test_entries_know_their_classes_and_travel_to_workers(cached):
    cache = LatentCache(cached)
    assert cache.classes == ["cat", "dog"]
    assert [cache[i].label for i in (0, 11)] == [0, 1]
    assert cache[0].key == "cat/0.png"
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy[3].z, cache[3].z)
    loader = torch.utils.data.DataLoader(cache, batch_size=3)
    z, label, key = next(iter(loader))
    assert (z.shape, label.tolist(), len(key)) == ((3, 4, 1, 8, 8), [0, 0, 0], 3)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "", "a"], ["a", "b"]),
        (["3", "0"], ["0", "1", "2", "3"]),
        (["01", "2"], ["01", "2"]),
        (["123456789"], ["123456789"]),
        ([""], []),
    ],
)
def test_labels_that_are_numbers_are_the_numbers_of_classes(labels, classes):
    assert class_names(labels) == classes


def test_means_and_samples_alone_can_be_kept(photos, tmp_path):
    moments = LatentCache(caches.made(photos, tmp_path / "moments", dtype="fp32"))
    means = LatentCache(caches.made(photos, tmp_path / "means", store="mean", dtype="fp32"))
    samples = LatentCache(caches.made(photos, tmp_path / "samples", store="sample", dtype="fp32"))
    assert (moments.mode, means.mode, samples.mode) == ("sample", "mean", "sample")
    kept = moments.moments(2)
    torch.testing.assert_close(means[2].z, kept.mean)
    assert torch.equal(means[2, 0].z, means[2, 1].z)
    assert torch.equal(samples[2, 0].z, samples[2, 1].z)
    noise = (samples[2].z - kept.mean) / kept.std
    assert 0.8 < noise.std() < 1.2
    for folder, mode, message in [
        ("means", "sample", "mode is sample, but .* stores mean; use mean"),
        ("samples", "mean", "stores sample; use sample"),
    ]:
        with pytest.raises(CacheError, match=message):
            LatentCache(tmp_path / folder, mode=mode)
    assert means.statistics["std"] == means.statistics["std_of_mean"]
    spread = moments.statistics
    assert all(a > b for a, b in zip(spread["std"], spread["std_of_mean"], strict=True))


# ---- what is refused


def test_another_autoencoder_is_refused_by_name_but_not_another_decoder_or_scale(cached):
    ours = caches.codec()
    for parameter in ours.model.parts()["decoder"][1].parameters():
        parameter.data += 1
    ours.model.scaling_factor, ours.model.spec = 0.5, families.tiny.model("spatial", "model.scaling_factor=0.5").spec
    LatentCache(cached, ours)
    for parameter in ours.model.parts()["encoder"][0].parameters():
        parameter.data += 1
    with pytest.raises(
        CacheError,
        match=r"latents of another autoencoder, runs/x \(SpatialVAE\): the encoder's weights have sha256 \w+ there and",
    ):
        LatentCache(cached, ours)


def test_settings_of_the_model_that_change_latents_are_compared(photos, tmp_path):
    config = {"_target_": "x", "micro_frames": 17, "scale": [1.0], "spatial": {"scaling_factor": 0.1, "frame_batch": 4}}
    caches.made(photos, tmp_path / "cache", caches.codec("temporal_vae", config=config))
    same = {**config, "scale": [2.0], "decoder_channels": 3, "spatial": {"scaling_factor": 0.1, "frame_batch": 1}}
    LatentCache(tmp_path / "cache", caches.codec("temporal_vae", config=same))
    other = {**config, "micro_frames": None, "spatial": {"scaling_factor": 0.2}}
    with pytest.raises(
        CacheError, match=r"micro_frames is 17 there and None here, spatial.scaling_factor is 0.1 there and 0.2 here"
    ):
        LatentCache(tmp_path / "cache", caches.codec("temporal_vae", config=other))


def test_new_factors_of_the_model_count_at_once(cached):
    ours = caches.codec()
    before = LatentCache(cached, ours, mode="mean")[0].z
    raw = (
        before * before.new_tensor(ours.model.spec.scale)[:, None, None, None]
        + before.new_tensor(ours.model.spec.shift)[:, None, None, None]
    )
    other = LatentCodec(
        families.tiny.model("spatial", "model.scaling_factor=0.25", "+model.shift_factor=3"), pixel_range="uint8"
    )
    torch.testing.assert_close(LatentCache(cached, other, mode="mean")[0].z, (raw - 3) * 0.25, rtol=1e-5, atol=1e-5)


def test_another_transform_is_refused_by_name(cached):
    with pytest.raises(
        CacheError, match="latents of another transform: fps is None there and 8 here, height is 16 there and 32 here"
    ):
        LatentCache(cached, transform={"height": 32, "width": 16, "fps": 8})


def test_a_mixture_is_refused_by_name(photos, cached, tmp_path):
    mixed = shutil.copytree(cached, tmp_path / "mixed")
    other = caches.made(photos, tmp_path / "other", flip=True, dtype="fp16")
    for file in (other / "shards").glob("00001*"):
        shutil.copy(file, mixed / "shards")
    with pytest.raises(
        CacheError, match=r"mixed/shards/00001.safetensors belongs to another cache .* caches cannot be mixed"
    ):
        LatentCache(mixed)


def test_damage_is_found(cached, tmp_path):
    hurt = shutil.copytree(cached, tmp_path / "hurt")
    file = shard_file(hurt, 1)
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[-1] ^= 1
    file.write_bytes(changed)
    LatentCache(hurt)
    with pytest.raises(
        CacheError,
        match=r"00001.safetensors is not what was written: its sha256 differs; delete .*00001.json and encode again",
    ):
        LatentCache(hurt, verify=True)
    file.write_bytes(whole[:-7])
    with pytest.raises(CacheError, match=rf"has {len(whole) - 7} bytes; {len(whole)} were written"):
        LatentCache(hurt)
    file.unlink()
    with pytest.raises(CacheError, match=r"00001.safetensors is missing"):
        LatentCache(hurt)
    file.write_bytes(b"\0" * len(whole))
    with pytest.raises(CacheError, match=r"00001.safetensors cannot be read"):
        LatentCache(hurt)[4]
    rows = (hurt / "index.csv").read_text().splitlines()
    file.write_bytes(whole)
    (hurt / "index.csv").write_text("\n".join(rows[:-1]))
    with pytest.raises(CacheError, match=r"index.csv has 11 rows; 12 were written"):
        LatentCache(hurt)
    (hurt / "complete.json").unlink()
    with pytest.raises(CacheError, match="is not complete; the command that began it goes on with it"):
        LatentCache(hurt)
    with pytest.raises(CacheError, match="is no latent cache"):
        LatentCache(tmp_path)


def test_a_split_can_be_read_alone(photos, tmp_path):
    table = pd.DataFrame(
        {"path": [f"cat/{i}.png" for i in range(3)], "split": ["train", "val", "train"], "label": [2, None, 0]}
    )
    table.to_csv(photos / "table.csv", index=False)
    folder = caches.made(photos / "table.csv", tmp_path / "cache")
    assert [entry.label for entry in LatentCache(folder)] == [2, NONE, 0]
    assert [entry.key for entry in LatentCache(folder, split="val")] == ["cat/1.png"]
    with pytest.raises(CacheError, match="has no entries of split test"):
        LatentCache(folder, split="test")
