"""Samples of trained models on disk: their files, that they depend on nothing but the seed, and what is refused."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import sys

import av
import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image

from tests import tiny
from tests.diffusion import latent_runs
from tests.diffusion.toy import shaken
from tests.stream_stub import StreamStub
from vae3d.checkpoints.formats import CheckpointError
from vae3d.checkpoints.location import absolute_path
from vae3d.commands import console
from vae3d.config.issues import ConfigError
from vae3d.diffusion import sampling
from vae3d.diffusion.build import build_network, network_config
from vae3d.diffusion.export import CONFIG, read_export, weights_file, write_export
from vae3d.diffusion.quality import draw_reference_sets
from vae3d.diffusion.sampling import decoded
from vae3d.errors import UserError
from vae3d.inference.pictures import grid
from vae3d.latents.cache import LatentCache
from vae3d.latents.identity import vae_metadata
from vae3d.loading import open_codec
from vae3d.result_folder import FolderError

CLASSES = ["cat", "dog"]


def export(folder, vae, size, network, classes=(), process=None, seed=0, zero=False, scale=1.0):
    """Of a network with random weights, none of which is zero; or of one that gives zeros."""
    codec = open_codec(vae)
    shape = codec.latent_shape(*size)
    config = network_config({**network, "num_classes": len(classes)}, shape)
    torch.manual_seed(seed)
    weights = [shaken(build_network(config, shape), 0 if zero else by).state_dict() for by in (0.05, 0.1)]
    told = {
        "step": 1,
        "network": config,
        "process": process or {"_target_": "vae3d.diffusion.flow.RectifiedFlow"},
        "latent_shape": list(shape),
        "size": list(size),
        "classes": list(classes),
        "trained_classes": list(range(len(classes))),
        "label_dropout": 0.1,
        "vae": {"path": str(vae), **vae_metadata(codec, str(vae))},
        "latents": {"count": 1, "mean": [0.0] * shape[0], "std": [scale] * shape[0]},
    }
    write_export(folder, told, dict(zip((0.9, 0.99), weights, strict=True)))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return latent_runs.pictures(tmp_path_factory.mktemp("pictures"), count=2, size=32)


@pytest.fixture(scope="module")
def vae(pictures, tmp_path_factory):
    return latent_runs.vae("spatial", tmp_path_factory.mktemp("image") / "vae", pictures, size=32)


@pytest.fixture(scope="module")
def of_images(vae, tmp_path_factory):
    network = {"_target_": "vae3d.diffusion.unet.LatentUNet", "width": 16, "head_channels": 16, "blocks": 1}
    return export(tmp_path_factory.mktemp("images") / "step-0000001", vae, (1, 32, 32), network, CLASSES)


@pytest.fixture(scope="module")
def of_videos(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    vae = latent_runs.vae("wan", folder / "vae", pictures, scaled=False)
    return export(
        folder / "step-0000001",
        vae,
        (5, 32, 32),
        {"_target_": "vae3d.diffusion.transformer.VideoTransformer", "width": 24, "heads": 2, "depth": 1},
    )


def drawn(model, out, *overrides):
    latent_runs.sample(f"checkpoint={model}", f"out={out}", *overrides)
    return out


def results(out) -> list[str]:
    """Files beside the record of the command and its lock."""
    return [path.name for path in out.iterdir() if path.name not in (".lock", "command.json")]


def everything(out) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_samples_are_the_same_where_they_are_copied_beside_the_computation(of_images, tmp_path):
    settings = ["count=5", "batch_size=2", "steps=1", "write=[files,npz]"]
    expected = everything(drawn(of_images, tmp_path / "cpu", *settings))
    with StreamStub().active() as stub:
        found = everything(drawn(of_images, tmp_path / "gpu", *settings))
    assert len(stub.host_waits) == 3
    assert found == expected


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.diffusion.test_latent_sampling import drawn

rename, left = os.replace, iter(range({when}))

def replace(*args):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(*args)

os.replace = replace
drawn(Path({run!r}), Path({out!r}), *{settings!r})
"""


@pytest.fixture(scope="module")
def whole(of_images, tmp_path_factory):
    settings = ["count=3", "batch_size=2", "steps=2"]
    return settings, everything(drawn(of_images, tmp_path_factory.mktemp("whole"), *settings))


