"""Many processes that make one cache: claims, processes that are killed, slow or late, and array jobs."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.latents import caches
from tests.latents.processes import exit_statuses, start, wait_for
from vae3d.commands import encode as encode_command
from vae3d.commands import encode_status, latent_stats
from vae3d.commands.cli import without_flags
from vae3d.commands.flags import parse_encode_status, parse_latent_stats
from vae3d.config.issues import ConfigError
from vae3d.config.latents import check_encoding, share_of
from vae3d.io import FileError
from vae3d.latents import claims, encode, shards
from vae3d.latents.cache import LatentCache
from vae3d.latents.cache_storage import CLAIMS, partial_statistics
from vae3d.latents.claims import Claims
from vae3d.latents.encode import encode_cache
from vae3d.latents.shards import CacheError

STALE = 2.0  # seconds; much longer than a busy machine lets a thread wait


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return caches.pictures(tmp_path_factory.mktemp("photos"), count=5)


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """Made by one process: five shards of two images."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    return caches.files(caches.made(photos, folder, writers=["npy", "webdataset"]))


@pytest.fixture
def job(photos, tmp_path):
    return caches.job(photos, tmp_path / "cache", writers=["npy", "webdataset"], stale=STALE)


def at_rename(count, what):
    """From now on, `what` is called before the `count`-th file of this process gets its name."""
    rename, calls = os.replace, iter(range(count))

    def wrapped(*args):
        if next(calls, None) is None:
            what()
        return rename(*args)

    os.replace = wrapped


# ---- claims


def test_one_of_many_processes_gets_a_claim(tmp_path):
    def race(number):
        with Claims(tmp_path / "claims", 60) as claims:
            wait_for((tmp_path / "go").exists)
            won = [name for name in map(str, range(30)) if claims.take(name)]
            (tmp_path / f"{number}.json").write_text(json.dumps(won))
            wait_for(lambda: len(list(tmp_path.glob("*.json"))) == 3)  # a claim ends with its process

    children = [start(race, number) for number in range(3)]
    (tmp_path / "go").touch()
    assert exit_statuses(children) == [0, 0, 0]
    won = [name for number in range(3) for name in json.loads((tmp_path / f"{number}.json").read_text())]
    assert sorted(won, key=int) == list(map(str, range(30)))
    assert not (tmp_path / "claims").exists()


def elsewhere(claims, name, silent):
    """Make a claim that of another machine, without a sign of life for some seconds."""
    (file,) = claims.folder.glob(f"{name}.*")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"host": "elsewhere"}))
    then = time.time() - silent
    os.utime(file, (then, then))


def test_a_stale_claim_is_taken_over_once_and_its_owner_learns_of_it(tmp_path, caplog):
    slow, one, other = (Claims(tmp_path / "claims", 60) for _ in range(3))  # without their threads
    assert slow.take("a")
    elsewhere(slow, "a", silent=50)
    assert not one.take("a")
    assert slow.owns("a")
    elsewhere(slow, "a", silent=70)
    assert one.take("a")
    assert f"a is taken over from process {os.getpid()} of elsewhere, silent for 70 s" in caplog.text
    assert not other.take("a")
    assert not slow.owns("a")
    assert one.owns("a")
    slow.release("a")
    assert one.owns("a")
    one.release("a")
    assert other.take("a")


def test_two_that_find_one_claim_stale_do_not_both_get_it(tmp_path, monkeypatch):
    dead, one, other = (Claims(tmp_path / "claims", 60) for _ in range(3))
    assert dead.take("a")
    elsewhere(dead, "a", silent=70)
    seen = other._files()
    assert one.take("a")
    monkeypatch.setattr(other, "_files", lambda: seen)  # as it was before, of a cached listing
    assert not other.take("a")


def test_a_living_process_keeps_its_claims(tmp_path):
    with Claims(tmp_path / "claims", 1.0) as owner:
        assert owner.take("a")
        elsewhere(owner, "a", silent=0)
        time.sleep(1.5)
        assert not Claims(tmp_path / "claims", 1.0).take("a")


def test_a_dead_process_of_this_machine_is_noticed_at_once(tmp_path):
    def leave():
        assert Claims(tmp_path / "claims", 3600).take("a")

    assert exit_statuses([start(leave)]) == [0]
    assert Claims(tmp_path / "claims", 3600).take("a")


