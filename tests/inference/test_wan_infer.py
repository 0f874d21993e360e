"""infer.py with a causal network: in chunks, in tiles, across a panorama's seam."""

from __future__ import annotations

import json
import logging

import numpy as np
import pandas as pd
import pytest
import torch

import vae3d
from tests import tiny
from tests.inference.test_infer import read, run
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.data.media import MediaError
from vae3d.errors import UserError
from vae3d.loading import model_config
from vae3d.models.wan import WanVAE
from vae3d.pixels import to_uint8


def write(name: str, folder, *overrides: str):
    config = model_config(name, *tiny.MODEL[name], *overrides)
    write_export(Checkpoint(config, tiny.model(name, *overrides).state_dict(), folder, ""), folder)
    return folder


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return write("wan", tmp_path_factory.mktemp("wan"))


def reconstructed(folder, name: str = "clip3") -> np.ndarray:
    return read(next(folder.parent.glob(f"{folder.name}_rec/*_{name}.mp4"))).astype(int)


def whole(export, source, **changes: object) -> np.ndarray:
    """What the model gives for the whole video at once."""
    video = torch.from_numpy(read(source).transpose(3, 0, 1, 2).copy())[None].float() / 127.5 - 1
    with torch.inference_mode():
        return to_uint8(vae3d.load(export, **changes)(video, sample=False).video[0]).astype(int)


def test_the_memory_allowed_changes_chunks_and_not_the_result(export, videos, tmp_path, monkeypatch):
    pieces, encode = [], WanVAE.encode_chunk
    monkeypatch.setattr(
        WanVAE,
        "encode_chunk",
        lambda self, video, cache: pieces.append(video.shape[2]) or encode(self, video, cache),
    )
    source = videos.parent / "clip3.mp4"  # 15 frames
    expected = whole(export, source)
    for memory, lengths in ((1e-6, [1, *[2] * 7]), (1, [15])):
        pieces.clear()
        run(export, source, tmp_path / str(memory), f"memory_gib={memory}")
        assert pieces == lengths
        assert np.abs(reconstructed(tmp_path / str(memory)) - expected).max() <= 1


@pytest.mark.parametrize(("name", "pad_w"), [("wan", "zeros"), ("wan", "circular"), ("wan22", "circular")])
def test_tiles_give_what_whole_frames_give(videos, tmp_path, name, pad_w):
    export = write(name, tmp_path / "export", f"model.pad_w={pad_w}")
    source = videos.parent / "clip3.mp4"  # 32 x 40
    expected = whole(export, source)
    for tile in (16, 32) if name == "wan" else (8,):
        run(export, source, tmp_path / str(tile), f"tile={tile}", "memory_gib=1e-6")
        assert np.abs(reconstructed(tmp_path / str(tile)) - expected).max() <= 1
    if (name, pad_w) == ("wan", "circular"):
        run(export, source, tmp_path / "blended", "tile=16", "tile_overlap=8")
        assert 0 < np.abs(reconstructed(tmp_path / "blended") - expected).mean() < 16


def test_the_index_lists_frames_and_pixels_that_were_added(export, tmp_path):
    tiny.write_video(tmp_path / "odd.mp4", tiny.frames(4, 33, 40), pixels="yuv444p")
    run(export, tmp_path / "odd.mp4", tmp_path / "out", "metrics=[psnr]")
    index = pd.read_csv(tmp_path / "out_rec/index.csv").iloc[0]
    assert (index["frames"], index["pad_frames"], index["pad_bottom"], index["pad_right"]) == (4, 1, 1, 0)
    written = reconstructed(tmp_path / "out", "odd")
    assert written.shape == (4, 33, 40, 3)
    assert np.abs(written - whole(export, tmp_path / "odd.mp4")).max() <= 1