@pytest.mark.parametrize("when", [1, 2, 4, 6])
def test_killed_sampling_resumes_to_the_same_bytes(when, of_images, whole, tmp_path, monkeypatch):
    settings, files = whole
    script = tmp_path / "killed.py"
    script.write_text(
        KILLED.format(
            root=str(tiny.ROOT), when=when, run=str(of_images), out=str(tmp_path / "killed"), settings=settings
        )
    )
    assert tiny.run(sys.executable, str(script), cwd=tmp_path).returncode == -signal.SIGKILL
    batches = len(list((tmp_path / "killed/.latents").glob("0*")))
    drawn_again = []
    inner = sampling.sample_latents
    monkeypatch.setattr(sampling, "sample_latents", lambda *a, **k: drawn_again.append(1) or inner(*a, **k))
    drawn(of_images, tmp_path / "killed", *settings)
    assert everything(tmp_path / "killed") == files
    assert len(drawn_again) == 2 - batches
    with FileLock(tmp_path / "killed/.lock"), pytest.raises(FolderError, match=r"out=.* another process is writing"):
        drawn(of_images, tmp_path / "killed", *settings)


def test_files_of_images(of_images, tmp_path):
    out = drawn(of_images, tmp_path, "guidance=2", "interval=[0.2,0.8]")
    names = [
        "000000_cat.png",
        "000001_dog.png",
        "000002_cat.png",
        "000003_dog.png",
        "grid.png",
        "samples_4x32x32x3.npz",
    ]
    assert sorted(results(out)) == names
    with np.load(out / names[-1]) as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_0"].shape == (4, 32, 32, 3)
        assert arrays["arr_1"].tolist() == [0, 1, 0, 1]
        assert np.array_equal(arrays["arr_0"][1], np.asarray(Image.open(out / names[1])))


