"""The scale of latents cannot be got wrong: measured, written into the export once, applied by the codec alone."""

from __future__ import annotations

import ast
import json
import re

import pandas as pd
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan

from tests import tiny
from tests.latents import caches, families
from vae3d.checkpoints.export import write_diffusers, write_export
from vae3d.checkpoints.formats import Checkpoint, CheckpointError, read_checkpoint
from vae3d.latents.cache import LatentCache
from vae3d.loading import load, model_config, open_codec
from vae3d.models.spatial import SpatialVAE

RAW = {name: families.OVERRIDES[name] for name in ("spatial", "temporal_vae", "wan", "wan22")}
RAW["taehv"] = families.RAW_TAEHV
PUBLISHED = (0.18215, 0.13025, 1.5305, 0.0609, 0.3611, 0.1159, 1.15258426, 0.476986, 1.03682)
PRESETS = ("vae3d/checkpoints/", "vae3d/models/spatial.py")  # what published files do not tell, and SDXL's default


def export(name, folder):
    """A tiny model with random weights, whose channels differ."""
    config = model_config(name, *tiny.MODEL[name], *RAW[name])
    model = tiny.model(name, *RAW[name])
    with torch.no_grad():
        for number, p in enumerate(p for p in model.trainable_parts()["encoder"][-1].parameters() if p.ndim == 1):
            p.add_(torch.linspace(-1, 1, len(p)) + number)
    write_export(Checkpoint(config, model.state_dict(), folder, "export"), folder)
    return folder


@pytest.fixture(scope="module")
def few(videos, tmp_path_factory):
    """A table of three videos."""
    paths = [str(videos.parent / path) for path in pd.read_csv(videos)["path"][:3]]
    pd.DataFrame({"path": paths}).to_csv(file := tmp_path_factory.mktemp("few") / "few.csv", index=False)
    return file


@pytest.fixture
def latent_stats():
    """`vae3d latent-stats` as a function of its arguments."""
    return lambda *arguments: tiny.status("latent-stats", *arguments)


@pytest.mark.parametrize("name", RAW)
def test_train_time_latents_have_mean_0_and_deviation_1_per_channel(name, few, tmp_path, latent_stats):
    before = open_codec(export(name, tmp_path / "export"), pixel_range="uint8")
    caches.made(few, tmp_path / "cache", before, frames=5, dtype="fp32")
    assert latent_stats(tmp_path / "cache", "--write", tmp_path / "export", "--per_channel") == 0
    ours = open_codec(tmp_path / "export", pixel_range="uint8")
    cache = LatentCache(tmp_path / "cache", ours)
    assert len(cache) == 3
    moments = [cache.moments(place) for place in range(len(cache))]
    mean, std = (torch.cat([getattr(m, part).flatten(1) for m in moments], 1).double() for part in ("mean", "std"))
    torch.testing.assert_close(mean.mean(1), torch.zeros(len(mean)).double(), rtol=0, atol=1e-5)
    spread = (mean.var(1, correction=0) + std.square().mean(1)).sqrt()
    torch.testing.assert_close(spread, torch.ones_like(spread), rtol=1e-5, atol=0)
    drawn = torch.cat([cache[place].z.flatten(1) for place in range(len(cache))], 1)
    assert (drawn.mean(1).abs() < 0.15).all()
    assert ((drawn.std(1) - 1).abs() < 0.15).all()

    clip = caches.pixels(caches.job(few, tmp_path, ours, frames=5), 0)
    torch.testing.assert_close(ours.moments(clip).mean[0], cache.moments(0).mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.raw_moments(clip).mean, before.raw_moments(clip).mean)
    assert (ours.encode(clip) - before.encode(clip)).abs().max() > 0.05
    whole = [codec.decode(codec.encode(clip), 5, (16, 16)).int() for codec in (ours, before)]
    assert (whole[0] - whole[1]).abs().max() <= 1  # of 255, where rounding falls to the other side


def test_one_factor_is_written_on_request_and_deviations_of_means_too(few, tmp_path, latent_stats, capsys):
    folder = export("spatial", tmp_path / "export")
    caches.made(few, tmp_path / "cache", open_codec(folder, pixel_range="uint8"), frames=1, dtype="fp32")
    told = LatentCache(tmp_path / "cache").statistics
    for arguments, expected in [
        ([], {"scaling_factor": 1 / told["scale"], "shift_factor": 0.1}),
        (["--shift"], {"scaling_factor": 1 / told["scale"], "shift_factor": told["shift"]}),
        (["--per_channel"], {"scaling_factor": [1 / std for std in told["std"]], "shift_factor": told["mean"]}),
        (["--per_channel", "--of_means"], {"scaling_factor": [1 / std for std in told["std_of_mean"]]}),
    ]:
        out = tmp_path / "-".join(["out", *arguments])
        assert latent_stats(tmp_path / "cache", "--write", folder, "--out", out, *arguments) == 0
        config = read_checkpoint(out).config
        for key, value in expected.items():
            assert config[key] == pytest.approx(value, rel=1e-9)
    new = r"by the new scale: means -?0.000 to -?0.000, deviations 1.000 to 1.000\n"
    assert len(re.findall(new, capsys.readouterr().out)) == 2
    (tmp_path / "file").touch()
    assert latent_stats(tmp_path / "cache", "--write", folder, "--out", tmp_path / "file/inner") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize(("name", "reference"), [("spatial", AutoencoderKL), ("wan", AutoencoderKLWan)])
