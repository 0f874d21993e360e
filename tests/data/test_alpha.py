"""Reading colours with alpha, and training on them."""

from __future__ import annotations

from contextlib import closing

import av
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests import tiny
from vae3d.commands import infer, train
from vae3d.config.issues import ConfigError
from vae3d.config.validate import check_inference
from vae3d.data.media import MediaError
from vae3d.data.readers import open_media
from vae3d.errors import UserError


def rgba(frames: int = 5, height: int = 32, width: int = 40) -> np.ndarray:
    """[T, H, W, 4] uint8, opaque on the left, and ever more transparent to the right."""
    alpha = np.linspace(255, 0, width).round().astype(np.uint8)
    alpha = np.broadcast_to(alpha[None, None, :, None], (frames, height, width, 1))
    return np.concatenate([tiny.frames(frames, height, width), alpha], -1)


def read(path, indices=(0,), size=None, **options) -> np.ndarray:
    with closing(open_media(path, **options)) as reader:
        return reader.read(list(indices), size)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_images_keep_their_alpha(tmp_path, suffix):
    pixels = rgba(1)[0]
    lossless = {"lossless": True, "exact": True} if suffix == "webp" else {}
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **lossless)
    assert np.array_equal(read(tmp_path / f"a.{suffix}", alpha=True)[0], pixels)
    with pytest.raises(MediaError, match="has transparent pixels"):
        read(tmp_path / f"a.{suffix}")


def test_resizing_weights_colours_by_their_alpha(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, ::2] = [200, 100, 50, 255]  # every other column, beside transparent green
    pixels[:, 1::2] = [0, 255, 0, 0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    small = read(tmp_path / "a.png", size=(8, 8), alpha=True)[0]
    assert np.abs(small[2:-2, 2:-2, :3].astype(int) - [200, 100, 50]).max() <= 3
    assert 100 < small[4, 4, 3] < 155


def test_numbered_images(tmp_path):
    for i, frame in enumerate(rgba(3)):
        Image.fromarray(frame).save(tmp_path / f"frame_{i}.png")
    assert np.array_equal(read(tmp_path / "frame_*.png", (2, 0), alpha=True), rgba(3)[[2, 0]])


@pytest.mark.parametrize(("codec", "pixels"), [("ffv1", "bgra"), ("qtrle", "argb"), ("prores_ks", "yuva444p10le")])
def test_videos_keep_their_alpha(tmp_path, codec, pixels):
    # FFmpeg's ProRes encoder spoils alpha at sides that 16 does not divide.
    frames = np.ascontiguousarray(rgba()[:, :, :32])
    path = tmp_path / ("a.mkv" if codec == "ffv1" else "a.mov")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgba").reformat(format=pixels)):
                container.mux(packet)
        container.mux(stream.encode(None))
    found = read(path, range(5), alpha=True)
    assert found.shape == (5, 32, 32, 4)
    if codec == "prores_ks":
        assert np.abs(found[..., 3].astype(int) - frames[..., 3]).max() <= 2
        assert np.abs(found.astype(int) - frames)[..., :3].mean() < 6
    else:
        assert np.array_equal(found, frames)
    with pytest.raises(MediaError, match="has transparent pixels"):
        read(path)
    with pytest.raises(MediaError, match="reader=pyav"):
        read(path, reader="decord", alpha=True)


def test_files_without_alpha_are_named(tmp_path):
    Image.fromarray(tiny.frames(1)[0]).save(tmp_path / "a.png")
    Image.fromarray(tiny.frames(1)[0]).save(tmp_path / "a.jpg")
    tiny.write_video(tmp_path / "a.mp4", tiny.frames(3))
    for name in ("a.png", "a.jpg", "a.mp4"):
        with pytest.raises(MediaError, match="has no alpha channel"):
            read(tmp_path / name, alpha=True)


def table(folder) -> str:
    paths = []
    for clip in range(3):
        for i, frame in enumerate(rgba(5)):
            Image.fromarray(np.roll(frame, 3 * clip, 1)).save(folder / f"c{clip}_{i}.png")
        paths.append(str(folder / f"c{clip}_*.png"))
    pd.DataFrame({"path": paths}).to_csv(folder / "clips.csv", index=False)
    return folder / "clips.csv"


def test_a_run_on_rgba_starts_from_weights_of_colours_and_scores_alpha(tmp_path):
    from vae3d import save

    save(tiny.model("wan"), tmp_path / "colours")
    overrides = ["stage=finetune", f"stage.init_from={tmp_path / 'colours'}", "model.pixel_channels=4", *tiny.GAN]
    overrides += [
        "loss=recon_kl",
        "loss.reduction=mean",
        "data.frames.min=1",
        "data.frames.max=5",
        "data.frames.step=2",
    ]
    overrides += ["data.num_val_files=1", "validation.every=2", "validation.frames=5", "validation.metrics=[psnr]"]
    config = tiny.training("wan", table(tmp_path), *overrides, meta_check=True)
    trainer = train.build_trainer(config, tmp_path / "run")
    before = trainer.validate()
    trainer.fit()
    after = trainer.validate()
    assert trainer.network.pixel_channels == 4
    assert {"val/psnr", "val/alpha_psnr"} <= after.keys()
    assert after["val/alpha_psnr"] != before["val/alpha_psnr"]
    assert torch.isfinite(torch.tensor(list(after.values()))).all()


def test_channels_that_no_file_gives_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"model.pixel_channels=5: files give 3 channels"):
        tiny.training(
            "wan", table(tmp_path), "stage=finetune", "stage.init_from=random", "loss=recon_kl", "data.frames.min=1",
            "data.frames.max=1", "model.pixel_channels=5", meta_check=True,
        )  # fmt: skip


