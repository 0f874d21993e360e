"""The Python interface: everything is listed, files and tensors in and out, saved models open again."""

from __future__ import annotations

import ast
import contextlib
import errno
import inspect
import io
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
import urllib.error
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import vae3d
from tests import tiny
from vae3d import api
from vae3d.commands import cli, try_video
from vae3d.data.batches import clips
from vae3d.data.media import MediaError, MediaInfo
from vae3d.errors import UserError
from vae3d.io import FileError
from vae3d.latents.cache import LatentCache
from vae3d.metrics import MetricError, build_metrics
from vae3d.pixels import PixelError
from vae3d.pretrained import weights

PUBLIC = tiny.ROOT / "tests/public_api.py"


@pytest.fixture(scope="module")
def model() -> vae3d.VideoAutoencoder:
    return tiny.model("temporal_vae")


@pytest.fixture
def clip(tmp_path):
    """A video file of 21 frames of 24 x 32."""
    path = tmp_path / "clip.mp4"
    tiny.write_video(path, tiny.frames(21, 24, 32))
    return path


def test_everything_is_listed_and_typed():
    assert set(dir(vae3d)) == {*vae3d.__all__, "__version__"}
    assert all(callable(getattr(vae3d, name)) for name in vae3d.__all__)
    assert (tiny.ROOT / "vae3d/py.typed").exists()