def test_files_of_videos_of_another_length(of_videos, tmp_path):
    out = drawn(of_videos, tmp_path, "num_frames=9", "count=2")
    assert sorted(results(out)) == ["000000.mp4", "000001.mp4", "grid.mp4"]
    with av.open(str(out / "000001.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert np.stack(frames).shape == (9, 32, 32, 3)


def test_any_name_of_a_class_is_part_of_a_file_name(vae, tmp_path):
    model = export(
        tmp_path / "model",
        vae,
        (1, 32, 32),
        {"_target_": "vae3d.diffusion.transformer.VideoTransformer", "width": 24, "heads": 2},
        ["a/b", "..", "c\nd e", 300 * "é"],
    )
    for seed in (0, 1):
        out = drawn(model, tmp_path / "out", "write=[files]", f"seed={seed}", "overwrite=true")
        assert (out / "command.json").stat().st_size < 1500  # however many classes and samples there are
        expected = ["000000_a_b.png", "000001_...png", "000002_c_d e.png", "000003_" + 100 * "é" + ".png"]
        assert sorted(results(out)) == expected


def test_the_grid_is_of_the_first_samples(of_images, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "MAX_IN_GRID", 2)
    whole = pixels(drawn(of_images, tmp_path, "write=[npz,grid]"))
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (32, 66, 3)
    assert np.array_equal(grid[:, 34:], whole[1])


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_latents_of_samples_are_measured(prediction, vae, tmp_path, caplog):
    """By a network that has learned nothing, the noise predicted is an error that explodes; v is none."""
    caplog.set_level("INFO", "vae3d")
    network = {"_target_": "vae3d.diffusion.transformer.VideoTransformer", "width": 24, "heads": 2, "depth": 1}
    process = {
        "_target_": "vae3d.diffusion.gaussian.GaussianDiffusion",
        "prediction": prediction,
        "variance": "fixed_large",
    }
    model = export(tmp_path / "model", vae, (1, 32, 32), network, process=process, zero=True)
    drawn(model, tmp_path / "out", "steps=20")
    export(tmp_path / "larger", vae, (1, 32, 32), network, process=process, zero=True, scale=8.0)
    assert read_export(tmp_path / "larger").data_rms() == pytest.approx(8)
    told = [record for record in caplog.records if "their latents" in record.message]
    means, stds = ([float(x) for x in line.split()[1:]] for line in told[0].message.replace(",", "").split("\n")[1:])
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    if prediction == "v":
        assert max(map(abs, means)) < 0.3
        assert not warned
    else:
        assert min(stds) > 10
        assert len(warned) == 1
        assert "process.prediction=v or" in warned[0]


def pixels(folder):
    return np.load(folder / "samples_4x32x32x3.npz")["arr_0"].astype(int)


def test_a_sample_depends_on_seed_number_and_class_alone(of_images, tmp_path):
    whole = pixels(drawn(of_images, tmp_path / "a", "guidance=2"))
    again = pixels(drawn(of_images, tmp_path / "b", "guidance=2"))
    parts = pixels(drawn(of_images, tmp_path / "c", "guidance=2", "batch_size=3"))
    other = pixels(drawn(of_images, tmp_path / "d", "guidance=2", "seed=1"))
    assert np.array_equal(whole, again)
    assert np.abs(whole - parts).max() <= 1  # sums of another batch round otherwise
    assert np.abs(whole - other).max() > 20


def test_classes_and_averages_are_chosen(of_images, tmp_path):
    first = pixels(drawn(of_images, tmp_path / "a", "classes=[dog]"))
    both = pixels(drawn(of_images, tmp_path / "b", "ema=0.9"))
    second = pixels(drawn(of_images, tmp_path / "c", "classes=[dog]", "ema=0.99"))
    assert np.array_equal(first[1], both[1])
    assert not np.array_equal(first[0], both[0])
    assert not np.array_equal(first, second)
    with pytest.raises(UserError, match=r"classes=bird: .* cat, dog"):
        drawn(of_images, tmp_path / "d", "classes=[bird,cat]")
    with pytest.raises(CheckpointError, match=r"no averages of ema=0.5; it has 0.9, 0.99"):
        drawn(of_images, tmp_path / "d", "ema=0.5")


def test_averages_at_rates_that_are_close_have_files_of_their_own(tmp_path):
    assert len({weights_file(tmp_path, rate, first=False) for rate in (0.9, 0.9999995, 0.9999999)}) == 3


def test_samples_are_compared_with_latents_of_their_classes(of_images, pictures, vae, tmp_path, caplog):
    caplog.set_level("INFO", "vae3d")
    cache = latent_runs.cache(
        pictures, tmp_path / "cache", vae, size=32, flip=True
    )  # of each class 4, 2 of them mirrored
    out = drawn(of_images, tmp_path / "out", f"against={cache}", "count=3", "classes=[cat,cat,dog]")
    told = json.loads((out / "distances.json").read_text())
    found = told["sliced_wasserstein"]
    assert told["count"] == 3
    assert list(found) == ["samples", "other latents", "noise"]
    assert f"samples {found['samples']:.3f}, other latents" in caplog.text
    codec = open_codec(vae, pixel_range="uint8")
    entries = LatentCache(cache, codec)
    places, others = draw_reference_sets(entries, 3, ["cat", "cat", "dog"])
    assert [entries[place].key.split("/")[1] for place in [*places, *others]] == ["cat", "cat", "dog"] * 2
    assert not {*places} & {*others}
    shown = grid(decoded(codec, torch.stack([entries[place].z for place in places]), (1, 32, 32)))
    assert np.array_equal(shown[0], np.asarray(Image.open(out / "data.png")))

    with pytest.raises(UserError, match="has 4 latents of class cat; two sets of 3 need 6"):
        drawn(of_images, tmp_path / "b", f"against={cache}", "count=3", "classes=cat")
    with pytest.raises(UserError, match="has latents of 4 x 1 x 16 x 16, the samples are of 4 x 1 x 32 x 16"):
        drawn(of_images, tmp_path / "b", f"against={cache}", "height=64", "width=32")


def test_samples_are_compared_with_a_cache_in_tars(of_images, pictures, vae, tmp_path):
    cache = latent_runs.cache(pictures, tmp_path / "cache", vae, size=32, writers=["webdataset"])
    found = []
    for number, against in enumerate((cache, cache / "webdataset")):
        out = drawn(of_images, tmp_path / f"{number}", f"against={against}", "count=2", "classes=[cat,dog]", "steps=1")
        found.append(json.loads((out / "distances.json").read_text())["sliced_wasserstein"])
    assert found[0] == found[1]


def test_samples_of_two_models_are_not_mixed(of_images, tmp_path):
    out = drawn(of_images, tmp_path, "count=3")
    with pytest.raises(UserError, match=r"out=.* another command: count is 3 there and 2 here.* overwrite=true"):
        drawn(of_images, out, "count=2")
    drawn(of_images, out, "count=2", "overwrite=true", "write=[files]")
    assert set(results(out)) == {"000000_cat.png", "000001_dog.png"}
    (out / "mine.png").touch()
    with pytest.raises(UserError, match=r"out=.* holds files that sampling did not write"):
        drawn(of_images, out, "overwrite=true")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/000001.png").touch()
    with pytest.raises(UserError, match=r"out=.*photos holds files that sampling did not write"):
        drawn(of_images, tmp_path / "photos", "overwrite=true")
    assert (tmp_path / "photos/000001.png").is_file()


def test_guidance_needs_a_network_that_knows_no_label(of_images, tmp_path):
    copy = tmp_path / "step-0000001"
    told = {**yaml.safe_load((of_images / CONFIG).read_text()), "label_dropout": 0.0}
    write_export(copy, told, {0.9: read_export(of_images).weights})
    with pytest.raises(UserError, match=r"label_dropout=0, .*guidance"):
        drawn(copy, tmp_path / "out", "guidance=2")
    drawn(copy, tmp_path / "out")


def test_a_folder_that_cannot_be_is_found_before_the_first_sample(of_images, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sampling, "sample_latents", None)
    monkeypatch.setattr(console, "in_sweep", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        console.exit_on_user_error(lambda: drawn(of_images, tmp_path / "file"))
    assert capsys.readouterr().err == f"error: {tmp_path}/file: cannot be written: File exists\n"

    def full():
        raise OSError(errno.ENOSPC, "as Pillow tells it, without the file")

    with pytest.raises(SystemExit, match="2"):
        console.exit_on_user_error(full)
    assert "VAE3D_TRACEBACK=1" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):  # no error of a disk
        console.exit_on_user_error((tmp_path / "none").read_text)
    with pytest.raises(SystemExit, match="2"):
        console.exit_on_user_error(lambda: (tmp_path / "page").write_text("of a\udcff.mp4", encoding="utf-8"))
    assert "not UTF-8" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):  # printed where the locale is another
        console.exit_on_user_error(lambda: (tmp_path / "page").write_text("of 图.mp4", encoding="latin-1"))
    assert "PYTHONIOENCODING" in capsys.readouterr().err


def test_an_autoencoder_of_the_hubs_cache_is_found(of_images, vae, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    shutil.copytree(vae, repository / "snapshots/123")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("123")
    out = drawn(of_images, tmp_path / "out", "vae=owner/name", "count=1", "steps=1", "write=[files]")
    assert results(out) == ["000000_cat.png"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.ckpt").touch()
    assert [absolute_path(path) for path in ("owner/name", "two.ckpt::a")] == ["owner/name", f"{tmp_path}/two.ckpt::a"]


def test_another_autoencoder_is_refused(of_images, pictures, vae, tmp_path):
    other = latent_runs.vae("spatial", tmp_path / "other", pictures, size=32, seed=1)
    with pytest.raises(CheckpointError, match=r"another autoencoder .*: the encoder's weights have sha256"):
        drawn(of_images, tmp_path / "out", f"vae={other}")
    unscaled = latent_runs.vae("spatial", tmp_path / "unscaled", pictures, size=32, scaled=False)
    with pytest.raises(CheckpointError, match=r"another autoencoder .*: the latents_mean of its latents is"):
        drawn(of_images, tmp_path / "out", f"vae={unscaled}")
    moved = vae.rename(vae.with_name("moved"))
    try:
        with pytest.raises(UserError, match=r"does not exist; .*vae=PATH"):
            drawn(of_images, tmp_path / "out")
        drawn(of_images, tmp_path / "out", f"vae={moved}")
    finally:
        moved.rename(vae)


def test_another_network_than_its_configuration_tells_is_refused(of_images, tmp_path):
    copy = tmp_path / "step-0000001"
    told = yaml.safe_load((of_images / CONFIG).read_text())
    weights = read_export(of_images).weights
    told["network"]["width"] = 32
    write_export(copy, told, {0.9: weights})
    with pytest.raises(CheckpointError, match=r"(?s)does not fit the model:.*of another shape"):
        drawn(copy, tmp_path / "out")
    told["network"] |= {"width": 16, "blocks": 2}
    write_export(copy, told, {0.9: weights})
    with pytest.raises(CheckpointError, match=r"(?s)does not fit the model:.*missing in the file"):
        drawn(copy, tmp_path / "out")


def test_what_the_model_cannot_do_is_refused(of_images, of_videos, tmp_path):
    with pytest.raises(UserError, match="trained without classes"):
        drawn(of_videos, tmp_path, "guidance=2")
    with pytest.raises(UserError, match="method is 'ddim'; use euler"):
        drawn(of_images, tmp_path, "method=ddim")
    with pytest.raises(UserError, match="latents of 3 frames; the UNet takes one"):
        drawn(of_images, tmp_path, "num_frames=3", "count=1")
    with pytest.raises(UserError, match=r"write=\[npz\] is for images, and these samples have 5 frames"):
        drawn(of_videos, tmp_path, "write=[npz]")
    with pytest.raises(UserError, match=r"tile=16: a SpatialVAE .* tile_overlap=4 "):
        drawn(of_images, tmp_path, "tile=16")
    with pytest.raises(CheckpointError, match="not a diffusion model"):
        drawn(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError) as why:
        latent_runs.sample_config("checkpoint=nowhere", "steps=0", "guidance=-1", "write=[gif]", "height=3")
    assert len(why.value.issues) == 6  # and there is no out


def test_the_command_as_a_user_types_it(of_images, tmp_path):
    asked = [f"checkpoint={of_images}", f"out={tmp_path / 'out'}", "count=2", "steps=2", "write=[grid]", "device=cpu"]
    done = tiny.run(sys.executable, "-m", "vae3d", "sample", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert results(tmp_path / "out") == ["grid.png"]