def test_depth_of_one_channel_is_that_of_three(rooms, tmp_path):
    """The same run with one channel, and with three equal ones: the same scores before the first step."""
    from vae3d import save

    save(tiny.model("wan"), tmp_path / "colours")
    scores = []
    for channels in (1, 3):
        overrides = ["experiment=wan_erp_depth", *tiny.MODEL["wan"], *tiny.TRAINING, f"model.pixel_channels={channels}"]
        overrides += [f"stage.init_from={tmp_path / 'colours'}", f"data.source.root={rooms}", "data.height=16"]
        overrides += ["data.width=32", "data.frames.min=1", "data.frames.max=1", "data.source.val_areas=[area0]"]
        overrides += ["validation.every=2", "validation.frames=1", "validation.metrics=[psnr]", "validation.roll=false"]
        cfg = tiny.compose(*overrides)
        config = tiny.cli.check_training(cfg)
        trainer = train.build_trainer(config, tmp_path / str(channels))
        scores.append(trainer.validate())
    assert scores[0]["val/abs_rel"] == pytest.approx(scores[1]["val/abs_rel"], rel=1e-3)


def test_infer_reconstructs_images_with_alpha_and_refuses_videos(tmp_path):
    from vae3d import load, save

    save(tiny.model("taehv"), tmp_path / "colours")
    save(load(tmp_path / "colours", pixel_channels=4), tmp_path / "rgba")
    Image.fromarray(rgba(1)[0]).save(tmp_path / "a.png")
    given = [f"checkpoint={tmp_path / 'rgba'}", f"save_dir={tmp_path / 'out'}", "metrics=[psnr]", "device=cpu"]
    infer.run(check_inference(tiny.compose(*given, f"source={tmp_path / 'a.png'}", config="infer")))
    ori, rec = (np.asarray(Image.open(tmp_path / f"out_{kind}" / "000001_a.png")) for kind in ("ori", "rec"))
    assert np.array_equal(ori, rgba(1)[0])
    assert rec.shape == ori.shape
    assert (rec[..., 3] == 255).all()  # at first every pixel is opaque
    for i, frame in enumerate(rgba(2)):
        Image.fromarray(frame).save(tmp_path / f"frame_{i}.png")
    given[1] = f"save_dir={tmp_path / 'video'}"
    with pytest.raises(UserError, match="images with alpha only"):
        infer.run(check_inference(tiny.compose(*given, f"source={tmp_path / 'frame_*.png'}", config="infer")))
