"""Tar shards: their index, and training from them as from files."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from webdataset import tariterators

from tests import http_server, tiny, warm
from tests.test_train_cli import PYTHON, arguments, trace, wait_for_step
from vae3d.data import storage, tar_index
from vae3d.data.batch_schedule import BatchSchedule, FrameCounts
from vae3d.data.clips import ClipDataset, ClipSettings
from vae3d.data.fingerprint import fingerprint_of
from vae3d.data.image_folder import ImageFolder
from vae3d.data.loader import clip_lengths, read_tables
from vae3d.data.media import DataError
from vae3d.data.sources import Folder, Table, open_source
from vae3d.data.tar_index import INDEX, Settings, build_index, find_shard, media_rows, read_index, samples_of
from vae3d.data.webdataset import WebDataset, is_shards

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
    (file_rows, _), (tar_rows, _) = training_data(Table(table)), training_data(WebDataset(shards))
    ours, theirs = fingerprint_of(tar_rows), fingerprint_of(file_rows)
    assert ours.digests() == theirs.digests()
    assert ours.files[:, 0].tolist() == theirs.files[:, 0].tolist()
    assert tar_rows["text"].tolist() == file_rows["text"].tolist()


def test_a_thousand_draws_over_http_with_a_tenth_of_the_requests_failing_are_those_of_files(
    shards, from_files, tmp_path, monkeypatch
):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path))
    monkeypatch.setenv("VAE3D_CACHE_GIB", str(40_000 / 2**30))  # of 12 members of 4 to 7 kB
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    copy = shutil.copytree(shards, tmp_path / "served", ignore=shutil.ignore_patterns(INDEX))
    with http_server.serve(copy) as store:
        store.fail_every(10, 503, http_server.RESET, http_server.SHORT, 429)
        source = WebDataset(f"{store.url}/{{000000..000002}}.tar")
        assert draws(source, count=100) == from_files[:100]
        assert sum(file.stat().st_size for file in (tmp_path / "objects").glob("??/*")) <= 40_000
        monkeypatch.delenv("VAE3D_CACHE_GIB")
        assert draws(source) == from_files
        assert min(store.faults.values()) > 1
        assert len(store.faults) == 4
        before = len(store.requests)
        again = WebDataset(f"{store.url}/{{000000..000002}}.tar")
        assert len(again.table()) == 12
        assert len(store.requests) - before < 12  # the index is in the cache
    assert [file.suffix for file in (tmp_path / "shards").iterdir()] == [".arrow"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_other_numbers_of_ranks_go_on_with_the_same_clips(shards, from_files, ranks):
    assert draws(WebDataset(shards), first=20, count=200, ranks=ranks) == from_files[400:600]


def test_an_index_at_the_url_of_a_folder_is_used(shards, table):
    with http_server.serve(shards) as store:
        source = open_source(f"{store.url}/{INDEX}")
        assert source.table()["path"][0].startswith(f"{store.url}/000000.tar@")
        assert len(WebDataset(f"{store.url}/").table()) == len(pd.read_csv(table))


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