def test_a_panorama_is_turned_with_its_reconstruction(export, tmp_path):
    """model.pad_w=circular, with weights that were saved with zeros."""
    clip = tiny.frames(5, 16, 32)
    for name, turn in (("still", 0), ("turned", 6)):
        tiny.write_video(tmp_path / f"{name}.mp4", np.roll(clip, turn, 2), codec="libx264rgb", pixels="rgb24", qp="0")
        run(export, tmp_path / f"{name}.mp4", tmp_path / name, "model.pad_w=circular")
        run(export, tmp_path / f"{name}.mp4", tmp_path / f"zeros-{name}")
    for prefix, closed in (("", True), ("zeros-", False)):
        still, turned = (reconstructed(tmp_path / (prefix + name), name) for name in ("still", "turned"))
        assert (np.abs(np.roll(still, 6, 2) - turned).max() <= 1) == closed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("tile=16 compile=true", "compile=true: .*tile"),
        ("tile=16 cuda_graphs=true", "cuda_graphs=true: .*tile"),
        ("device=cpu cuda_graphs=true", "cuda_graphs=true: .*GPU.*cpu"),
        ("tile_overlap=8", "tile_overlap=8: .*set tile"),
        ("tile=0", "tile=0: must be .*at least 1, or null"),
        ("tile=7", "tile=7: tile must be a multiple of the model's space stride 2"),
        (
            "tile=16 tile_overlap=16",
            "tile_overlap=16: tile_overlap must be a multiple of 4 of at most half the tile's 16",
        ),
        ("tile=16 model.pad_w=circular model.pad_h=pole", "pad_h=pole cannot be coded in tiles"),
        ("model.pad_w=round", "pad_w is 'round'; give one of zeros, circular"),
    ],
)
def test_settings_that_cannot_be_are_refused(export, videos, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        run(export, videos.parent / "clip3.mp4", tmp_path / "out", *overrides.split())
    assert not list(tmp_path.iterdir())


def test_groupnorm_needs_an_overlap(spatial_export, videos, tmp_path, caplog):
    source = videos.parent / "clip3.mp4"
    with pytest.raises(UserError, match=r"tile=16: a SpatialVAE .*GroupNorm.* tile_overlap=4"):
        run(spatial_export, source, tmp_path / "out", "tile=16")
    caplog.set_level(logging.INFO, "vae3d")
    options = ["tile=16", "tile_overlap=4", "metrics=[psnr]", "cost=true", "num_frames=2"]
    run(spatial_export, source, tmp_path / "out", *options)
    text = "blended tiles of 16 x 16, overlapping by 4"
    assert f"coded in {text}" in caplog.text
    scores = json.loads((tmp_path / "out_rec/metrics.json").read_text())
    assert scores["tiles"] == text
    assert scores["cost"]["decode_frames_per_second"] > 0


def test_both_parts_of_a_two_stage_model_are_in_tiles(videos, tmp_path):
    """The 2D VAE's own reconstruction too. A tile that covers the frame gives what whole frames give."""
    export, source = write("temporal_vae", tmp_path / "export"), videos.parent / "clip3.mp4"
    for name, tiles in (("whole", []), ("one", ["tile=40", "tile_overlap=4"]), ("more", ["tile=16", "tile_overlap=4"])):
        run(export, source, tmp_path / name, "num_frames=4", *tiles)
    for kind in ("rec", "spatial"):
        whole, one, more = (
            read(next(tmp_path.glob(f"{name}_{kind}/*.mp4"))).astype(int) for name in ("whole", "one", "more")
        )
        assert (whole == one).all()
        assert whole.shape == more.shape


def test_a_panorama_whose_width_does_not_fit_is_refused(export, tmp_path):
    tiny.write_video(tmp_path / "odd.mp4", tiny.frames(3, 16, 33), pixels="yuv444p")
    for more in ([], ["tile=16"]):
        with pytest.raises(
            MediaError,
            match=r"odd\.mp4: .*16x33: the width is 33; .*multiple of 2",
        ):
            run(export, tmp_path / "odd.mp4", tmp_path / "out", "model.pad_w=circular", *more)
    run(export, tmp_path / "odd.mp4", tmp_path / "out", "overwrite=true")