def test_names_import_what_they_need():
    """Listing them no torch, a model no tables and no reader of videos, a video no tables."""
    code = """
import sys, vae3d
def loaded():
    print([name for name in ("torch", "pandas", "av", "huggingface_hub") if name in sys.modules])
dir(vae3d); loaded()
vae3d.load, vae3d.build, vae3d.save, vae3d.list_models, vae3d.open_codec, vae3d.VideoAutoencoder; loaded()
vae3d.read_video, vae3d.reconstruct, vae3d.score; print("pandas" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "['torch']", "False"]


def test_names_are_those_of_the_api():
    assert all(getattr(vae3d, name) is getattr(api, name) for name in vae3d.__all__)


def test_every_listed_model_is_a_file():
    assert {"temporal_vae", "wan", "taehv", "taesd"} <= set(vae3d.list_models())


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: vae3d.build("tahv"), "tahv.*taehv"),
        (lambda: vae3d.build("taesd"), "model.variant"),
        (lambda: vae3d.build("wan", "model.colour=3"), "colour"),
        (lambda: vae3d.build("wan", "model.channels=no"), "channels is 'no'"),
        (lambda: vae3d.build("wan", "model.multipliers=[1,2]"), "3 entries for 2 multipliers"),
        (lambda: vae3d.open_codec("x", precision="fp8"), "'fp8'.*bf16"),
        (lambda: vae3d.build("wan", "model.channels=-1"), "channels is -1"),
        (lambda: vae3d.build("temporal_vae", "model.spatial.channels=3"), "model.spatial.channels=3: channels is 3"),
        (lambda: vae3d.build("wan", "chanels=3"), "did you mean model.channels"),
        (lambda: vae3d.read_video("x.mp4", height=0), "height=0"),
        (lambda: vae3d.save(tiny.model("wan"), "x.pth"), "x.pth.*export is a folder"),
        (lambda: vae3d.save(tiny.model("wan"), "."), r"^\. .*new"),
        (lambda: vae3d.save(tiny.model("wan"), "x", psnr=np.float64(31.5)), r"float64\(31.5\)"),
        (lambda: vae3d.save(tiny.model("wan"), "x", psnr=math.nan), "x: psnr: nan"),
        (lambda: vae3d.save(tiny.model("wan"), "x", note=["${y}"]), r"x: note\[0\]: '\${y}'"),
        (lambda: vae3d.load("x", tiny.model("wan"), channels=8), "channels.*cannot be changed"),
        (lambda: vae3d.write_video(os.devnull + "/x.mp4", torch.zeros(1, 3, 2, 8, 8), 8), "/dev/null/x.mp4"),
        (lambda: vae3d.score(np.zeros((1, 3, 2, 8, 8)), "a.mp4"), "ndarray.*from_numpy"),
        (lambda: vae3d.reconstruct(tiny.model("taesd"), np.zeros((1, 3, 2, 8, 8))), "ndarray.*from_numpy"),
        (lambda: vae3d.reconstruct(tiny.model("taesd"), torch.zeros(1, 3, 2, 8, 8), "x.mp4"), "x.mp4.*write_video"),
        (lambda: vae3d.write_video("x.mp4", vae3d.Video(torch.zeros(1, 3, 2, 8, 8), 8), 8), "Video.*frames"),
        (lambda: vae3d.save(tiny.model("wan"), os.devnull + "/x"), "/dev/null/x"),
    ],
)
def test_wrong_arguments_are_errors_of_the_user_that_name_them(call, named):
    with pytest.raises(UserError, match=named):
        call()


def test_a_saved_model_opens_with_the_same_settings_and_weights(model, tmp_path):
    vae3d.save(model, tmp_path / "saved", note="mine")
    again = vae3d.load(tmp_path / "saved")
    assert isinstance(again, vae3d.VideoAutoencoder)
    assert again.temporal_vae.stride == model.temporal_vae.stride
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_model_is_saved_for_other_programs(tmp_path, caplog):
    wan = tiny.model("wan", "model.latents_mean=[1,0,0,0]")
    for layout, name in ("diffusers", "folder"), ("wan", "wan.safetensors"):
        vae3d.save(wan, tmp_path / name, layout=layout)
        vae3d.save(wan, tmp_path / name, layout=layout)  # replaces it
        assert isinstance(vae3d.load(tmp_path / name), type(wan))
    assert (tmp_path / "folder/config.json").is_file()
    with pytest.raises(UserError, match=r"'onnx'.*diffusers"):
        vae3d.save(wan, tmp_path / "x", layout="onnx")
    with pytest.raises(UserError, match="TAEHV"):
        vae3d.save(wan, tmp_path / "x", layout="taehv")
    with pytest.raises(UserError, match="note"):
        vae3d.save(wan, tmp_path / "x", layout="wan", note="mine")
    assert not (tmp_path / "x").exists()


def test_a_folder_of_other_files_is_not_replaced(model, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    (folder / "photos").mkdir(parents=True)
    for layout in ("export", "diffusers"):
        with pytest.raises(FileError, match=r"mine has other files, such as photos"):
            vae3d.save(tiny.model("wan"), folder, layout=layout)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (folder / "photos").rmdir()
    (tmp_path / "notes").write_text("of a user")
    with pytest.raises(UserError, match=r"notes.*export is a folder"):
        vae3d.save(model, tmp_path / "notes")
    (tmp_path / "notes").unlink()
    for note in ("first", "second"):
        vae3d.save(model, folder, note=note)
    with pytest.raises(FileError, match=r"such as model\.safetensors"):
        vae3d.save(tiny.model("wan"), folder, layout="diffusers")  # vae3d.load would open the older one
    assert yaml.safe_load((folder / "model.yaml").read_text())["note"] == "second"

    listdir = os.listdir

    def while_another_process_replaces_it(path):
        if path == folder:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", while_another_process_replaces_it)
    vae3d.save(model, folder, note="third")


def test_a_model_of_another_project_is_not_saved(tmp_path):
    with pytest.raises(UserError, match="Linear"):
        vae3d.save(torch.nn.Linear(1, 1), tmp_path / "saved")


def test_frames_are_read_as_they_are_and_cropped(clip):
    video = vae3d.read_video(clip)
    assert video.frames.shape == (1, 3, 21, 24, 32)
    assert video.fps > 0
    assert video.frames.abs().max() <= 1
    part = vae3d.read_video(clip, start=3, num_frames=5, height=16, width=16)
    assert part.frames.shape == (1, 3, 5, 16, 16)
    assert torch.equal(vae3d.read_video(clip, start=3, num_frames=5).frames, video.frames[:, :, 3:8])
    with pytest.raises(MediaError, match="21"):
        vae3d.read_video(clip, start=20, num_frames=5)


def test_what_is_written_lossless_is_read_again(clip, tmp_path):
    video = vae3d.read_video(clip)
    vae3d.write_video(tmp_path / "copy.mp4", video.frames, video.fps, codec="lossless")
    assert torch.equal(vae3d.read_video(tmp_path / "copy.mp4").frames, video.frames)
    with pytest.raises(UserError, match=r"\[2, 3, "):
        vae3d.write_video(tmp_path / "x.mp4", video.frames.expand(2, -1, -1, -1, -1), 8)


def test_a_file_is_reconstructed_as_its_frames_are(model, clip, tmp_path):
    video = vae3d.read_video(clip)
    rec = vae3d.reconstruct(model, video.frames)
    assert rec.shape == video.frames.shape
    target = vae3d.reconstruct(model, clip, tmp_path / "rec.mp4", codec="lossless")
    read = vae3d.read_video(target).frames
    assert (read - rec).abs().max() <= 1 / 127.5
    scores = vae3d.score(video.frames, read)
    assert scores == pytest.approx(vae3d.score(clip, target))
    assert set(scores) == {"psnr", "psnr_video", "ssim"}


@pytest.mark.parametrize(
    ("name", "shape", "fps", "codec", "named"),
    [
        ("x.gif", (3, 2, 8, 8), 8, "h264", "x.gif"),
        ("x.mp4", (3, 2, 8, 8), 0, "h264", "fps is 0"),
        ("x.mp4", (3, 2, 8, 8), 8, "vp9", "'vp9'"),
        ("x.mp4", (3, 0, 8, 8), 8, "h264", r"\[1, 3, 0, 8, 8\]"),
        ("x.mp4", (2, 3, 8, 8), 8, "h264", r"\[1, 2, 3, 8, 8\]"),
    ],
)
def test_what_is_no_video_is_not_written(tmp_path, name, shape, fps, codec, named):
    with pytest.raises(UserError, match=named):
        vae3d.write_video(tmp_path / name, torch.zeros(shape), fps, codec=codec)
    with pytest.raises(UserError, match=r"nan|NaN"):
        vae3d.write_video(tmp_path / "nan.mp4", torch.full((3, 2, 8, 8), torch.nan), 8)
    with pytest.raises(PixelError, match="0 to 255"):
        vae3d.write_video(tmp_path / "white.mp4", torch.full((3, 2, 8, 8), 128.0), 8)
    assert not list(tmp_path.iterdir())


def test_every_frame_of_a_file_is_read_once_and_shown_by_the_bar(clip, tmp_path, monkeypatch, capsys):
    model = tiny.model("taehv")
    assert model.stream(24, 32).lookahead > 0
    read = []

    def read_resized(reader, indices, size):
        read.extend(indices)
        return clips.read_resized(reader, indices, size)

    monkeypatch.setattr("vae3d.inference.reconstruct.read_resized", read_resized)
    target = vae3d.reconstruct(model, clip, tmp_path / "rec.mp4", codec="lossless", progress=True)
    assert read == list(range(21))
    assert "21/21" in capsys.readouterr().err
    rec = vae3d.reconstruct(model, vae3d.read_video(clip).frames)
    assert (vae3d.read_video(target).frames - rec).abs().max() <= 1 / 127.5


def test_metrics_that_are_built_once_score_many(clip):
    video = vae3d.read_video(clip).frames
    metrics = build_metrics(["psnr", "flicker"])
    for other in (video * 0.9, video * 0.8):
        assert vae3d.score(video, other, metrics) == vae3d.score(video, other, ["psnr", "flicker"])
        assert vae3d.score(video, other, "psnr").keys() == {"psnr", "psnr_video"}
    pair = vae3d.score(video.repeat(2, 1, 1, 1, 1), torch.cat([video * 0.9, video * 0.8]), metrics)
    assert pair["psnr"] == pytest.approx(sum(vae3d.score(video, video * f)["psnr"] for f in (0.9, 0.8)) / 2)


def test_identical_clips_have_the_best_ssim_and_wrong_pairs_are_named(clip, tmp_path):
    video = vae3d.read_video(clip, num_frames=5)
    assert vae3d.score(video.frames, video.frames, ["ssim"])["ssim"] == pytest.approx(1)
    vae3d.write_video(tmp_path / "short.mp4", video.frames, 8)
    with pytest.raises(UserError, match="21 frames"):
        vae3d.score(clip, tmp_path / "short.mp4")
    with pytest.raises(UserError, match="two"):
        vae3d.score(clip, video.frames)
    with pytest.raises(MetricError, match="sssim"):
        vae3d.score(video.frames, video.frames, ["sssim"])
    with pytest.raises(MetricError, match=r"\[1, 3, 4, "):
        vae3d.score(video.frames, video.frames[:, :, :4])
    with pytest.raises(PixelError, match=r"video\[None\]"):
        vae3d.score(video.frames[0], video.frames[0])
    with pytest.raises(PixelError, match="0 to 255"):  # clamped, any two such videos would be equal
        vae3d.score(video.frames * 127.5 + 127.5, video.frames)


def test_the_file_that_mypy_checks_uses_everything():
    """.github/workflows/lint.yml runs mypy --strict on it."""
    names = {node.attr for node in ast.walk(ast.parse(PUBLIC.read_text())) if isinstance(node, ast.Attribute)}
    assert set(vae3d.__all__) <= names


def blocks(language: str) -> list[str]:
    """The blocks of code of docs/python.md in this language."""
    text = (tiny.ROOT / "docs/python.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def prepare(folder: Path, model: vae3d.VideoAutoencoder) -> Path:
    """Write the files that docs/python.md names."""
    tiny.write_video(folder / "clip.mp4", tiny.frames(21, 24, 32))
    vae3d.save(model, folder / "runs/opensora_stage3")
    vae3d.save(tiny.model("wan"), folder / "Wan2.1_VAE.pth", layout="wan")
    vae3d.save(vae3d.build("taesd", "model.variant=taef2"), folder / "taef2", layout="taesd")
    for file in (folder / "taef2").iterdir():
        file.rename(folder / file.name)
    encoder = vae3d.build(
        "taehv", "model.variant=taew2_1", "model.channels=8", "model.decoder_channels=[8,8,8,8]"
    ).eval()
    with torch.no_grad():
        torch.save(encoder.encode(vae3d.read_video(folder / "clip.mp4").frames).mode(), folder / "clip_latents.pt")
    return folder


@pytest.fixture(scope="module")
def ran(model, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder in which the examples were run, as docs/python.md says, and what each printed."""
    folder = prepare(tmp_path_factory.mktemp("examples"), model)
    commands = [shlex.split(line, comments=True) for line in "".join(blocks("bash")).splitlines()]
    examples = [(Path(command[1]).stem, command[2:]) for command in commands if command[0] == "python"]
    return folder, {example: run_example(example, arguments, folder) for example, arguments in examples}


