from __future__ import annotations

import json
import logging
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import vae3d
from tests import tiny
from vae3d.commands import infer
from vae3d.config.validate import check_inference
from vae3d.data.decoding.readers import open_media
from vae3d.data.media import DataError, MediaError
from vae3d.errors import UserError
from vae3d.host_memory import keep_freed_memory
from vae3d.inference.cost import timed
from vae3d.inference.reconstruct import identifier
from vae3d.inference.video import write_video
from vae3d.pixels import to_uint8
from vae3d.result_folder import FolderError

INFER = [sys.executable, str(tiny.ROOT / "infer.py")]


def run(export, source, prefix, *overrides: str) -> None:
    infer.run(
        check_inference(
            tiny.compose(f"checkpoint={export}", f"source={source}", f"save_dir={prefix}", *overrides, config="infer")
        )
    )


def stems(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".mp4", ".png"))


def read(path) -> np.ndarray:
    opened = open_media(path)
    return opened.read(range(opened.info.num_frames))


def test_writes_three_folders_of_equal_names_and_an_index(export, videos, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(export, videos, tmp_path / "out", "metrics=[psnr,ssim,flicker]")
    names = [f"{i + 1:06d}_clip{i}.mp4" for i in range(10)] + ["000011_image0.png", "000012_image1.png"]
    for kind in ("ori", "rec", "spatial"):
        assert stems(tmp_path / f"out_{kind}") == names
    index = pd.read_csv(tmp_path / "out_rec/index.csv")
    assert index["id"].tolist() == [name.rsplit(".", 1)[0] for name in names]
    assert index["frames"].tolist() == [12 + i for i in range(10)] + [1, 1]
    assert index["source"][0] == str(videos.parent / "clip0.mp4")
    assert set(index["height"]) == {32}
    metrics = json.loads((tmp_path / "out_rec/metrics.json").read_text())
    assert metrics["psnr"] == pytest.approx(index["psnr"].mean())
    assert metrics["videos"] == 12
    assert re.search(r"psnr \S+  \(over 12 videos\)", caplog.text)
    assert re.search(r"flicker_rec \S+  \(over 10 videos\)", caplog.text)  # images have none


@pytest.mark.smoke
def test_original_is_bit_exact_and_reconstruction_is_the_models(export, videos, tmp_path):
    run(export, videos, tmp_path / "out", "num_samples=1", "model.micro_frames=null")
    source = read(videos.parent / "clip0.mp4")
    np.testing.assert_array_equal(read(tmp_path / "out_ori/000001_clip0.mp4"), source)
    model = vae3d.load(export, micro_frames=None)
    video = torch.from_numpy(source.transpose(3, 0, 1, 2).copy())[None].float() / 127.5 - 1
    with torch.inference_mode():
        out = model(video, sample=False)
        spatial = model.decode_spatial(out.spatial.latent)
    for kind, expected in (("rec", out.video), ("spatial", spatial)):
        written = read(tmp_path / f"out_{kind}/000001_clip0.mp4")
        assert np.abs(written.astype(int) - to_uint8(expected[0])).max() <= 1


def test_half_precision_on_a_cpu_is_close_to_full(export, videos, tmp_path):
    for precision in ("fp32", "bf16"):
        run(export, videos, tmp_path / precision, "num_samples=1", f"precision={precision}", "device=cpu")
    full, half = (read(tmp_path / f"{name}_rec/000001_clip0.mp4").astype(int) for name in ("fp32", "bf16"))
    assert 0 < np.abs(half - full).mean() < 2  # of 255


def test_long_videos_are_coded_piece_by_piece_as_the_model_would(export, tmp_path):
    tiny.write_video(tmp_path / "long.mp4", tiny.frames(40))
    run(export, tmp_path / "long.mp4", tmp_path / "out")
    source = read(tmp_path / "long.mp4")
    video = torch.from_numpy(source.transpose(3, 0, 1, 2).copy())[None].float() / 127.5 - 1
    with torch.inference_mode():
        expected = to_uint8(vae3d.load(export)(video, sample=False).video[0])
    written = read(tmp_path / "out_rec/000001_long.mp4")
    assert written.shape == expected.shape
    assert np.abs(written.astype(int) - expected).max() <= 1


def test_only_a_piece_is_in_memory(export, tmp_path, monkeypatch):
    from vae3d.data.decoding.readers import PyAVReader

    asked = []
    original = PyAVReader.read
    monkeypatch.setattr(
        PyAVReader, "read", lambda self, indices, size=None: asked.append(len(indices)) or original(self, indices, size)
    )
    tiny.write_video(tmp_path / "long.mp4", tiny.frames(60))
    run(export, tmp_path / "long.mp4", tmp_path / "out")
    assert max(asked) == 17
    assert sum(asked) == 60


def test_selection_of_frames_rate_and_size(export, videos, tmp_path):
    run(
        export,
        videos,
        tmp_path / "out",
        "num_samples=1",
        "start=2",
        "num_frames=4",
        "stride=2",
        "height=16",
        "width=20",
    )
    index = pd.read_csv(tmp_path / "out_rec/index.csv").iloc[0]
    assert (index["start"], index["frames"], index["fps"], index["height"], index["width"]) == (2, 4, 12.0, 16, 20)
    assert read(tmp_path / "out_rec/000001_clip0.mp4").shape == (4, 16, 20, 3)
    run(export, videos, tmp_path / "slow", "num_samples=1", "fps=8")
    assert open_media(tmp_path / "slow_ori/000001_clip0.mp4").info.fps == pytest.approx(8.0)
    assert pd.read_csv(tmp_path / "slow_rec/index.csv")["frames"].tolist() == [4]
    tiny.write_video(tmp_path / "long.mp4", tiny.frames(72, 16, 16))  # 72 / (3 * 24 / 5) is 5.000000000000001
    run(export, tmp_path / "long.mp4", tmp_path / "long", "stride=3", "fps=5")
    assert pd.read_csv(tmp_path / "long_rec/index.csv")["frames"].tolist() == [5]


def test_odd_sizes_come_back_whole_and_the_padding_is_told(export, tmp_path):
    tiny.write_video(tmp_path / "odd.mp4", tiny.frames(3, 33, 41), pixels="yuv444p")
    for codec in ("lossless", "h264"):
        run(export, tmp_path / "odd.mp4", tmp_path / codec, f"codec={codec}")
        assert read(tmp_path / f"{codec}_rec/000001_odd.mp4").shape == (3, 33, 41, 3)
        index = pd.read_csv(tmp_path / f"{codec}_rec/index.csv").iloc[0]
        assert (index["pad_bottom"], index["pad_right"]) == (1, 1)


@pytest.mark.parametrize(("height", "enlarged"), [(48, True), (32, False), (16, False)])
def test_files_that_are_enlarged_are_warned_of(spatial_export, tmp_path, caplog, height, enlarged):
    tiny.write_video(tmp_path / "a.mp4", tiny.frames(2, 32, 40))
    run(spatial_export, tmp_path / "a.mp4", tmp_path / "out", f"height={height}", "width=40")
    assert pd.read_csv(tmp_path / "out_rec/index.csv")["enlarged"].tolist() == [enlarged]
    warned = [record.getMessage() for record in caplog.records if "enlarged" in record.getMessage()]
    assert len(warned) == enlarged


def test_a_single_stage_model_writes_no_spatial(spatial_export, videos, tmp_path):
    run(spatial_export, videos.parent / "clip0.mp4", tmp_path / "out")
    assert stems(tmp_path / "out_rec") == ["000001_clip0.mp4"]
    assert not (tmp_path / "out_spatial").exists()


def test_sampling_is_seeded(export, videos, tmp_path):
    source = videos.parent / "clip0.mp4"
    for name, more in (("a", ["seed=1"]), ("b", ["seed=1"]), ("c", ["seed=2"])):
        run(export, source, tmp_path / name, "sample=true", *more)
    a, b, c = (read(tmp_path / f"{name}_rec/000001_clip0.mp4") for name in "abc")
    assert (a == b).all()
    assert (a != c).any()


def test_full_folders_are_not_mixed_with_new_results(export, videos, tmp_path):
    source = videos.parent / "clip0.mp4"
    run(export, source, tmp_path / "out")
    with pytest.raises(FolderError, match=r"save_dir=.*: seed is 0 there and 1 here; .* set overwrite=true"):
        run(export, source, tmp_path / "out", "seed=1")
    (tmp_path / "out_rec/notes.txt").write_text("mine")
    (tmp_path / "out_rec/.000009_x.mp4.tmp").touch()  # from a run that was killed
    run(export, videos.parent / "clip1.mp4", tmp_path / "out", "overwrite=true")
    for kind in ("ori", "rec", "spatial"):
        assert stems(tmp_path / f"out_{kind}") == ["000001_clip1.mp4"]
    assert (tmp_path / "out_rec/notes.txt").is_file()
    (tmp_path / "out_rec/command.json").unlink()  # now they may be anyone's
    for overwrite in ("true", "false"):
        with pytest.raises(FolderError, match=r"out_ori is not empty.*command\.json.*choose another"):
            run(export, source, tmp_path / "out", f"overwrite={overwrite}")
    assert stems(tmp_path / "out_rec") == ["000001_clip1.mp4"]


def test_results_do_not_go_into_the_folder_that_is_read(export, videos, tmp_path):
    shutil.copy(videos.parent / "clip0.mp4", tmp_path / "a.mp4")
    shutil.copy(videos.parent / "clip0.mp4", tmp_path / "._a.mp4")  # as macOS leaves them
    with pytest.raises(UserError, match=r"save_dir=.* source="):
        run(export, tmp_path, tmp_path / "out")
    run(export, tmp_path, tmp_path.with_name("elsewhere"))
    assert stems(tmp_path.with_name("elsewhere_rec")) == ["000001_a.mp4"]


def test_only_rows_of_the_wanted_split_count(export, videos, tmp_path):
    shutil.copy(videos.parent / "clip0.mp4", tmp_path / "a.mp4")
    (tmp_path / "t.csv").write_text("path,split,num_frames\n,train,1\na.mp4,val,many\n")
    run(export, tmp_path / "t.csv", tmp_path / "out", "split=val")
    assert stems(tmp_path / "out_rec") == ["000002_a.mp4"]
    with pytest.raises(MediaError, match="row 1: has no `path`"):
        run(export, tmp_path / "t.csv", tmp_path / "all")
    (tmp_path / "t.csv").write_text("path,split\na.mp4,vla\na.mp4,val\n")
    with pytest.raises(DataError, match=r"`split` is none of train, val, test in rows \[1\]"):
        run(export, tmp_path / "t.csv", tmp_path / "typo", "split=val")


def test_a_file_that_cannot_be_scored_is_named_and_skipped(export, videos, tmp_path):
    shutil.copy(videos.parent / "clip0.mp4", tmp_path / "a.mp4")
    tiny.write_video(tmp_path / "b.mp4", tiny.frames(3, 8, 8))
    Image.fromarray(tiny.frames(1, 8, 8)[0]).save(tmp_path / "c.png")
    with pytest.raises(UserError, match=r"(?s)2 of 3 files .*b\.mp4: ssim needs frames of at least 11 pixels.*c\.png"):
        run(export, tmp_path, tmp_path.with_name("scored"), "on_error=skip", "metrics=[ssim]")
    assert pd.read_csv(tmp_path.with_name("scored_rec") / "index.csv")["id"].tolist() == ["000001_a"]
    assert stems(tmp_path.with_name("scored_ori")) == stems(tmp_path.with_name("scored_rec")) == ["000001_a.mp4"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.micro_frame=null", "micro_frame.* is not an argument of .*did you mean micro_frames"),
        ("device=gpu", "device=gpu is not usable here"),
        ("metrics=[vmaf]", "no metric is called vmaf; there are psnr, ssim, ms_ssim"),
        (
            "metrics=[ms_ssim] height=64 width=64",
            "metrics: ms_ssim needs frames of at least 161 pixels; these are 64x64",
        ),
        ("height=0 width=16", "height=0: must be .*at least 1"),
    ],
)
def test_settings_that_cannot_be_are_one_error(export, videos, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        run(export, videos.parent / "clip0.mp4", tmp_path / "out", *override.split())


def test_single_settings_of_the_model_can_be_changed(export, videos, tmp_path):
    run(export, videos.parent / "clip0.mp4", tmp_path / "out", "model.spatial.frame_batch=2", "model.micro_frames=null")
    assert stems(tmp_path / "out_rec") == ["000001_clip0.mp4"]


@pytest.mark.parametrize("name", ["taesd", "diffusers", "temporal_diffusers"])
def test_frame_batch_is_that_of_any_network_of_single_frames(name, videos, tmp_path):
    vae3d.save(tiny.model(name), tmp_path / "export")
    settings = [
        f"checkpoint={tmp_path}/export",
        f"source={videos}",
        f"save_dir={tmp_path}/out",
        "frame_batch=1",
        "metrics=[]",
    ]
    config = check_inference(tiny.compose(*settings, config="infer"))
    _, reconstructor = infer.build_reconstructor(config, torch.device("cpu"))
    model = reconstructor.model
    assert getattr(model, "spatial_vae", model).frame_batch == 1


def test_a_faulty_file_stops_or_is_skipped_and_listed(export, videos, tmp_path):
    shutil.copy(videos.parent / "clip0.mp4", tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"")
    pd.DataFrame({"path": ["b.mp4", "a.mp4"]}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(MediaError, match=r"b\.mp4: is empty .*; on_error=skip goes on"):
        run(export, tmp_path / "t.csv", tmp_path / "stop")
    with pytest.raises(UserError, match=r"(?s)1 of 2 files could not be reconstructed:.*b\.mp4: is empty"):
        run(export, tmp_path / "t.csv", tmp_path / "skip", "on_error=skip", "metrics=[psnr]")
    assert stems(tmp_path / "skip_rec") == ["000002_a.mp4"]
    assert len(pd.read_csv(tmp_path / "skip_rec/index.csv")) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["start=12"], "has 12 frames; start=12 is past its end"),
        (["num_frames=13"], "gives 12 frames from start=0; num_frames=13"),
    ],
)
def test_frames_that_are_not_there_are_refused(export, videos, tmp_path, overrides, message):
    with pytest.raises(MediaError, match=message):
        run(export, videos.parent / "clip0.mp4", tmp_path / "out", *overrides)


