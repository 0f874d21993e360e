"""Decoding on a GPU (NVDEC), against PyAV."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import tiny
from vae3d.data.batches.batch_schedule import BatchSchedule, FrameCounts
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.batches.selection import clip_lengths
from vae3d.data.decoding.readers import open_media
from vae3d.data.loader import TrainingData
from vae3d.data.sources.folder import Folder
from vae3d.data.table.probe import fill_metadata

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytest.importorskip("torchcodec")
LEVELS = 3.0  # mean difference of colours: rounding, and how chroma is enlarged; two frames differ by far more


@pytest.mark.parametrize("size", [None, (144, 256)], ids=["stored", "resized"])
def test_frames_are_those_of_the_cpu_but_for_rounding(tmp_path, size):
    path = tiny.write_video(tmp_path / "a.mp4", tiny.frames(40, 288, 512), bf="3", g="8")
    indices = [35, *range(3, 20), 3]
    expected, frames = (open_media(path, reader).read(indices, size) for reader in ("pyav", "torchcodec_cuda"))
    assert frames.dtype == np.uint8
    assert frames.shape == expected.shape
    assert np.abs(frames.astype(float) - expected).mean() < LEVELS
    for i, frame in enumerate(frames[1:18].astype(float)):  # no other frame is as near
        assert np.abs(expected[1:18] - frame).mean(axis=(1, 2, 3)).argmin() == i


def test_spawned_workers_give_the_clips_of_the_main_process(tmp_path):
    for i in range(3):
        tiny.write_video(tmp_path / f"{i}.mp4", tiny.frames(20, 288, 512, seed=i), g="8")
    table, _ = fill_metadata(Folder(tmp_path).table())
    settings = ClipSettings(144, 144, crop="random", reader="torchcodec_cuda")
    plan = BatchSchedule(clip_lengths(table, settings), FrameCounts(5, 5), seed=0, batch_size=2)
    alone, shared = (list(TrainingData(table, plan, settings, n, 2, [], []).clips(0, 3)) for n in (0, 2))
    assert all(torch.equal(a.video, b.video) for a, b in zip(alone, shared, strict=True))