def run_example(example: str, arguments: list[str], folder: Path) -> str:
    """Run an example in `folder`, as python examples/EXAMPLE.py ARGUMENTS does; returns what it prints."""
    script, printed = str(tiny.ROOT / f"examples/{example}.py"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script, *arguments])
        with contextlib.suppress(SystemExit) if arguments == ["--help"] else contextlib.nullcontext():
            runpy.run_path(script, run_name="__main__")
    return printed.getvalue()


def test_every_example_is_on_the_page_and_has_a_help(ran):
    scripts = {file.stem: file for file in (tiny.ROOT / "examples").glob("*.py")}
    assert set(scripts) == set(ran[1])
    for example, file in scripts.items():
        summary = ast.get_docstring(ast.parse(file.read_text())).splitlines()[0]
        assert summary in run_example(example, ["--help"], tiny.ROOT)


def test_the_own_loop_lowers_the_loss_and_saves(ran):
    folder, printed = ran
    losses = [float(line.split()[-1]) for line in printed["own_loop"].splitlines()]
    assert losses[-1] < losses[0]
    assert vae3d.load(folder / "trained").variant == "taesd"


def test_the_examples_of_reconstruction_and_metrics_score_alike(ran, model):
    folder, printed = ran
    clip = vae3d.read_video(folder / "clip.mp4").frames
    rec = vae3d.read_video(folder / "rec.mp4").frames
    assert (rec - vae3d.reconstruct(model, clip)).abs().max() <= 1 / 127.5
    scores = vae3d.score(clip, rec)
    assert f"'psnr': {scores['psnr']:.4f}" in printed["reconstruct"]
    assert f"psnr             {scores['psnr']:.4f}" in printed["metrics"]