def test_a_claim_that_a_full_disk_does_not_hold_blocks_nobody(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = Claims(tmp_path / "claims", 3600)
    with monkeypatch.context() as disk:
        disk.setattr(claims.json, "dump", full)
        with pytest.raises(FileError, match="No space left"):
            owner.take("a")
    assert Claims(tmp_path / "claims", 3600).take("a")


def test_the_folder_of_claims_may_vanish_at_any_time(tmp_path, monkeypatch):
    """The last of other processes removes it."""
    owner, folder = Claims(tmp_path / "claims", 3600), tmp_path / "claims"
    make, times = Path.mkdir, iter([folder.rmdir])

    def made(path, **options):
        make(path, **options)
        next(times, lambda: None)()

    monkeypatch.setattr(Path, "mkdir", made)
    assert owner._now() > 0
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    assert Claims(tmp_path / "none", 3600).holders() == []


# ---- processes


@pytest.mark.smoke
def test_three_processes_of_which_one_is_killed_make_the_bytes_of_one(job, whole):
    """With kill -9 between the latents and the marker of a shard; its claim is left."""

    def part(index):
        if index == 1:
            at_rename(
                7 if os.path.exists(job.folder / "meta.json") else 8, lambda: os.kill(os.getpid(), signal.SIGKILL)
            )
        encode_cache(job, index, 3)

    first = start(part, 1)
    wait_for((job.folder / "shards").exists)
    assert sorted(exit_statuses([first, start(part, 0), start(part, 2)])) == [-signal.SIGKILL, 0, 0]
    assert caches.files(job.folder) == whole


def test_a_process_that_stands_still_is_replaced_and_may_go_on(job, whole):
    """It wakes up when the cache is complete, and writes nothing that differs."""

    def still():
        at_rename(8, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        encode_cache(job)

    child = start(still)
    os.waitpid(child, os.WUNTRACED)
    before = shards.numbers_done(job.folder)
    assert len(before) < 5
    encode_cache(job)
    assert caches.files(job.folder).keys() >= whole.keys()
    os.kill(child, signal.SIGCONT)
    assert exit_statuses([child]) == [0]
    assert caches.files(job.folder) == whole


def test_shards_that_are_written_twice_at_once_are_the_same(job, whole, monkeypatch):
    """Three processes that do not see each other's claims encode all shards three times, over each other's files."""
    with Claims(job.folder / CLAIMS, STALE) as claims:
        digest = encode.begin(job, claims)

    def all_shards():
        for name, answer in {"take": True, "owns": True, "release": None}.items():
            monkeypatch.setattr(Claims, name, lambda *_, answer=answer: answer)
        wait_for((job.folder / "go").exists)
        with Claims(job.folder / CLAIMS, STALE) as claims:
            for _ in range(3):
                assert encode._encode_shards(job, iter(range(5)), digest, claims, True) == 5

    children = [start(all_shards) for _ in range(3)]
    (job.folder / "go").touch()
    assert exit_statuses(children) == [0, 0, 0]
    (job.folder / "go").unlink()
    encode_cache(job)
    assert caches.files(job.folder) == whole


def test_a_process_that_stood_still_while_it_completed_the_cache_finds_it_complete(job, photos, whole, monkeypatch):
    """Another took over, and deleted the unfinished files."""
    write = encode.write_text

    def taken_over(file, text):
        monkeypatch.setattr(encode, "write_text", write)
        shutil.rmtree(job.folder / CLAIMS)
        caches.made(photos, job.folder, writers=["npy", "webdataset"], stale=STALE)
        raise FileError(f"{file}: No such file or directory")

    monkeypatch.setattr(encode, "write_text", taken_over)
    assert encode_cache(job)
    assert caches.files(job.folder) == whole


def test_a_late_process_helps_and_takes_what_is_left_of_others(job, whole, caplog, capsys):
    """The first of two array jobs takes one shard and stops; the second does its share and the rest."""
    caplog.set_level(logging.INFO, "vae3d")
    job.config.wait = False
    with Claims(job.folder / CLAIMS, STALE) as claims:
        encode.begin(job, claims)
        assert claims.take(shards.claim_name(2))
        assert not encode_cache(job, 1, 2)
        assert shards.numbers_done(job.folder) == {0, 1, 3, 4}
        told = (
            f"this process encoded 4 of 5 shards; 4 are complete, the others are encoded by {os.uname().nodename} (pr"
        )
        assert told in caplog.text
        assert encode_status.main(parse_encode_status([str(job.folder)])) == 1
        printed = capsys.readouterr().out
        assert "4 of 5 shards (80%)" in printed
        assert f"shard 00002: process {os.getpid()}" in printed
        latent_stats.main(parse_latent_stats([str(job.folder), "--partial"]))
        assert "4 of 5 shards (80.0%) are complete; of these:\n" in capsys.readouterr().out
        _, numbers, statistics = partial_statistics(job.storage)
    assert (numbers, statistics.clips) == ([0, 1, 3, 4], 8)
    assert encode_cache(job, 0, 2)
    assert caches.files(job.folder) == whole
    assert encode_status.main(parse_encode_status([str(job.folder)])) == 0
    assert partial_statistics(job.storage)[2].summary() == LatentCache(job.folder).statistics


def test_the_status_of_a_cache_is_shown_without_writing_there(job, capsys):
    with Claims(job.folder / CLAIMS, STALE) as claims:
        encode.begin(job, claims)
        claims.take(shards.claim_name(2))
        folders = job.folder, job.folder / CLAIMS
        before = caches.files(job.folder), [folder.stat().st_mtime_ns for folder in folders]
        assert encode_status.main(parse_encode_status([str(job.folder)])) == 1
        assert (caches.files(job.folder), [folder.stat().st_mtime_ns for folder in folders]) == before
    assert "shard 00002: process" in capsys.readouterr().out


def test_a_process_waits_for_others_and_only_one_of_them_completes_the_cache(job, whole):
    with Claims(job.folder / CLAIMS, STALE) as claims:
        encode.begin(job, claims)
        claims.take(shards.claim_name(0))
        children = [start(encode_cache, job, index, 3) for index in (1, 2)]
        wait_for(lambda: len(shards.numbers_done(job.folder)) == 4)
        time.sleep(0.1)
        assert not (job.folder / "complete.json").exists()
        assert os.waitpid(-1, os.WNOHANG) == (0, 0)
    assert exit_statuses(children) == [0, 0]
    written = shards.stamp(job.folder / "index.csv")
    encode_cache(job, 0, 3)
    assert shards.stamp(job.folder / "index.csv") == written
    assert caches.files(job.folder) == whole


def test_a_shard_that_is_encoded_again_makes_the_cache_incomplete_until_it_is_done(job, whole, monkeypatch):
    """Another process finds it unusable while index and statistics are written."""
    encode_cache(job)
    marker = shards.marker_file(job.folder, 1)
    index = job.folder / "index.csv"
    index.unlink()
    write, again, encoded = encode.write_text, encode._encode_shards, []

    def found(path, text):
        write(path, text)
        if path == index and not encoded:
            marker.write_bytes(b"{")
            with Claims(job.folder / CLAIMS, STALE) as claims:
                encode.discard_unusable(job, [1], job.meta()["digest"])
                assert not claims.take(encode.FINISH)

    monkeypatch.setattr(encode, "write_text", found)
    monkeypatch.setattr(encode, "_encode_shards", lambda *args: encoded.append(again(*args)) or encoded[-1])
    encode_cache(job)
    assert encoded == [1]
    assert caches.files(job.folder) == whole
    assert len(LatentCache(job.folder)) == 10


def test_damage_outside_of_the_share_is_an_error_that_a_process_without_share_mends(job, whole):
    encode_cache(job)
    (job.folder / "complete.json").unlink()
    shards.statistics_file(job.folder, 1).unlink()
    with pytest.raises(CacheError, match=r"has lost shards/00001.statistics.safetensors; run .* without --shard"):
        encode_cache(job, 0, 2)
    encode_cache(job)
    assert caches.files(job.folder) == whole


# ---- array jobs


def test_the_share_of_an_array_job():
    assert without_flags(["--shard", "3/8", "height=8", "--help"], ("shard",)) == ["shard=3/8", "height=8", "--help"]
    assert without_flags(["--shard=3/8"], ("shard",)) == ["shard=3/8"]
    assert [share_of(shard) for shard in (None, "1/1", "3/8", "8/8")] == [(0, 1), (0, 1), (2, 8), (7, 8)]
    for wrong in ("0/8", "9/8", "8", "1/0", "-1/2", "a/b", ""):
        with pytest.raises(ConfigError, match=r"shard=.*must be i/n, with i from 1 to n"):
            check_encoding(tiny.compose("checkpoint=.", "source=.", "cache=x", f"shard='{wrong}'", config="latents"))


# ---- Ray


def test_ray_and_plain_processes_write_the_same_cache(photos, spatial_export, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from vae3d.commands import ray_encode

    given = [f"checkpoint={spatial_export}", f"source={photos}", "height=16", "width=16", "shard_size=2", "workers=0"]
    plain, on_ray = (
        check_encoding(tiny.compose(*given, f"cache={tmp_path / name}", config="latents")) for name in ("plain", "ray")
    )
    encode_command.run(plain)
    expected = caches.files(tmp_path / "plain")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.chdir(tiny.ROOT)  # from which its processes import
    handler = signal.getsignal(signal.SIGTERM)  # which Ray replaces
    with ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1"):
        ray.data.DataContext.get_current().enable_progress_bars = False
        ray_encode.encode(on_ray, actors=1)
    signal.signal(signal.SIGTERM, handler)
    assert caches.files(tmp_path / "ray") == expected
    # What an actor does, here: it encodes what is missing, and gives errors to the driver.
    shards.marker_file(tmp_path / "ray", 1).unlink()
    batch = {"id": np.array([1])}
    assert ray_encode.ShardEncoder(on_ray, str(tiny.ROOT))(batch) == {"id": [1], "error": [""]}
    encode_command.run(on_ray)
    assert caches.files(tmp_path / "ray") == expected
    on_ray.dtype = "fp32"
    told = ray_encode.ShardEncoder(on_ray, str(tiny.ROOT))(batch)["error"]
    assert "begun with other settings: dtype is fp16 there and fp32 here" in told[0]
