"""Caches with clips of several sizes: which bucket a file goes to, killed and gone on with, and what is refused."""

from __future__ import annotations

import os
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.latents import caches
from vae3d.commands import encode as encode_command
from vae3d.commands import latent_stats
from vae3d.commands.flags import parse_latent_stats
from vae3d.config.issues import ConfigError
from vae3d.config.latents import check_encoding
from vae3d.latents import encode
from vae3d.latents.cache import LatentCache
from vae3d.latents.encode import encode_cache
from vae3d.latents.shards import CacheError
from vae3d.latents.statistics import LatentStatistics

WIDE, TALL, IMAGE = (5, 8, 16), (5, 16, 8), (1, 12, 12)
BUCKETS = [[1, 12, 12], [5, 16, 8], [3, 8, 16], [5, 8, 16]]
SETTINGS = {"height": None, "width": None, "buckets": {"shapes": [dict(zip(("frames", "height", "width"), b, strict=True)) for b in BUCKETS]}}  # fmt: skip
SETTINGS |= {"shard_size": 4, "flip": True, "writers": ["webdataset"]}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Wide, tall and square files in turns, the sixth and seventh of 4 and 2 frames."""
    folder = tmp_path_factory.mktemp("videos")
    for i, (frames, height, width) in enumerate(
        [(12, 16, 32), (5, 32, 16), (1, 20, 20), (6, 18, 32), (1, 24, 20), (4, 16, 32), (2, 18, 32), (11, 32, 18)]
    ):
        if frames == 1:
            Image.fromarray(tiny.frames(1, height, width, seed=i)[0]).save(folder / f"{i}.png")
        else:
            tiny.write_video(folder / f"{i}.mp4", tiny.frames(frames, height, width, seed=i))
    return folder


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory):
    return caches.made(videos, tmp_path_factory.mktemp("whole") / "cache", clips="all", **SETTINGS)


def test_a_file_goes_to_the_bucket_that_keeps_most_of_it_and_has_most_frames(videos, whole):
    job = caches.job(videos, whole, **SETTINGS)
    assert {item.key: item.shape for item in job.items} == {
        "0.mp4": WIDE,
        "1.mp4": TALL,
        "2.png": IMAGE,
        "3.mp4": WIDE,
        "4.png": IMAGE,
        "5.mp4": (3, 8, 16),
        "6.mp4": IMAGE,  # 2 frames are too few for the others
        "7.mp4": TALL,
    }
    cache = LatentCache(whole)
    plain = cache.index[~cache.index["flip"]]
    assert plain["key"].tolist() == [
        *("0.mp4[0:5]", "0.mp4[5:10]", "1.mp4[0:5]", "2.png[0:1]", "3.mp4[0:5]", "4.png[0:1]", "5.mp4[0:3]"),
        *("6.mp4[0:1]", "6.mp4[1:2]", "7.mp4[0:5]", "7.mp4[5:10]"),
    ]
    assert plain["number"].tolist() == list(range(0, 22, 2))  # in the order of the source, though not encoded in it
    assert cache.meta["transform"]["buckets"] == sorted(BUCKETS)
    sizes = {
        group.size: cache.index["key"][group.entries].str.removesuffix("#flip").unique().tolist()
        for group in cache.sizes()
    }
    assert list(sizes) == [IMAGE, (3, 8, 16), WIDE, TALL]
    assert sizes[WIDE] == ["0.mp4[0:5]", "0.mp4[5:10]", "3.mp4[0:5]"]
    assert [group.latent_shape for group in cache.sizes([0, 4])] == [(4, 5, 4, 8), (4, 5, 8, 4)]


def test_pixels_keep_their_aspect_ratio(videos, whole):
    """The 18 x 32 file is resized to 9 x 16, of which the middle 8 rows stay."""
    job = caches.job(videos, whole, **SETTINGS)
    found = caches.pixels(job, 3)[0]
    assert found.shape == (3, *WIDE)
    alone = caches.job(videos, whole, **SETTINGS | {"buckets": None, "height": 8, "width": 16, "frames": 5})
    assert torch.equal(found, caches.pixels(alone, 3)[0])


def test_batches_fill_and_hold_as_many_pixels_as_those_of_the_largest_bucket(videos, tmp_path, monkeypatch):
    shapes, encode_batch = [], encode._encode_batch
    monkeypatch.setattr(
        encode,
        "_encode_batch",
        lambda job, batch: shapes.append((len(batch), *batch[0].pixels.shape[1:])) or encode_batch(job, batch),
    )
    caches.made(videos, tmp_path / "cache", **SETTINGS | {"shard_size": 8})
    assert shapes == [(3, *IMAGE), (1, 3, 8, 16), (2, *WIDE), (2, *TALL)]
    job = caches.job(videos, tmp_path / "cache", **SETTINGS)
    assert [job.clips_per_batch(shape) for shape in (WIDE, TALL, (3, 8, 16), IMAGE)] == [2, 2, 3, 8]


def _killed(job, when: int) -> bool:
    """Encode in a process that is killed just before the `when`-th file gets its name."""
    child = os.fork()
    if child == 0:
        count, replace = iter(range(when)), os.replace

        def killing(*args):
            if next(count, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(*args)

        os.replace = killing
        encode_cache(job)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("when", "ranks"), [(3, 1), (6, 2)])
def test_a_killed_cache_is_gone_on_with_to_the_same_bytes(when, ranks, videos, whole, tmp_path):
    job = caches.job(videos, tmp_path / "cache", clips="all", **SETTINGS)
    assert _killed(job, when)
    assert not (tmp_path / "cache/complete.json").exists()
    waits = []

    def wait():
        waits.append(None)
        if len(waits) == 1 and ranks == 2:
            encode_cache(job, 1, 2)

    encode_cache(job, 0, ranks, wait)
    assert caches.files(tmp_path / "cache") == caches.files(whole)


def test_statistics_are_those_of_all_sizes(whole, capsys):
    cache, reference = LatentCache(whole), LatentStatistics(4)
    for place in range(len(cache)):
        moments = cache.moments(place)
        reference.update(moments.mean * cache.latents_std + cache.latents_mean, moments.std * cache.latents_std)
    np.testing.assert_allclose(cache.statistics["std"], reference.summary()["std"], rtol=1e-5)
    latent_stats.main(parse_latent_stats([str(whole)]))
    told = capsys.readouterr().out
    assert "22 entries" in told
    assert "4 sizes: 1x12x12 (8), 3x8x16 (2), 5x8x16 (6), 5x16x8 (6)" in told
    assert latent_stats.scale_of_cache(cache, of_means=False).size is None


def test_other_buckets_are_refused_by_name_and_none_change_nothing(videos, whole, tmp_path):
    for changed in ({"shapes": SETTINGS["buckets"]["shapes"][1:]}, None):
        other = {"buckets": changed} | ({"frames": 5, "height": 8, "width": 8} if changed is None else {})
        with pytest.raises(CacheError, match=r"transform\.buckets is \[\[1, 12, 12\], "):
            caches.made(videos, whole, clips="all", **SETTINGS | other)
    plain = caches.job(videos, tmp_path, height=8, width=8)
    settings = asdict(plain.transform)
    assert settings.pop("buckets") is None
    assert plain.transform.settings_dict() == settings == plain.meta()["transform"]


def test_an_entry_whose_bucket_changes_is_encoded_again(videos, tmp_path, caplog):
    table = pd.DataFrame(
        {"path": [str(videos / name) for name in ("0.mp4", "1.mp4", "7.mp4")], "fps": 24, "num_frames": 5}
    )
    settings = SETTINGS | {"shard_size": 1, "writers": []}
    for heights, widths in (([16, 32, 32], [32, 16, 18]), ([16, 16, 32], [32, 32, 18])):  # the second one is corrected
        table.assign(height=heights, width=widths).to_csv(tmp_path / "table.csv", index=False)
        folder = caches.made(tmp_path / "table.csv", tmp_path / "cache", **settings)
    assert [text for text in caplog.messages if "again" in text] == [
        "shard 1 is encoded again: " + LatentCache(folder).index["key"][2] + " goes to another bucket, 5x8x16"
    ]
    anew = caches.made(tmp_path / "table.csv", tmp_path / "anew", **settings)
    assert caches.files(folder) == caches.files(anew)


def test_a_file_that_is_too_short_for_all_buckets_is_an_error(videos, tmp_path):
    settings = SETTINGS | {"buckets": {"shapes": SETTINGS["buckets"]["shapes"][1:]}}
    job = caches.job(videos, tmp_path / "cache", **settings)
    errors = {Path(error["path"]).name: error["reason"] for error in job.errors}
    assert errors["6.mp4"] == "gives 2 frames; the shortest bucket has 3"
    assert set(errors) == {"2.png", "4.png", "6.mp4"}


def test_a_rule_gives_sizes_of_one_area_for_the_aspect_ratios_of_the_files(videos, spatial_export, tmp_path, caplog):
    given = [f"checkpoint={spatial_export}", f"source={videos}", f"cache={tmp_path / 'cache'}", "workers=0"]
    rule = ["height=16", "width=16", "buckets={frames: [1, 5], multiple: 2}"]
    with caplog.at_level("INFO", "vae3d"):
        encode_command.run(check_encoding(tiny.compose(*given, *rule, config="latents")))
    sizes = {group.size: len(group.entries) for group in LatentCache(tmp_path / "cache").sizes()}
    assert sizes == {
        **{(1, 12, 22): 2, (1, 16, 16): 1, (1, 18, 14): 1},
        **{(5, 12, 22): 2, (5, 22, 12): 2},
    }
    assert "  5x12x22: 2 clips, 94.3% of the pixels kept" in caplog.messages  # 22 of 24 and of 21.3 columns
    paths = [str(videos / name) for name in ("0.mp4", "1.mp4")]
    table = pd.DataFrame({"path": paths, "height": [16, 32], "width": [32, 16], "split": ["val", "train"]})
    table.to_csv(tmp_path / "table.csv", index=False)
    job = caches.job(tmp_path / "table.csv", tmp_path / "other", height=16, width=16, split="val",
                     buckets={"frames": [5], "multiple": 2})  # fmt: skip
    assert job.transform.buckets == ((5, 12, 22),)


def test_errors_of_sizes_are_told_together():
    given = ["checkpoint=.", "source=.", "cache=x"]
    for settings, keys in [
        (["buckets=[[5, 8, 8], [5, 8, 8]]", "frames=5", "height=8", "width=8", "short_side=9"],
         {"frames", "height", "width", "short_side", "buckets.shapes[1]"}),
        (["buckets={frames: [5], clips_multiple: 4}", "panorama=true"],
         {"height", "width", "buckets", "buckets.clips_multiple"}),
        (["buckets={aspects: ['16:9']}", "height=8", "width=8", "clips=all"], {"buckets.frames"}),
        (["buckets=[{frames: 5, height: 8, width: 8, weight: 2}]"], {"buckets.shapes[0].weight"}),
        (["buckets=[]"], {"buckets.shapes"}),
        (["short_side=9"], {"short_side"}),  # which counted for nothing, as the next
        (["short_side=7", "height=8", "width=16"], {"short_side"}),
    ]:  # fmt: skip
        with pytest.raises(ConfigError) as error:
            check_encoding(tiny.compose(*given, *settings, config="latents"))
        assert {issue.key for issue in error.value.issues} == keys
    check_encoding(tiny.compose(*given, "short_side=9", "height=8", "width=16", config="latents"))  # of 9x18, say