def test_factors_per_channel_reach_diffusers_and_come_back(name, reference, few, tmp_path, latent_stats):
    style = {"wan": ["model.multipliers=[1,2,4,4]", "model.downsample=[false,true,true]"]}.get(name, [])
    config = model_config(name, *tiny.MODEL[name], *style)
    write_export(Checkpoint(config, tiny.model(name, *style).state_dict(), tmp_path, "export"), tmp_path / "export")
    ours = open_codec(tmp_path / "export", pixel_range="uint8")
    caches.made(few, tmp_path / "cache", ours, frames=1, dtype="fp32")
    assert latent_stats(tmp_path / "cache", "--write", tmp_path / "export", "--per_channel") == 0
    write_diffusers(read_checkpoint(tmp_path / "export"), tmp_path / "diffusers")
    told = LatentCache(tmp_path / "cache", open_codec(tmp_path / "diffusers")).statistics  # of the same autoencoder
    theirs = reference.from_pretrained(tmp_path / "diffusers", local_files_only=True).config
    assert theirs.latents_mean == pytest.approx(told["mean"])
    assert theirs.latents_std == pytest.approx(told["std"])
    back, z = load(tmp_path / "diffusers"), torch.randn(2, 4, 1, 3, 3)
    torch.testing.assert_close(back.normalize(z), load(tmp_path / "export").normalize(z))
    torch.testing.assert_close(back.denormalize(back.normalize(z)), z)


def test_a_config_that_tells_its_scale_twice_is_refused(spatial_export, tmp_path):
    write_diffusers(read_checkpoint(spatial_export), tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    for more in ({"latents_mean": [0] * 4}, {"latents_mean": [0] * 4, "latents_std": [1] * 4, "shift_factor": 0.5}):
        (tmp_path / "config.json").write_text(json.dumps(told | more))
        with pytest.raises(CheckpointError, match="both latents_mean and latents_std or neither"):
            read_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="has 3 entries; give 1 or 4"):
        SpatialVAE((8, 8), groups=4, scaling_factor=[1, 2, 3])


def test_what_has_no_scale_of_its_own_is_refused(few, tmp_path, latent_stats, capsys):
    config = model_config("taehv", *tiny.MODEL["taehv"])
    write_export(Checkpoint(config, tiny.model("taehv").state_dict(), tmp_path, "export"), tmp_path / "taehv")
    ours = open_codec(tmp_path / "taehv", pixel_range="uint8")
    caches.made(few, tmp_path / "cache", ours, frames=1)
    assert latent_stats(tmp_path / "cache", "--write", tmp_path / "taehv") == 2
    assert "its latents are already normalised" in capsys.readouterr().err
    other = export("spatial", tmp_path / "spatial")
    assert latent_stats(tmp_path / "cache", "--write", other) == 2
    assert "holds latents of another autoencoder" in capsys.readouterr().err
    assert latent_stats(tmp_path) == 2
    assert "is not a latent cache" in capsys.readouterr().err


def code():
    """Files that may hold no scale factor."""
    files = [*(tiny.ROOT / "vae3d").rglob("*.py"), *(tiny.ROOT / "scripts").glob("*.py"), *tiny.ROOT.glob("*.py")]
    files += [file for file in (tiny.ROOT / "conf").rglob("*.yaml") if file.parent.name != "model"]
    names = [str(file.relative_to(tiny.ROOT)) for file in files]
    return [name for name in names if not name.startswith(PRESETS)]


def numbers(name):
    """The literal numbers of a file; those of comments and docstrings are none."""
    text = (tiny.ROOT / name).read_text()
    if name.endswith(".yaml"):
        found = re.findall(r"-?\d+\.\d+(?:e-?\d+)?", re.sub(r"#.*", "", text))
        return [float(number) for number in found]
    return [n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant) and isinstance(n.value, float)]


def test_no_literal_scale_factor_stands_outside_of_presets():
    names = code()
    assert len(names) > 100
    found = {name: [n for n in numbers(name) if any(abs(abs(n) - p) < 1e-4 * p for p in PUBLISHED)] for name in names}
    assert {name: told for name, told in found.items() if told} == {}
    assert 0.13025 in numbers("vae3d/models/spatial.py")
    assert 0.18215 in numbers("conf/model/sd_vae.yaml")


def test_only_models_and_the_doors_to_them_know_factors():
    """Whoever else multiplied by a scale would do it a second time."""
    doors = (
        "vae3d/models/",
        "vae3d/checkpoints/",
        "vae3d/latents/identity.py",
        "vae3d/latents/scale.py",
        "vae3d/loading.py",
        "scripts/",
        "vae3d/commands/convert.py",
        "vae3d/commands/latent_stats.py",
        "vae3d/commands/measure_scale.py",
    )
    knowing = [
        name
        for name in code()
        if name.endswith(".py")
        and re.search(r"\.scaling_factor|\.shift_factor|[\"']scaling_factor", (tiny.ROOT / name).read_text())
    ]
    assert [name for name in knowing if not name.startswith(doors)] == [
        "vae3d/latents/statistics.py"
    ]  # which tells 1 / scale