def test_a_fine_tuned_wan_computes_the_same_in_diffusers_and_keeps_its_encoder(ran):
    folder, printed = ran
    assert float(printed["finetune_wan"].split()[-1]) < 1e-5
    before, after = vae3d.load(folder / "Wan2.1_VAE.pth"), vae3d.load(folder / "wan_vae")
    parts = before.trainable_parts(), after.trainable_parts()
    for name, equal in ("encoder", True), ("decoder", False):
        pairs = zip(*(torch.nn.ModuleList(part[name]).parameters() for part in parts), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == equal


def test_the_example_of_latents_caches_and_decodes(ran):
    folder, printed = ran
    assert "4 clips" in printed["taef2_latents"]
    clip = vae3d.read_video(folder / "clip.mp4", num_frames=5, height=32, width=32).frames
    codec = vae3d.open_codec(folder / "taef2_encoder.pth")
    z = LatentCache(folder / "latents", codec)[0].z
    assert (codec.encode(clip)[0] - z).abs().max() < 1e-2  # stored in fp16
    assert vae3d.read_video(folder / "latents/first.mp4").frames.shape == (1, 3, 5, 32, 32)


def test_the_example_of_a_decoder_from_latents_trains_and_saves(ran):
    folder, printed = ran
    scores = [float(line.split()[3]) for line in printed["decoder_from_latents"].splitlines()]
    assert len(scores) == 11
    assert len(set(scores)) > 5  # it trains
    decoder = vae3d.load(folder / "small")
    latents = torch.load(folder / "clip_latents.pt", weights_only=True)
    with torch.no_grad():
        video = decoder.decode(latents[..., 2:], 21).clamp(-1, 1)
    original = vae3d.read_video(folder / "clip.mp4").frames
    assert vae3d.score(original[..., 16:], video)["psnr"] == pytest.approx(scores[-1], abs=0.01)
    assert vae3d.read_video(folder / "small/right_third.mp4").frames.shape == (1, 3, 21, 24, 32)


def test_the_example_of_a_decoder_starts_as_the_image_decoder_that_it_is_given(ran, tmp_path):
    """Of frames that do not change, and with latents that are TAESD's: the first frame is TAESD's, but for a block."""
    folder = ran[0]
    image = vae3d.build("taesd", "model.variant=taesd3").eval()
    with torch.no_grad():
        for conv in (module for module in image.decoder[-2].modules() if isinstance(module, torch.nn.Conv2d)):
            conv.weight.zero_(), conv.bias.zero_()  # of the block at full resolution, which TAEHV has not
        vae3d.save(image, tmp_path / "taesd3")
        clip = vae3d.read_video(folder / "clip.mp4", num_frames=1).frames.expand(-1, -1, 5, -1, -1)
        vae3d.write_video(tmp_path / "still.mp4", clip, fps=8, codec="lossless")
        torch.save(image.encode(clip[:, :, :2]).mode(), tmp_path / "latents.pt")
    given = "still.mp4 latents.pt small --variant taew2_1 --steps 3 --crop 2 --latent-frames 2 --lr 0 --image-decoder taesd3"
    run_example("decoder_from_latents", given.split(), tmp_path)
    with torch.no_grad():
        decoded = vae3d.load(tmp_path / "small").decode(torch.load(tmp_path / "latents.pt", weights_only=True), 5)
        expected = image.decode(image.encode(clip).mode())
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-3)


