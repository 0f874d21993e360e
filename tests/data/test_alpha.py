"""Reading colours with alpha, and training on them."""

from __future__ import annotations

import json
from contextlib import closing

import av
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import vae3d
from tests import tiny
from vae3d.commands import check_data as check
from vae3d.commands import eval as evaluation
from vae3d.commands import flags, infer, train
from vae3d.commands.training_data import build_training_data
from vae3d.config.issues import ConfigError
from vae3d.config.latents import check_encoding
from vae3d.config.validate import check_inference
from vae3d.data.decoding.readers import open_media
from vae3d.data.media import MediaError
from vae3d.errors import UserError
from vae3d.evaluation.pairs import PairError
from vae3d.models.taesd import TAESD
from vae3d.pixels import to_uint8
from vae3d.training.teacher import Distillation, TeacherError
from vae3d.types import ClipBatch


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
        overrides += ["trainer.best=abs_rel"]
        cfg = tiny.compose(*overrides)
        config = tiny.cli.check_training(cfg)
        trainer = train.build_trainer(config, tmp_path / str(channels))
        scores.append(trainer.validate())
        assert trainer.best.better is False
    assert scores[0]["val/abs_rel"] == pytest.approx(scores[1]["val/abs_rel"], rel=1e-3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a TAEHV of RGBA that encodes alpha, and decodes other than opaque pixels."""
    folder = tmp_path_factory.mktemp("model")
    vae3d.save(tiny.model("taehv"), folder / "colours")
    network = vae3d.load(folder / "colours", pixel_channels=4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    vae3d.save(network, folder / "rgba")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A table of a video and an image, both with alpha."""
    folder = tmp_path_factory.mktemp("files")
    video = torch.from_numpy(rgba(6)).permute(3, 0, 1, 2) / 127.5 - 1
    vae3d.write_video(folder / "a.mkv", video, 30000 / 1001)
    Image.fromarray(rgba(1)[0]).save(folder / "b.png")
    pd.DataFrame({"path": ["a.mkv", "b.png"]}).to_csv(folder / "files.csv", index=False)
    return folder / "files.csv"


def run_infer(model, source, out, *more: str) -> None:
    given = [f"checkpoint={model / 'rgba'}", f"save_dir={out}", f"source={source}", "device=cpu", *more]
    infer.run(check_inference(tiny.compose(*given, config="infer")))


def test_written_videos_keep_their_alpha(files, tmp_path):
    found = vae3d.read_video(files.parent / "a.mkv", alpha=True)
    assert np.array_equal(to_uint8(found.frames[0]), rgba(6))
    assert found.fps == pytest.approx(30000 / 1001)
    with pytest.raises(MediaError, match="transparent"):
        vae3d.read_video(files.parent / "a.mkv")
    vae3d.write_video(tmp_path / "a.mkv", found.frames, found.fps)
    assert (tmp_path / "a.mkv").read_bytes() == (files.parent / "a.mkv").read_bytes()
    for name, codec, message in (("a.mp4", None, ".mkv"), ("a.mkv", "h264", "codec=h264")):
        with pytest.raises(UserError, match=message):
            vae3d.write_video(tmp_path / name, found.frames, 8, codec=codec)


def test_infer_and_eval_keep_and_score_alpha(model, files, tmp_path, capsys):
    """infer.py scores the frames before the codec, vae3d eval the files, which are lossless: the scores are equal."""
    run_infer(model, files, tmp_path / "out", "metrics=[psnr,ssim,alpha_psnr,alpha_ssim]")
    ori, rec = (read(tmp_path / f"out_{kind}/000001_a.mkv", range(6), alpha=True) for kind in ("ori", "rec"))
    assert np.array_equal(ori, rgba(6))
    assert np.array_equal(read(tmp_path / "out_ori/000002_b.png", alpha=True), rgba(1))
    assert (rec[..., 3] != ori[..., 3]).any()
    expected = pd.read_csv(tmp_path / "out_rec/index.csv")
    wanted = ["psnr", "ssim", "alpha_psnr", "alpha_ssim"]
    assert (
        evaluation.main(flags.parse_eval(["--base", str(tmp_path / "out"), "--metric", *wanted, "--device", "cpu"]))
        == 0
    )
    summary = json.loads((tmp_path / "out_rec_eval/summary.json").read_text())
    for name in wanted:
        assert [video[name] for video in summary["per_video"]] == pytest.approx(list(expected[name]), rel=1e-9)
    assert summary["background_of_alpha"].startswith("mid-grey")
    assert not summary["lossy_input"]
    error = (ori[..., 3].astype(float) - rec[..., 3]) / 255
    by_hand = -10 * np.log10(np.square(error).mean((1, 2)))
    assert expected["alpha_psnr"][0] == pytest.approx(by_hand.mean(), rel=1e-6)
    over = [frames[..., :3] / 255 * (a := frames[..., 3:] / 255) + 0.5 * (1 - a) for frames in (ori, rec)]
    by_hand = -10 * np.log10(np.square(over[0] - over[1]).mean((1, 2, 3)))
    assert expected["psnr"][0] == pytest.approx(by_hand.mean(), rel=1e-6)
    found = vae3d.score(tmp_path / "out_ori/000001_a.mkv", tmp_path / "out_rec/000001_a.mkv", wanted)
    assert found["alpha_ssim"] == pytest.approx(expected["alpha_ssim"][0], rel=1e-9)
    assert (
        evaluation.main(
            flags.parse_eval(["--base", str(tmp_path / "out"), "--metric", "psnr", "--device", "cpu", "--no_page"])
        )
        == 0
    )
    assert "--metric alpha_psnr" in capsys.readouterr().err


def test_alpha_that_cannot_be_kept_or_scored_is_named(model, files, tmp_path):
    with pytest.raises(UserError, match="codec=h264"):
        run_infer(model, files, tmp_path / "out", "codec=h264")
    tiny.write_video(tmp_path / "opaque.mp4", tiny.frames(3))
    with pytest.raises(MediaError, match="has no alpha channel"):
        run_infer(model, tmp_path / "opaque.mp4", tmp_path / "out")
    for name in ("ref", "rec"):
        (tmp_path / name).mkdir()
        Image.fromarray(tiny.frames(1)[0]).save(tmp_path / name / "a.png")
    given = ["--ref", str(tmp_path / "ref"), "--rec", str(tmp_path / "rec"), "--metric", "alpha_psnr"]
    with pytest.raises(PairError, match="alpha_psnr"):
        evaluation.evaluate(flags.parse_eval(given))
    Image.fromarray(rgba(1)[0]).save(tmp_path / "ref/a.png")
    with pytest.raises(PairError, match="transparent pixels"):
        evaluation.evaluate(flags.parse_eval([*given[:-1], "psnr"]))


def test_latents_of_rgba(model, files, tmp_path):
    from vae3d.commands import encode
    from vae3d.latents.cache import LatentCache

    given = [f"checkpoint={model / 'rgba'}", f"source={files}", f"cache={tmp_path / 'cache'}", "device=cpu"]
    given += ["frames=1", "height=32", "width=40", "workers=0", "dtype=fp32"]
    encode.run(check_encoding(tiny.compose(*given, config="latents")))
    codec = vae3d.open_codec(model / "rgba", pixel_range="uint8")
    cache = LatentCache(tmp_path / "cache", codec)
    entry = cache.index["key"].tolist().index("b.png")
    pixels = torch.from_numpy(rgba(1)).permute(0, 3, 1, 2)
    z = codec.encode(pixels)
    torch.testing.assert_close(cache[entry].z, z[0], atol=1e-5, rtol=0)
    assert codec.decode(z, 1).shape == (1, 4, 1, 32, 40)
    pixels[:, 3] = 255
    assert not torch.allclose(codec.encode(pixels), z, atol=1e-3)  # alpha is encoded


def test_a_table_of_videos_with_alpha_is_probed_and_checked(files, tmp_path):
    config = tiny.training("wan", files, "stage=finetune", "stage.init_from=random", "model.pixel_channels=4",
                           "loss=recon_kl", "data.frames.min=1", "data.frames.max=1", "validation.every=0")  # fmt: skip
    data = build_training_data(config, 0, 1)
    (batch,) = data.clips(0, 1)
    assert batch.video.shape[1] == 4
    assert check.main(check.parse([str(files), "--alpha", "--workers", "1"])) == 0
    assert check.main(check.parse([str(files), "--workers", "1"])) == 1


@pytest.mark.parametrize(("teacher", "student"), [(3, 4), (4, 3)])
def test_a_teacher_of_other_channels_is_an_error_that_says_what_to_do(teacher, student):
    networks = [TAESD(variant="taesd", decoder_channels=[4] * 4, pixel_channels=n) for n in (teacher, student)]
    with pytest.raises(TeacherError, match=f"model.pixel_channels={teacher}"):
        Distillation(*networks)


def test_a_teacher_of_rgba_teaches_rgba():
    networks = [TAESD(variant="taesd", decoder_channels=[4] * 4, pixel_channels=4) for _ in range(2)]
    video = torch.rand(1, 4, 1, 16, 16) * 2 - 1
    batch = ClipBatch(video, torch.zeros(1, dtype=torch.long), [""])
    z = Distillation(*networks).compute_targets(batch).targets.z
    assert torch.equal(z, networks[0].encode(video).mode())
