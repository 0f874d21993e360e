"""The job that makes a cache: which clips, killed and gone on with, by several processes, with files that are broken."""

from __future__ import annotations

import json
import os
import signal
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

import vae3d
from tests import tiny
from tests.latents import caches
from tests.stream_stub import StreamStub
from vae3d.arguments import ArgumentError
from vae3d.commands import encode as encode_command
from vae3d.commands.encode import padding
from vae3d.config.issues import ConfigError
from vae3d.config.latents import check_encoding
from vae3d.data.decoding.frame_source import FrameSource
from vae3d.data.media import DataError
from vae3d.data.sources.folder import Folder
from vae3d.data.sources.image_folder import ImageFolder
from vae3d.data.sources.open_source import open_source
from vae3d.errors import UserError
from vae3d.latents import clips, encode, shards
from vae3d.latents.cache import LatentCache
from vae3d.latents.clips import ClipReader, Transform, items_of, labels_of, runs_of_files
from vae3d.latents.codec import LatentCodec
from vae3d.latents.encode import encode_cache
from vae3d.latents.shards import CacheError
from vae3d.latents.statistics import LatentStatistics
from vae3d.loading import open_codec

SMALL = Transform(**caches.SMALL)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return caches.pictures(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """Made in one go: three shards of two images and their mirror images."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    return caches.made(photos, folder, flip=True, writers=["npy", "webdataset"])


# ---- resuming


def killed(job, when):
    """Encode in a process that is killed just before the `when`-th file gets its name."""
    child = os.fork()
    if child == 0:
        count = iter(range(when))

        def killing(rename):
            def wrapped(*args):
                if next(count, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return rename(*args)

            return wrapped

        os.replace, Path.rename = killing(os.replace), killing(Path.rename)
        encode_cache(job)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("store", ["moments", "sample"])
def test_a_cache_is_the_same_where_latents_are_copied_beside_the_computation(store, tmp_path):
    source = caches.pictures(tmp_path / "pictures")
    (source / "cat/broken.png").write_bytes(b"")
    settings = {"store": store, "flip": True, "max_broken": 0.5, "shard_size": 3}
    expected = caches.files(caches.made(source, tmp_path / "cache", **settings))
    (tmp_path / "cache").rename(tmp_path / "cpu")
    with StreamStub().active() as stub:
        found = caches.files(caches.made(source, tmp_path / "cache", **settings))
    assert len(stub.host_waits) > 3
    assert found.keys() == expected.keys()
    latents = [name for name in found if name.endswith(".safetensors") and "statistics" not in name]
    assert len(latents) == 3
    assert all(found[name] == expected[name] for name in (*latents, "index.csv", "data_errors.jsonl"))


@pytest.mark.parametrize("when", [0, 1, 3, 4, 9, 12, 18])
def test_a_killed_export_is_gone_on_with_to_the_same_bytes(when, photos, whole, tmp_path):
    job = caches.job(photos, tmp_path / "cache", flip=True, writers=["npy", "webdataset"])
    assert killed(job, when)
    with pytest.raises(CacheError, match=r"not a latent cache|not complete"):
        LatentCache(tmp_path / "cache")
    done = {path: (tmp_path / "cache" / path).stat().st_mtime_ns for path in _markers(tmp_path / "cache")}
    encode_cache(job)
    assert caches.files(tmp_path / "cache") == caches.files(whole)
    assert all((tmp_path / "cache" / path).stat().st_mtime_ns == time for path, time in done.items())
    assert len(done) == {0: 0, 1: 0, 3: 0, 4: 0, 9: 1, 12: 2, 18: 3}[when]


def _markers(folder):
    return [str(file.relative_to(folder)) for file in folder.glob("shards/[0-9][0-9][0-9][0-9][0-9].json")]


def test_other_settings_are_refused_by_name(photos, whole, tmp_path):
    before = caches.files(whole)
    with pytest.raises(
        CacheError,
        match=r"other settings: dtype is fp16 there and fp32 here, transform.height is 16 there and 32 here",
    ):
        caches.made(photos, whole, flip=True, dtype="fp32", height=32, writers=["npy", "webdataset"])
    other = caches.codec()
    next(other.model.module.encoder.parameters()).data += 1
    with pytest.raises(CacheError, match=r"encoder's weights is \w+ there and \w+ here; choose another folder"):
        caches.made(photos, whole, other, flip=True, writers=["npy", "webdataset"])
    assert caches.files(whole) == before
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(CacheError, match="is not empty, and not a latent cache"):
        caches.made(photos, tmp_path)


@pytest.mark.parametrize("verify", ["stat", "hash"])
def test_latents_of_a_replaced_file_are_made_anew(verify, tmp_path, caplog):
    source = caches.pictures(tmp_path / "source")
    settings = {"verify": verify, "dtype": "fp32"}
    folder = caches.made(source, tmp_path / "cache", **settings)
    before, other = LatentCache(folder, mode="mean")[0].z, shards.shard_file(folder, 1).stat().st_mtime_ns
    file = source / "cat/0.png"
    stat, picture = file.stat(), np.asarray(Image.open(file))
    if verify == "hash":  # of one size and time, so that only its content tells
        content = bytearray(file.read_bytes())
        file.write_bytes(content)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
        caches.made(source, folder, **settings)
        assert "was replaced" not in caplog.text  # a new time alone changes nothing
    Image.fromarray(255 - picture).save(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    caches.made(source, folder, **settings)
    assert f"shard 0 is encoded again: {file} was replaced since it was encoded" in caplog.text
    assert not torch.equal(LatentCache(folder, mode="mean")[0].z, before)
    assert shards.shard_file(folder, 1).stat().st_mtime_ns == other
    anew = caches.made(source, tmp_path / "anew", **settings)
    assert caches.files(folder) == caches.files(anew)


def test_hashes_are_asked_of_a_cache_without_them_and_find_a_flipped_bit(photos, tmp_path, caplog):
    folder = caches.made(photos, tmp_path / "cache")
    caches.made(photos, folder, verify="hash")
    assert "was encoded without verify=hash" in caplog.text
    caplog.clear()
    caches.made(photos, folder, verify="hash")
    assert "encoded again" not in caplog.text
    file = shards.shard_file(folder, 0)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
    caches.made(photos, folder, verify="hash")
    assert "sha256 differs" in caplog.text
    assert file.read_bytes() == content
    marker = shards.marker_file(folder, 1)
    whole = marker.read_text()
    marker.write_text(whole.replace("cat/2.png", "cat/3.png", 1))
    caplog.clear()
    caches.made(photos, folder, verify="hash")
    assert "00001.json is damaged" in caplog.text
    assert marker.read_text() == whole


def test_a_cache_is_not_written_through_a_link(photos, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/shards").symlink_to(tmp_path)
    with pytest.raises(CacheError, match=r"cache/shards is a symbolic link"):
        caches.made(photos, tmp_path / "cache")


def test_a_damaged_shard_is_made_anew(photos, whole, tmp_path):
    folder = caches.made(photos, tmp_path / "cache", flip=True, writers=["npy", "webdataset"])
    file = shards.shard_file(folder, 1)
    file.write_bytes(file.read_bytes()[:100])
    encode_cache(caches.job(photos, folder, flip=True, writers=["npy", "webdataset"]))
    assert caches.files(folder) == caches.files(whole)


@pytest.mark.parametrize("writers", [[], ["webdataset"]])
def test_labels_that_were_changed_need_no_second_export(writers, tmp_path):
    source = caches.pictures(tmp_path / "source")
    table = pd.DataFrame({"path": [f"cat/{i}.png" for i in range(3)], "label": ["a", "b", "a"]})
    table.to_csv(source / "table.csv", index=False)
    settings = {"flip": True, "writers": writers}
    folder = caches.made(source / "table.csv", tmp_path / "cache", **settings)
    latents = shards.shard_file(folder, 0).read_bytes()
    table.assign(label=["a", "b", "c"], split=["train", "val", "train"]).to_csv(source / "table.csv", index=False)
    caches.made(source / "table.csv", folder, **settings)
    cache = LatentCache(folder)
    assert [cache.classes[label] for label in cache.labels] == ["a", "a", "b", "b", "c", "c"]
    assert cache.index["split"].tolist() == ["train", "train", "val", "val", "train", "train"]
    assert shards.shard_file(folder, 0).read_bytes() == latents
    anew = caches.files(caches.made(source / "table.csv", tmp_path / "anew", **settings))
    now = caches.files(folder)
    assert {file for file in anew if anew[file] != now[file]} <= set(_markers(folder))  # which tell of the first time


# ---- statistics and other layouts


def test_statistics_are_those_of_all_entries_in_one_pass(whole):
    cache, reference = LatentCache(whole), LatentStatistics(4)
    for place in range(len(cache)):
        moments = cache.moments(place)
        reference.update(moments.mean * cache.latents_std + cache.latents_mean, moments.std * cache.latents_std)
    told, expected = cache.statistics, reference.summary()
    assert told["clips"] == 12
    for name in ("mean", "std", "posterior_std", "covariance_eigenvalues"):
        np.testing.assert_allclose(told[name], expected[name], rtol=1e-5)


def test_npy_and_webdataset_hold_the_same(whole):
    cache = LatentCache(whole, mode="mean")
    assert len(list((whole / "npy").rglob("*.npy"))) == 24
    for row in cache.index.itertuples():
        kept = caches.array((whole / f"npy/{row.shard:05d}/{row.number:09d}.mean.npy").read_bytes())
        torch.testing.assert_close((kept - cache.latents_mean) / cache.latents_std, cache[row.Index].z)
        with tarfile.open(whole / f"webdataset/{row.shard:05d}.tar") as tar:
            assert torch.equal(caches.array(tar.extractfile(f"{row.number:09d}.mean.npy").read()), kept)
            assert json.load(tar.extractfile(f"{row.number:09d}.json"))["key"] == row.key


# ---- clips


def entries(table, root, transform=SMALL, **settings):
    frame = pd.DataFrame(table)
    frame.to_csv(root / "table.csv", index=False)
    return items_of(open_source(root / "table.csv").table(), transform, **settings)


def test_parts_and_windows_of_a_file_are_entries_of_their_own(tmp_path):
    tiny.write_video(tmp_path / "a.mp4", tiny.frames(22), codec="libx264rgb", pixels="rgb24", crf="0")
    table = {"path": ["a.mp4", "./a.mp4"], "start": [None, 0.25], "end": [None, 0.75]}
    items, errors = entries(table, tmp_path, Transform(16, 16, frames=5, clips="all"))
    assert not errors
    keys = [item.key for item in items]
    assert keys == [
        "a.mp4[0:5]",
        "a.mp4[5:10]",
        "a.mp4[10:15]",
        "a.mp4[15:20]",
        "./a.mp4@0.25-0.75[0:5]",
        "./a.mp4@0.25-0.75[5:10]",
    ]
    size = {"height": 32, "width": 40, "clips": "all"}
    job = caches.job(tmp_path / "table.csv", tmp_path / "cache", frames=5, **size)
    assert [numbers(job, n) for n in (0, 1)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert numbers(job, 4) == [6, 7, 8, 9, 10]
    thinned = caches.job(tmp_path / "table.csv", tmp_path / "cache", frames=3, stride=3, **size)
    assert [item.key for item in thinned.items] == ["a.mp4[0:3]", "a.mp4[3:6]", "./a.mp4@0.25-0.75[0:3]"]
    assert [numbers(thinned, n) for n in (0, 1)] == [[0, 3, 6], [9, 12, 15]]


def numbers(job, item):
    """Which frames a clip has, by their grey patches."""
    return (caches.pixels(job, item)[0, 0, :, 0, 0] // 5).tolist()


def test_rows_that_are_the_same_clip_are_refused(tmp_path):
    for table, message in [
        ({"path": ["a.png", "b.png", "./a.png"]}, "rows 1 and 3 are the same clip, a.png"),
        ({"path": ["a.png#flip", "a.png"]}, "row 1: a.png#flip has the name of a mirrored clip"),
    ]:
        with pytest.raises(DataError, match=message):
            entries(table, tmp_path)
    items, _ = entries({"path": ["x/a.png", "y/a.png"]}, tmp_path)
    assert [item.key for item in items] == ["x/a.png", "y/a.png"]


def test_labels_come_from_a_column_or_a_folder(tmp_path):
    table = {"path": ["cat/a.png", "train/b.png", "c.png"]}
    assert [item.label for item in entries(table, tmp_path)[0]] == ["cat", "", ""]
    assert [item.label for item in entries(table, tmp_path, labels="none")[0]] == ["", "", ""]
    with pytest.raises(DataError, match="the source has no column `label`"):
        entries(table, tmp_path, labels="column")
    assert [item.label for item in entries({**table, "label": [3, None, 0]}, tmp_path)[0]] == ["3", "", "0"]
    assert [item.label for item in entries({**table, "label": ["x", None, 0]}, tmp_path, labels="folder")[0]] == [
        "cat",
        "",
        "",
    ]
    with pytest.raises(DataError, match="no file of the source is in a class folder"):
        entries({"path": ["train/b.png", "c.png"]}, tmp_path, labels="folder")
    clips = [{"path": "a.mp4", "label": 7}, {"path": "b.mp4", "label": "dog"}, {"path": "c.mp4"}]
    (tmp_path / "clips.json").write_text(json.dumps(clips))
    assert labels_of(open_source(tmp_path / "clips.json").table(), "auto") == ["7", "dog", ""]


def test_files_of_their_own_size_and_length_make_latents_of_theirs(tmp_path):
    tiny.write_video(tmp_path / "long.mp4", tiny.frames(7, 16, 24))
    Image.fromarray(tiny.frames(1, 18, 16)[0]).save(tmp_path / "image.png")
    folder = caches.made(tmp_path, tmp_path / "cache", caches.codec("wan"), height=None, width=None)
    cache = LatentCache(folder)
    assert dict(zip(cache.index["key"], cache.index["latent"], strict=True)) == {
        "image.png": "4x1x9x8",
        "long.mp4": "4x4x8x12",
    }
    assert cache.statistics["other_frames"]["count"] == 3 * 8 * 12
    assert cache[1].z.shape == (4, 4, 8, 12)


# ---- broken files


def test_files_of_a_size_that_the_model_does_not_take_are_told(tmp_path):
    codec = LatentCodec(tiny.model("wan", "model.pad_w=circular"), pixel_range="uint8")
    for width in (16, 17):
        Image.fromarray(tiny.frames(1, 16, width)[0]).save(tmp_path / f"{width}.png")
    folder = caches.made(tmp_path, tmp_path / "cache", codec, height=None, width=None, max_broken=0.5)
    (error,) = [json.loads(line) for line in (folder / "data_errors.jsonl").read_text().splitlines()]
    assert error["key"] == "17.png"
    assert "at 16x17: the width is 17; with pad_w=circular" in error["reason"]
    assert list(LatentCache(folder).index["key"]) == ["16.png"]
    with pytest.raises(UserError, match="the width is 17"):  # before a clip is read
        padding(codec, Transform(16, 17, frames=5))


def test_broken_files_are_told_and_can_be_tried_again(photos, tmp_path):
    source = caches.pictures(tmp_path / "source")
    (source / "cat/1.png").write_bytes(b"no image")
    tiny.write_video(source / "cat/short.mp4", tiny.frames(3))
    Image.fromarray(tiny.frames(1)[0]).save(source / "cat/z.png")
    settings = {"frames": 1, "max_broken": 0.5}
    folder = caches.made(source, tmp_path / "cache", **settings)
    errors = [json.loads(line) for line in (folder / "data_errors.jsonl").read_text().splitlines()]
    assert [error["key"] for error in errors] == ["cat/1.png"]
    assert "is not an image" in errors[0]["reason"]
    cache = LatentCache(folder)
    assert len(cache) == 7
    Image.fromarray(tiny.frames(1)[0]).save(source / "cat/1.png")
    encode_cache(caches.job(source, folder, **settings))
    assert len(LatentCache(folder)) == 8  # a mended file is another one
    encode_cache(caches.job(source, folder, retry=True, **settings))
    assert len(LatentCache(folder)) == 8
    assert (folder / "data_errors.jsonl").read_text() == ""
    Image.fromarray(tiny.frames(1)[0]).save(source / "cat/new.png")
    with pytest.raises(CacheError, match=rf"cache was begun with 8 clips, and {source} now has 9: files were added"):
        encode_cache(caches.job(source, folder, **settings))
    with pytest.raises(CacheError, match="other settings: dtype is fp16 there and fp32 here; choose"):
        encode_cache(caches.job(source, folder, **settings, dtype="fp32"))


def test_too_many_broken_files_stop_the_job(tmp_path):
    source = caches.pictures(tmp_path / "source")
    tiny.write_video(source / "cat/short.mp4", tiny.frames(3))
    with pytest.raises(
        CacheError,
        match=r"3 of 7 clips cannot be encoded, more than max_broken=0.3; the first:\n  .*0.png: gives 1 frame; frames=3",
    ):
        caches.made(source, tmp_path / "cache", frames=3, max_broken=0.3)
    assert not (tmp_path / "cache/complete.json").exists()
    table = pd.DataFrame({"path": ["cat/0.png", "", "cat/1.png"], "fps": [0, 0, -1]})
    table.to_csv(source / "table.csv", index=False)
    folder = tmp_path / "table"
    with pytest.raises(
        CacheError,
        match=r"(?s)2 of 3 clips .* row 2 has no `path`.* row 3 `fps` is no positive number.*data_errors.jsonl lists all",
    ):
        caches.made(source / "table.csv", folder)
    caches.made(source / "table.csv", folder, max_broken=0.9)
    assert len(LatentCache(folder)) == 1
    assert len((folder / "data_errors.jsonl").read_text().splitlines()) == 2


def test_a_full_disk_is_told_with_the_file(photos, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(shards, "save_tensors", full)
    with pytest.raises(CacheError, match=r"shards/00000.safetensors: No space left on device; .* command"):
        caches.made(photos, tmp_path)


def test_latents_that_are_not_finite_are_errors_of_their_clips(photos, tmp_path):
    ours = caches.codec()
    ours.model.module.quant_conv.bias.data[0] = 1e6  # beyond fp16
    with pytest.raises(CacheError, match="hold NaN or values beyond the range of fp16"):
        caches.made(photos, tmp_path / "cache", ours)


# ---- the command


def test_the_command_encodes_and_its_codec_reads(spatial_export, photos, tmp_path):
    arguments = [
        f"checkpoint={spatial_export}",
        f"source={photos}",
        f"cache={tmp_path / 'cache'}",
        "height=16",
        "width=16",
        "workers=0",
    ]
    encode_command.run(check_encoding(tiny.compose(*arguments, "flip=true", config="latents")))
    ours = open_codec(spatial_export, pixel_range="uint8")
    cache = LatentCache(tmp_path / "cache", ours, mode="mean")
    assert len(cache) == 12
    assert cache.meta["vae"]["checkpoint"] == str(spatial_export)
    job = caches.job(photos, tmp_path / "cache", ours)
    torch.testing.assert_close(cache[0].z, ours.encode(caches.pixels(job, 0))[0], rtol=1e-3, atol=1e-3)
    image = caches.pixels(job, 0)
    assert ours.decode(ours.encode(image), 1).shape == image.shape
    node = [f"++source._target_={Folder.__module__}.Folder", f"++source.path={photos}/cat"]
    told = [a for a in arguments if not a.startswith(("source", "cache"))]
    config = check_encoding(tiny.compose(*told, *node, f"cache={tmp_path / 'node'}", config="latents"))
    encode_command.run(config)
    assert LatentCache(tmp_path / "node").classes == []
    node = {"_target_": "vae3d.data.sources.rooms.ErpRooms", "root": str(photos), "min_frames": "x"}
    with pytest.raises(ArgumentError, match=r"^source\.min_frames is 'x'"):
        encode_command.run(replace(config, source=node))


def test_latents_in_half_precision_on_a_cpu(spatial_export, photos, tmp_path):
    latents = {}
    for precision in ("fp32", "bf16"):
        given = [f"checkpoint={spatial_export}", f"source={photos}", f"cache={tmp_path / precision}", "dtype=fp32"]
        size = ["height=16", "width=16", "workers=0", "device=cpu", f"precision={precision}"]
        encode_command.run(check_encoding(tiny.compose(*given, *size, config="latents")))
        cache = LatentCache(tmp_path / precision, mode="mean")
        assert cache.meta["precision"] == {"fp32": "float32", "bf16": "bfloat16"}[precision]
        latents[precision] = cache[0].z
    error = (latents["bf16"] - latents["fp32"]).norm() / latents["fp32"].norm()
    assert 0 < error < 0.05


def test_latents_in_tiles(tmp_path):
    """Exact tiles change no latents and no identity; blended ones are part of it."""
    caches.pictures(tmp_path / "photos", count=1, classes=("cat",))
    export = tmp_path / "export"
    vae3d.save(tiny.model("taesd", "model.variant=taef2"), export)

    def encoded(name, *tiles):
        given = [f"checkpoint={export}", f"source={tmp_path / 'photos'}", f"cache={tmp_path / name}", "workers=0"]
        sizes = ["height=8", "width=121", "dtype=fp32"]
        encode_command.run(check_encoding(tiny.compose(*given, *sizes, *tiles, config="latents")))
        cache = LatentCache(tmp_path / name, mode="mean")
        return cache[0].z, cache.meta

    whole, meta = encoded("whole")
    exact, exact_meta = encoded("exact", "tile=8")
    blended, blended_meta = encoded("blended", "tile=32", "tile_overlap=16")
    torch.testing.assert_close(exact, whole, rtol=0, atol=1e-5)
    assert exact_meta["digest"] == meta["digest"]
    assert (blended - whole).abs().max() > 1e-4
    assert blended_meta["tiles"] == "blended tiles of 32 x 32, overlapping by 16"
    with pytest.raises(CacheError, match="other settings: tiles is None there and blended tiles of 64"):
        encoded("whole", "tile=64", "tile_overlap=16")
    with pytest.raises(ConfigError, match="tile_overlap=16: needs tile"):
        encoded("whole", "tile_overlap=16")


def test_folders_of_splits_are_those_that_training_sees(spatial_export, tmp_path):
    for split in ("train", "test"):
        caches.pictures(tmp_path / "set" / split, count=1)
    Image.fromarray(tiny.frames(1)[0]).save(tmp_path / "set/stray.png")
    given = [f"checkpoint={spatial_export}", f"source={tmp_path / 'set'}", f"cache={tmp_path / 'cache'}", "workers=0"]
    encode_command.run(check_encoding(tiny.compose(*given, "height=16", "width=16", config="latents")))
    index, reference = LatentCache(tmp_path / "cache").index, ImageFolder(tmp_path / "set").table()
    assert index["key"].tolist() == reference["name"].tolist()
    assert index["split"].tolist() == reference["split"].tolist() == ["val", "val", "train", "train"]
    assert index["label"].tolist() == ["cat", "dog"] * 2


def test_clips_that_are_filled_up_are_told():
    codec = caches.codec("wan")
    assert padding(codec, Transform(16, 16, frames=5)) == padding(codec, Transform()) == []
    assert padding(codec, Transform(16, 17, frames=4)) == [
        "width=17 is padded to a multiple of 2",
        "frames=4 is padded with extra frames; without: 1, 3, 5, 7",
    ]


def test_all_errors_of_a_configuration_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        check_encoding(
            tiny.compose(
                "source=/nowhere", "height=16", "dtype=bf16", "writers=[npy]", "clips=all", "shard_size=0", "store=all",
                "colour=red", config="latents",
            )
        )  # fmt: skip
    told = str(error.value)
    for part in (
        "checkpoint: required", "cache: required; set cache=FOLDER", "source=/nowhere: ", "height=16: ", "writers=[npy]: ",
        "clips=all: ", "shard_size=0: ", "store=all: must be moments, mean or sample", "colour: unknown key",
    ):  # fmt: skip
        assert part in told
    with pytest.raises(ConfigError, match=r"source=.*: must be a path, or a node with `_target_`"):
        check_encoding(tiny.compose("checkpoint=.", "cache=x", "source={path: photos}", config="latents"))


def test_workers_read_runs_of_the_clips_of_a_file(monkeypatch):
    items = [SimpleNamespace(path=path) for path in "aaaaabbc"]
    assert list(runs_of_files(items, iter(range(8)), 3)) == [[0, 1, 2], [3, 4], [5, 6], [7]]
    monkeypatch.setattr(encode, "shared_memory_free", lambda: 2**26)  # of a container of Docker
    assert [encode._clips_together(size, 4) for size in (2**28, 2**20, 2**10, 0)] == [1, 2, 16, 1]
    monkeypatch.setattr(encode, "shared_memory_free", lambda: None)
    assert [encode._clips_together(2**20, workers) for workers in (4, 0)] == [16, 1]


def test_the_clips_of_one_file_decode_no_frame_twice(tmp_path, monkeypatch):
    tiny.write_video(tmp_path / "a.mp4", tiny.frames(40), bf="3", g="20")
    transform = Transform(32, 40, frames=5, clips="all")
    items, _ = items_of(Folder(tmp_path).table(), transform, labels="none")
    whole, decoded = FrameSource.decode, Counter()

    def decode(*args, **kwargs):
        for number, frames in whole(*args, **kwargs):
            decoded[number] += 1
            yield number, frames

    monkeypatch.setattr(FrameSource, "decode", decode)
    reader = ClipReader(items, transform)
    for number in range(8):
        assert reader[number].pixels is not None
    assert set(range(40)) <= decoded.keys()
    assert set(decoded.values()) == {1}


def test_the_clips_of_one_file_open_it_once(tmp_path, monkeypatch):
    source = tiny.frames(20)
    tiny.write_video(tmp_path / "a.mp4", source)
    transform = Transform(32, 40, frames=5, clips="all")
    items, _ = items_of(Folder(tmp_path).table(), transform, labels="none")
    opened, open_frames = [], clips.open_frames
    monkeypatch.setattr(clips, "open_frames", lambda path, *args: opened.append(path) or open_frames(path, *args))
    reader = ClipReader(items, transform)
    for number in range(4):
        expected = torch.from_numpy(source[5 * number : 5 * number + 5]).permute(3, 0, 1, 2).float()
        assert (reader[number].pixels.float() - expected).abs().mean() < 8
    assert len(opened) == 1