def test_names_are_safe_and_unique():
    assert identifier(7, "/data/a b/ünï (1).mp4") == "000007_ünï-1-"
    assert identifier(7, "视频.mp4") == "000007_视频"
    assert identifier(7, "x.mp4") != identifier(8, "x.mp4")


@pytest.mark.parametrize("source", ["鯉" * 80 + ".mp4", "/".join(["a" * 200] * 4) + "_*.png"], ids=["file", "images"])
def test_outputs_of_long_names_can_be_written(tmp_path, source):
    write_video(tmp_path / f"{identifier(123_456_789, source)}.mp4", np.zeros((1, 16, 16, 3), np.uint8), 24)


def test_two_ranks_share_the_files(export, videos, tmp_path):
    settings = [f"checkpoint={export}", f"source={videos}", "metrics=[psnr]", f"save_dir={tmp_path / 'two'}"]
    codes, printed = tiny.run_ranks(*INFER, *settings, cwd=tmp_path)
    assert codes == [0, 0], printed
    run(export, videos, tmp_path / "one", "metrics=[psnr]")
    one, two = (pd.read_csv(tmp_path / f"{name}_rec/index.csv") for name in ("one", "two"))
    pd.testing.assert_frame_equal(one, two)
    assert stems(tmp_path / "two_rec") == stems(tmp_path / "one_rec")


