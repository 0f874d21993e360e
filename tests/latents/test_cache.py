"""A cache gives what encoding on the fly gives, and only of the autoencoder and the transform that it is asked for."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.latents import caches, families
from vae3d.diffusion.data import Batch, LatentData
from vae3d.hashing import file_hash
from vae3d.latents.cache import NO_LABEL, LatentCache, class_names
from vae3d.latents.codec import LatentCodec, Moments
from vae3d.latents.shards import CacheError, checksum, shard_file
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
    scale = ours.latents_std(flying)
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
    data = SimpleNamespace(sample=True, schedule=SimpleNamespace(seed=0), codec=caches.codec())
    data.codec.moments = lambda pixels: Moments(*torch.zeros(2, 2, 4, 1, 8, 8, device="meta"))
    batch = Batch(torch.zeros(2, 3, 1, 16, 16, dtype=torch.uint8), torch.zeros(2), [3, 4], [])
    assert LatentData.latents(data, batch, torch.device("meta")).device.type == "meta"
    assert devices == ["cpu", "cpu"]


def test_noise_does_not_depend_on_the_type_of_the_index(cached):
    cache = LatentCache(cached)
    for one in (np.int64(1), torch.tensor(1), (torch.tensor(1), np.int32(1))):
        assert torch.equal(cache[one].z, cache[1].z)


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
        ("means", "sample", "mode=sample: .* stores mean; use mode=mean$"),
        ("samples", "mean", "mode=mean: .* stores sample; use mode=sample, in a training vae.sample=true"),
    ]:
        with pytest.raises(CacheError, match=message):
            LatentCache(tmp_path / folder, mode=mode)
    assert means.statistics["std"] == means.statistics["std_of_mean"]
    spread = moments.statistics
    assert all(a > b for a, b in zip(spread["std"], spread["std_of_mean"], strict=True))


# ---- what is refused


def test_another_autoencoder_is_refused_by_name_but_not_another_decoder_or_scale(cached):
    ours = caches.codec()
    for parameter in ours.model.trainable_parts()["decoder"][1].parameters():
        parameter.data += 1
    ours.model.scaling_factor, ours.model.spec = 0.5, families.tiny.model("spatial", "model.scaling_factor=0.5").spec
    LatentCache(cached, ours)
    for parameter in ours.model.trainable_parts()["encoder"][0].parameters():
        parameter.data += 1
    with pytest.raises(
        CacheError,
        match=r"latents of another autoencoder, runs/x \(SpatialVAE\): the encoder's weights have sha256 \w+ there and",
    ):
        LatentCache(cached, ours)


def test_settings_of_the_model_that_change_latents_are_compared(photos, tmp_path):
    config = {
        "_target_": "x",
        "micro_frames": 17,
        "latents_std": [1.0],
        "spatial": {"scaling_factor": 0.1, "frame_batch": 4},
    }
    caches.made(photos, tmp_path / "cache", caches.codec("temporal_vae", config=config))
    same = {**config, "latents_std": [2.0], "decoder_channels": 3, "spatial": {"scaling_factor": 0.1, "frame_batch": 1}}
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
        before * before.new_tensor(ours.model.spec.latents_std)[:, None, None, None]
        + before.new_tensor(ours.model.spec.latents_mean)[:, None, None, None]
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
    opened = LatentCache(hurt)
    with pytest.raises(
        CacheError, match=r"00001.safetensors: .* its checksum differs; .*delete .*00001.json and encode"
    ):
        _ = [opened[place].z for place in range(len(opened))]
    with pytest.raises(
        CacheError,
        match=r"00001.safetensors has changed since it was written: its sha256 differs; delete .*00001.json and encode again",
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
    with pytest.raises(CacheError, match=r"is not complete; .* again"):
        LatentCache(hurt)
    with pytest.raises(CacheError, match="is not a latent cache"):
        LatentCache(tmp_path)


def test_a_split_can_be_read_alone(photos, tmp_path):
    table = pd.DataFrame(
        {"path": [f"cat/{i}.png" for i in range(3)], "split": ["train", "val", "train"], "label": [2, None, 0]}
    )
    table.to_csv(photos / "table.csv", index=False)
    folder = caches.made(photos / "table.csv", tmp_path / "cache")
    assert [entry.label for entry in LatentCache(folder)] == [2, NO_LABEL, 0]
    assert [entry.key for entry in LatentCache(folder, split="val")] == ["cat/1.png"]
    with pytest.raises(CacheError, match="has no entries of split test"):
        LatentCache(folder, split="test")


def test_texts_with_any_line_break_are_read_as_they_were(photos, tmp_path):
    texts = ["a\rb", 'a\r\n"b"', "a\nb"]
    pd.DataFrame({"path": [f"cat/{i}.png" for i in range(3)], "text": texts}).to_parquet(photos / "table.parquet")
    folder = caches.made(photos / "table.parquet", tmp_path / "cache")
    assert LatentCache(folder).index["text"].tolist() == texts


def test_one_flipped_bit_anywhere_is_found_when_it_is_read(cached, tmp_path):
    """In the header, in names, shapes, offsets and values of a shard; in index, metadata and statistics."""
    hurt, found, right = shutil.copytree(cached, tmp_path / "hurt"), 0, entries(cached)
    shard = (hurt / "shards/00000.safetensors").read_bytes()
    length = int.from_bytes(shard[:8], "little")
    places = [0, 7, 9, *range(10, 8 + length, 23), *range(8 + length, len(shard), 977), len(shard) - 1]
    tries = [("shards/00000.safetensors", place) for place in places]
    tries += [(name, place) for name in ("index.csv", "meta.json", "statistics.json") for place in (1, 40, 333)]
    tries += [("shards/00001.statistics.safetensors", place) for place in (3, 99, 800)]
    for number, (name, place) in enumerate(tries):
        whole = (hurt / name).read_bytes()
        changed = bytearray(whole)
        changed[place] ^= 1 << number % 8
        (hurt / name).write_bytes(changed)
        try:
            assert all(map(torch.equal, entries(hurt), right)), (name, place)
        except CacheError as error:
            found += str(hurt) in str(error)
        (hurt / name).write_bytes(whole)
    # What does not change a value, such as a space at the end of a shard's header, may pass.
    assert found >= len(tries) - 2


# ---- caches that strangers write


def with_json(name: str, change):
    """A cache whose JSON file says something else, hashes and all."""

    def write(folder):
        file = folder / name
        told = json.loads(file.read_text())
        changed = change(told)
        file.write_text(json.dumps(told if changed is None else changed))
        if name in ("meta.json", "index.csv", "statistics.json"):
            sign(folder, name)

    return write


def sign(folder, name):
    complete = json.loads((folder / "complete.json").read_text())
    complete["sha256"][name] = file_hash(folder / name)
    (folder / "complete.json").write_text(json.dumps(complete))


def with_text(name: str, content: str):
    def write(folder):
        (folder / name).write_text(content)
        if name in ("meta.json", "index.csv", "statistics.json"):
            sign(folder, name)

    return write


def with_index(change):
    def write(folder):
        table = pd.read_csv(folder / "index.csv", keep_default_na=False)
        changed = change(table)
        (table if changed is None else changed).to_csv(folder / "index.csv", index=False)
        sign(folder, "index.csv")

    return write


def with_tensors(change):
    """A shard of other tensors, whose checksums and sizes are right."""

    def write(folder):
        file = folder / "shards/00000.safetensors"
        tensors = change(load_file(file))
        save_file(tensors, file)
        marker = json.loads((folder / "shards/00000.json").read_text())
        marker["files"][file.name]["bytes"] = file.stat().st_size
        (folder / "shards/00000.json").write_text(json.dumps(marker))
        table = pd.read_csv(folder / "index.csv", keep_default_na=False)
        for place in table.index[table["shard"] == 0]:
            key = table.loc[place, "key"]
            entry = {kind: tensors[f"{kind}/{key}"] for kind in ("mean", "std") if f"{kind}/{key}" in tensors}
            table.loc[place, "crc32"] = checksum(entry)
        table.to_csv(folder / "index.csv", index=False)
        sign(folder, "index.csv")

    return write


def as_link(name: str, target: str):
    def write(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return write


def as_pipe(name: str):
    def write(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return write


def setting(*path, value):
    def change(told):
        for key in path[:-1]:
            told = told[key]
        told[path[-1]] = value

    return change


def without(*path):
    def change(told):
        for key in path[:-1]:
            told = told[key]
        del told[path[-1]]

    return change


DEEP = "[" * 100_000 + "]" * 100_000
NONSENSE = [
    "",
    "null",
    "5",
    "[]",
    "{}",
    '"x"',
    "{",
    DEEP,
    '{"a": NaN}',
    "1" * 5000,
    "\ud800".encode("utf-8", "replace").decode(),
]
HOSTILE = [
    *(with_text(name, content) for name in ("meta.json", "complete.json", "statistics.json", "shards/00000.json")
      for content in NONSENSE),
    *(with_text("index.csv", content) for content in ("", "key\n", "\0\0", '"', "a,b\n1,2,3\n1\n", "x" * 100_000)),
    *(with_json("meta.json", setting(key, value=value)) for key in ("vae", "transform", "store", "dtype", "digest")
      for value in (None, 5, "../../etc", [], {})),
    *(with_json("meta.json", setting("vae", key, value=value)) for key in ("latents_mean", "latents_std", "channels", "encoder")
      for value in (None, -1, "x", [], [1e999], [[]] * 4, ["a"] * 4, 10**30)),
    *(with_json("meta.json", without("vae", key)) for key in ("latents_mean", "latents_std", "encoder", "checkpoint", "config")),
    with_json("meta.json", setting("vae", "latents_std", value=[0, 0, 0, 0])),
    *(with_json("complete.json", setting(key, value=value)) for key in ("shards", "entries")
      for value in (None, 0, -1, 10**15, 1.5, "2", [])),
    with_json("complete.json", setting("sha256", value={"../../etc/passwd": "0"})),
    with_json("complete.json", setting("sha256", "meta.json", value=7)),
    *(with_json("shards/00000.json", setting("files", value=value))
      for value in (None, [], {}, {"../../../etc/passwd": {"bytes": 1, "sha256": ""}}, {"/etc/passwd": {}})),
    *(with_json("shards/00000.json", setting("files", "00000.safetensors", value=value))
      for value in (None, {}, {"bytes": "x", "sha256": ""}, {"bytes": -1, "sha256": 5})),
    *(with_index(lambda t, column=column: t.drop(columns=column)) for column in
      ("key", "shard", "latent", "flip", "label", "crc32", "number", "split")),
    *(with_index(lambda t, column=column, value=value: t.assign(**{column: value})) for column, value in [
        ("shard", 99), ("shard", -1), ("shard", 0.5), ("shard", "../1"), ("shard", 10**25), ("latent", "4x1x8x9"),
        ("latent", "4x8"), ("latent", "-4x1x8x8"), ("latent", f"4x{10**9}x8x8"), ("latent", ""), ("key", "a"),
        ("key", ""), ("key", "../../x"), ("flip", "maybe"), ("crc32", 7), ("crc32", ""), ("crc32", 10**25),
        ("frames", "many"),
    ]),
    with_index(lambda t: t.iloc[:-1]),
    with_index(lambda t: pd.concat([t, t])),
    with_index(lambda t: t.iloc[:0]),
    *(with_json("statistics.json", setting(key, value=value)) for key in ("mean", "std", "percentiles", "scale")
      for value in (None, [], "x", {"50": [1]}, [None, 1])),
    *(with_tensors(lambda tensors, change=change: {k: change(z).contiguous() for k, z in tensors.items()}) for change in [
        torch.Tensor.half, torch.Tensor.double, torch.Tensor.int, lambda z: z[:1], lambda z: z[..., :4],
        lambda z: z[None], lambda z: z * float("nan"), lambda z: z * float("inf"), lambda z: z.flatten(),
        lambda z: z[:, :0],
    ]),
    with_tensors(lambda tensors: {f"other/{k}": z for k, z in tensors.items()}),
    with_tensors(lambda tensors: {k: z for k, z in tensors.items() if k.startswith("mean")}),
    *(with_text("shards/00000.safetensors", content) for content in ("", "x", "\xff" * 8)),
    *(as_link(name, target) for name in ("meta.json", "complete.json", "index.csv", "shards/00000.json",
      "shards/00000.safetensors") for target in ("/dev/zero", "/etc/passwd", "nowhere", ".", "/proc/self/mem")),
    *(as_pipe(name) for name in ("meta.json", "complete.json", "index.csv", "statistics.json", "shards/00000.json",
      "shards/00000.safetensors", "shards/00000.statistics.safetensors")),
    lambda folder: shutil.rmtree(folder / "shards"),
    lambda folder: (folder / "shards/00000.statistics.safetensors").unlink(),
    lambda folder: (folder / "index.csv").unlink(),
    lambda folder: (folder / "statistics.json").unlink(),
]  # fmt: skip


def test_a_hostile_cache_is_one_message_or_its_latents_are_right(cached, tmp_path):
    """Never a traceback, a hang, or latents that were not written."""
    right = entries(cached)
    refused = 0
    for number, change in enumerate(HOSTILE):
        folder = shutil.copytree(cached, tmp_path / str(number))
        change(folder)
        start = time.process_time()
        try:
            assert all(map(torch.equal, entries(folder), right)), number
        except CacheError as error:
            refused += str(folder) in str(error) and "\n" not in str(error).strip()
        assert time.process_time() - start < 2, number
        shutil.rmtree(folder)
    assert refused == len(HOSTILE) - 2  # another name of the encoder, and no transform, are no harm


def entries(folder) -> list[torch.Tensor]:
    """All that a cache gives; it is asked for its statistics too."""
    cache = LatentCache(folder, mode="mean")
    assert isinstance(cache.statistics, dict)
    return [cache[place].z for place in range(len(cache))]