def test_the_python_of_the_page_runs(ran, tmp_path, monkeypatch):
    monkeypatch.chdir(ran[0])
    names: dict[str, Any] = {}
    for block in blocks("python"):
        if "from_pretrained(" not in block:  # of the hub, see the next test
            exec(block, names)
    assert names["frames"].shape == (1, 3, 17, 24, 32)


def test_the_calls_of_the_hub_on_the_page_have_the_right_arguments():
    [block] = [block for block in blocks("python") if "from_pretrained(" in block]
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    assert len(calls) == 3
    for call in calls:
        values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        inspect.signature(getattr(vae3d, call.func.attr)).bind(*call.args, **values)


def test_the_commands_of_the_page_run(ran, monkeypatch, capsys):
    folder = ran[0]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(try_video, "default_checkpoint", lambda: folder / "runs/opensora_stage3")
    commands = [shlex.split(line, comments=True) for line in "".join(blocks("bash")).splitlines()]
    tried = [command[1:] for command in commands if command[0] == "vae3d"]
    assert len(tried) == 2
    for arguments in tried:
        assert cli.main([*arguments, "--frames", "2"]) == 0
    assert (folder / "try_clip/index.html").is_file()
    assert (folder / "try_clip_opensora_stage3/index.html").is_file()


def test_trying_a_video_writes_a_page_with_scores(model, clip, tmp_path, capsys, monkeypatch):
    for variable in ("VAE3D_WEIGHTS", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    vae3d.save(model, tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/private.txt").write_text("of another")
    assert cli.main(["try", str(clip), str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--frames", "9"]) == 0
    output = capsys.readouterr()
    assert "private.txt" not in output.out + (tmp_path / "out/index.html").read_text()
    assert f"{tmp_path}/out/index.html" in output.out
    assert "psnr" in output.out
    assert "fetch-weights --metrics lpips_alex" in output.err  # no weights in tests
    page = (tmp_path / "out/index.html").read_text()
    assert page.count('class="clip" data-id="video"') == 1
    assert '"psnr": [' in page
    assert "the first 9 of 21 frames of 32 x 24" in page
    assert vae3d.read_video(tmp_path / "out/reconstruction.mp4").frames.shape == (1, 3, 9, 24, 32)
    assert vae3d.read_video(tmp_path / "out/side_by_side.mp4").frames.shape[2] == 9
    assert (tmp_path / "out/side_by_side.webp").is_file()
    own = tmp_path / "out/reconstruction.mp4"
    before = own.read_bytes()
    with pytest.raises(SystemExit):
        cli.main(["try", str(own), str(tmp_path / "model"), "--out", str(tmp_path / "out")])
    assert f"{own} would be overwritten" in capsys.readouterr().err
    assert own.read_bytes() == before
    (tmp_path / "out/index.html").write_text("<h1>my page</h1>")
    with pytest.raises(SystemExit):
        cli.main(["try", str(clip), str(tmp_path / "model"), "--out", str(tmp_path / "out")])
    assert "out/index.html is no page of vae3d" in capsys.readouterr().err
    assert (tmp_path / "out/index.html").read_text() == "<h1>my page</h1>"


def test_no_side_of_a_picture_is_cut_off_where_its_pixels_are_not_square():
    info = MediaInfo(3, 576, 720, 25.0, "h264", "yuv420p", aspect=64 / 45)
    assert try_video.reduced_size(info, 256) == (256, 454)  # as 1024 x 576
    assert try_video.reduced_size(info, 576) == (576, 720)  # as stored
    assert try_video.reduced_size(replace(info, width=721), 576) == (576, 1024)


def test_without_weights_and_network_files_sizes_and_folder_are_named(clip, tmp_path, capsys, monkeypatch):
    def provide(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(try_video, "provide", provide)
    monkeypatch.chdir(tmp_path)
    for variable in ("VAE3D_WEIGHTS", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["try", str(clip)])
    printed = capsys.readouterr().err
    assert "no route" in printed
    assert "vae3d try VIDEO CHECKPOINT" in printed
    assert "fetch-weights taef2_encoder.pth taef2_decoder.pth" in printed
    for file in (weights.FILES[name] for name in try_video.DEFAULT):
        assert f"{file.url}  ({file.size:,} bytes)" in printed
    assert str(tmp_path / "none") in printed
    assert list(tmp_path.iterdir()) == [clip]


def test_an_image_is_tried_as_one_and_scored_without_metrics_of_motion(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae3d.save(model, "model")
    Image.fromarray(tiny.frames(1, 40, 48)[0]).save("a photo ä.png")
    assert cli.main(["try", "a photo ä.png", "model", "--tile", "32", "--tile_overlap", "16"]) == 0
    printed = capsys.readouterr().out
    assert "image: 48 x 40" in printed
    assert "coded in: blended tiles of 32 x 32, overlapping by 16" in printed
    assert "flicker" not in printed
    names = {file.name for file in (tmp_path / "try_a-photo-ä_model").iterdir()}
    assert names == {"index.html", "reconstruction.png", "side_by_side.png"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["none.mp4", "model"], "none.mp4"),
        (["clip.mp4", "none"], "none"),
        (["clip.mp4", "model", "--device", "foo"], "foo"),
        (["clip.mp4", "model", "--out", "clip.mp4"], "clip.mp4"),
        (["clip.mp4", "model", "--tile", "7"], "tile=7"),
    ],
)
def test_what_cannot_be_tried_is_named_and_nothing_written(
    model, clip, tmp_path, capsys, monkeypatch, arguments, named
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "reconstruct", None)  # not reached
    vae3d.save(model, "model")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["try", *arguments])
    assert f"error: {'device=' if named == 'foo' else ''}{named}" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"clip.mp4", "model"}


def test_a_file_needs_a_target_that_is_another_file(model, clip, tmp_path):
    with pytest.raises(UserError, match=r"clip\.mp4"):
        vae3d.reconstruct(model, clip)
    (tmp_path / "same.mp4").symlink_to(clip)
    with pytest.raises(UserError, match=r"same\.mp4 is the source"):
        vae3d.reconstruct(model, clip, tmp_path / "same.mp4")


@pytest.mark.parametrize(("name", "channels"), [("clip.MP4", 3), ("clip.MKV", 4)])
def test_suffixes_of_written_videos_may_be_capitals(tmp_path, name, channels):
    video = torch.rand(1, channels, 2, 16, 16) * 2 - 1
    vae3d.write_video(tmp_path / name, video, fps=8, codec="lossless")
    assert (vae3d.read_video(tmp_path / name, alpha=channels == 4).frames - video).abs().max() <= 1 / 127.5