def test_command_line_ends_as_one_error(tmp_path):
    words = ["checkpoint=/nowhere", "source=/none", f"save_dir={tmp_path}/x", "codecs=a", "teacher=runs/wan"]
    done = tiny.run(*INFER, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(r"teacher=runs/wan: .*vae3d compare", done.stdout)
    assert "codecs: unknown key; did you mean codec?" in done.stdout
    assert "checkpoint=/nowhere: no such file or folder" in done.stdout
    assert "Traceback" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_cost_is_measured_on_the_first_file_that_can_be_read_if_others_are_skipped(export, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a.mp4").write_bytes(b"no video")
    tiny.write_video(tmp_path / "source/b.mp4", tiny.frames(3))
    settings = ["cost=true", "height=16", "width=16"]
    with pytest.raises(UserError, match=r"1 of 2 files could not be reconstructed:\n.*a\.mp4"):
        run(export, tmp_path / "source", tmp_path / "out", "on_error=skip", *settings)
    assert json.loads((tmp_path / "out_rec/metrics.json").read_text())["cost"]["frames"] == 3
    with pytest.raises(MediaError, match=r"a\.mp4"):
        run(export, tmp_path / "source", tmp_path / "stopped", *settings)


def test_every_accelerator_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    device = torch.device("meta")  # stands for any that is no CPU
    timed(lambda: torch.zeros(1), device, repeats=3)
    assert waited == [device] * 4  # the warm-up too
    timed(lambda: torch.zeros(1), torch.device("cpu"), repeats=3)
    assert len(waited) == 4


def test_cost_of_coding_is_measured_on_request(export, videos, tmp_path):
    """tiny spatial VAE: 2x2 smaller, 4 channels."""
    run(export, videos, tmp_path / "out", "cost=true", "num_samples=2", "num_frames=9")
    metrics = json.loads((tmp_path / "out_rec/metrics.json").read_text())
    cost = metrics["cost"]
    assert (cost["frames"], cost["height"], cost["width"]) == (9, 32, 40)
    assert cost["encode_frames_per_second"] > 0
    assert cost["decode_frames_per_second"] > 0
    assert cost["parameters"] == sum(p.numel() for p in vae3d.load(export).parameters())
    model = vae3d.load(export)
    assert cost["compression"] == pytest.approx(3 * 9 * 32 * 40 / np.prod(model.latent_shape(9, 32, 40)))
    assert cost["encode_memory_gib"] is None or 0 <= cost["encode_memory_gib"] < 1


def test_memory_of_a_run_is_its_peak():
    keep_freed_memory()  # as infer.py does on a CPU: runs could reuse what the first one freed
    _, memory = timed(lambda: torch.ones(2**26).add_(1), torch.device("cpu"))
    assert memory is None or memory == pytest.approx(0.25, abs=0.01)


def test_numbered_images_are_a_video_of_each_folder(export, tmp_path):
    for room in ("a", "b"):
        (tmp_path / f"rooms/{room}/output").mkdir(parents=True)
        for i, picture in enumerate(tiny.frames(3, 16, 32, seed=ord(room))):
            Image.fromarray(picture).save(tmp_path / f"rooms/{room}/output/panorama_{8 + i}.png")
    run(export, f"'{tmp_path}/rooms/*/output/panorama_*.png'", tmp_path / "out")
    written = [f"00000{i + 1}_rooms-{room}-output-panorama.mp4" for i, room in enumerate("ab")]
    assert stems(tmp_path / "out_rec") == written
    np.testing.assert_array_equal(read(tmp_path / "out_ori" / written[1]), tiny.frames(3, 16, 32, seed=ord("b")))
