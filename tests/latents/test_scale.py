"""The measured scale of latents: against numpy, in exports of a run and by the script."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, AutoencoderKLWan
from PIL import Image

import vae3d
from tests import tiny
from tests.training.quick import trainer
from tests.training.test_trainer import fresh_accelerate, weights  # noqa: F401
from vae3d import loading
from vae3d.checkpoints.export import write_diffusers, write_export
from vae3d.checkpoints.formats import Checkpoint, read_checkpoint
from vae3d.config.issues import ConfigError
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.loader import read_tables
from vae3d.data.media import DataError
from vae3d.data.sources.open_source import open_source
from vae3d.data.table.file_table import as_file_table
from vae3d.latents.scale import (
    LatentStats,
    ScaleError,
    measure,
    off_scale,
    rescaled,
    spread_clips,
    unscalable_reason,
)
from vae3d.models.taesd import TAESD
from vae3d.training import vae_trainer
from vae3d.types import ClipBatch

RAW = {
    "spatial": [],
    "temporal_vae": [],
    "wan": [],
    "taehv": ["model.variant=taeos1_2", "model.decoder_channels=[8,8,8,8]"],
}


def clips(count: int = 3, frames: int = 5, size: int = 16) -> list[ClipBatch]:
    rng = torch.manual_seed(1)
    return [
        ClipBatch(torch.rand(1, 3, frames, size, size, generator=rng) * 2 - 1, torch.tensor([place]), [""])
        for place in range(count)
    ]


def saved(name: str, folder) -> tuple[torch.nn.Module, Checkpoint]:
    config = loading.model_config(name, *tiny.MODEL[name], *RAW[name])
    model = tiny.model(name, *RAW[name])
    with torch.no_grad():  # channels that differ, and are not of mean 0
        for number, p in enumerate(p for p in model.trainable_parts()["encoder"][-1].parameters() if p.ndim == 1):
            p.add_(torch.linspace(-1, 1, len(p)) + number)
    return model, Checkpoint(config, model.state_dict(), folder, "export")


def test_samples_are_measured_not_means():
    """What a diffusion model trains on; each clip's noise is its own."""
    model = tiny.model("spatial")
    statistics = measure(model, clips(), seed=5)
    with torch.no_grad():
        z = torch.cat([model.encode(c.video).sample(c.generators(5, "cpu")) for c in clips()]).double()
    np.testing.assert_allclose(statistics.mean, z.mean((0, 2, 3, 4)), rtol=1e-6)
    np.testing.assert_allclose(statistics.std, z.std((0, 2, 3, 4), correction=0), rtol=1e-6)
    np.testing.assert_allclose(statistics.over_channels(), (z.mean(), z.std(correction=0)), rtol=1e-6)
    assert statistics.facts() | {"mean": 0, "std": 0} == {
        "clips": 3, "frames_height_width": [5, 16, 16], "mean": 0, "std": 0,
    }  # fmt: skip
    assert measure(model, [*clips(2), *clips(1, frames=1)]).facts()["frames_height_width"] is None


def test_channels_that_diffusion_must_not_be_given():
    means, stds = [0.1, -0.11, 0, 0, float("nan"), 0], [1.09, 1, 0.89, 1.11, 1, float("nan")]
    assert off_scale(means, stds) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("name", RAW)
def test_an_export_with_the_measured_scale_normalizes_to_unit_variance(tmp_path, name, shift):
    model, checkpoint = saved(name, tmp_path)
    write_export(rescaled(checkpoint, model, measure(model, clips()), shift=shift), tmp_path / "export")
    loaded = vae3d.load(tmp_path / "export")
    assert loaded.state_dict().keys() == checkpoint.state.keys()
    with torch.no_grad():
        z = torch.cat([loaded.encode(c.video).sample(c.generators(0, "cpu")) for c in clips()])
        unit = loaded.normalize(z).double()
        torch.testing.assert_close(loaded.denormalize(loaded.normalize(z)), z, rtol=0, atol=1e-5)
    if name == "spatial":
        assert float(unit.std(correction=0)) == pytest.approx(1, abs=1e-5)
        assert (abs(float(unit.mean())) < 1e-5) == shift
        assert loaded.spec.latents_std == (1 / loaded.scaling_factor,) * 4
    else:
        np.testing.assert_allclose(unit.mean((0, 2, 3, 4)), 0, atol=1e-5)
        np.testing.assert_allclose(unit.std((0, 2, 3, 4), correction=0), 1, atol=1e-5)


@pytest.mark.parametrize(("name", "reference"), [("spatial", AutoencoderKL), ("wan", AutoencoderKLWan)])
def test_the_measured_scale_reaches_diffusers(tmp_path, name, reference):
    model, checkpoint = saved(name, tmp_path)
    statistics = measure(model, clips())
    write_diffusers(rescaled(checkpoint, model, statistics, shift=True), tmp_path / "vae")
    info = reference.load_config(tmp_path / "vae")
    if name == "spatial":
        mean, std = statistics.over_channels()
        assert (info["scaling_factor"], info["shift_factor"]) == (pytest.approx(1 / std), pytest.approx(mean))
    else:
        assert info["latents_mean"] == pytest.approx(statistics.mean.tolist())
        assert info["latents_std"] == pytest.approx(statistics.std.tolist())


def test_what_cannot_be_scaled_is_refused(videos, tmp_path):
    assert "already normalised" in unscalable_reason(tiny.model("taehv"))
    with pytest.raises(ConfigError, match=r"trainer\.publish\.measure_scale=4: its latents are .*; use 0"):
        tiny.training(
            "taehv", videos, "stage=finetune", "stage.init_from=random", "loss=recon_kl", "data.frames.min=5",
            "data.frames.max=5", "trainer.publish.measure_scale=4", meta_check=True,
        )  # fmt: skip
    with pytest.raises(ScaleError, match="no clip"):
        measure(tiny.model("spatial"), [])
    model, checkpoint = saved("wan", tmp_path)
    statistics = LatentStats(1, torch.zeros(4), torch.tensor([1.0, 0, 1, 0]), (1, 2, 2))
    with pytest.raises(ScaleError, match="latents of channel 1, 3 do not vary"):
        rescaled(checkpoint, model, statistics)


def test_clips_are_spread_over_the_table_and_broken_files_are_told(videos):
    settings = ClipSettings(16, 16)
    table = read_tables(open_source(videos), settings, 0, 1.0).train.to_pandas()
    table.loc[11, "path"] = "/nowhere.png"
    errors = []
    found = list(spread_clips(table, settings, 1, 3, errors))
    assert [int(clip.positions) for clip in found] == [0, 6]  # of rows 0, 6 and 11
    assert [path for path, _ in errors] == ["/nowhere.png"]
    assert len(list(spread_clips(table, settings, 15, 100, errors))) == 7  # those of 15 to 21 frames
    again = list(spread_clips(table, settings, 1, 3, errors))
    assert all(torch.equal(a.video, b.video) for a, b in zip(found, again, strict=True))


MEASURES = {"trainer.publish.measure_scale": 4, "trainer.save_every": 1, "trainer.ema.decay": 0.5}


def test_every_export_of_a_run_has_its_own_scale_and_training_knows_nothing_of_it(videos, tmp_path):
    plain = trainer(videos, tmp_path / "plain", **(MEASURES | {"trainer.publish.measure_scale": 0}))
    plain.fit()
    t = trainer(videos, tmp_path / "run", **MEASURES)
    t.fit()
    assert t.network.training
    torch.testing.assert_close(weights(t), weights(plain), rtol=0, atol=0)
    factors = []
    for step in (1, 2):
        folder = tmp_path / f"run/exports/step-000000{step}"
        info = yaml.safe_load((folder / "model.yaml").read_text())
        loaded = vae3d.load(folder)
        factors.append(loaded.scaling_factor)
        assert info["latents"]["clips"] == 4
        data = t.data
        found = measure(
            loaded, spread_clips(data.streams[0].table, data.streams[0].settings, 1, 4, []), t.config.run.seed
        )
        assert loaded.scaling_factor == pytest.approx(1 / found.over_channels()[1], rel=1e-6)
        assert info["latents"]["std"] == pytest.approx(found.std.tolist(), rel=1e-6)
    assert factors[0] != factors[1]
    assert t.network.scaling_factor == 0.13025


@pytest.mark.parametrize("streaming", [False, True])
def test_an_export_without_readable_clips_keeps_its_scale_and_says_so(videos, tmp_path, caplog, monkeypatch, streaming):
    t = trainer(videos, tmp_path, **MEASURES)
    if streaming:

        def none(*_):
            raise DataError("none of the first 40 has 5 frames")

        monkeypatch.setattr(vae_trainer, "longest_clips", none)
    else:
        stream = t.data.streams[0]
        unreadable = as_file_table(stream.table.to_pandas().assign(path="/nowhere.mp4"))
        t.data = replace(t.data, streams=[replace(stream, table=unreadable)])
    t.checkpointer.save(t.step)
    reason = "none of the first 40" if streaming else "the scale of the latents cannot be"
    assert f"the export of step 0 has the scale of the configuration: {reason}" in caplog.text
    assert vae3d.load(tmp_path).scaling_factor == 0.13025


def test_a_scale_that_differs_does_not_keep_an_image_vae_from_starting(videos, tmp_path):
    trainer(videos, tmp_path, **MEASURES).fit()
    notes = loading.initialize(tiny.model("spatial"), str(tmp_path))
    assert any("scaling_factor is" in note and "0.13025 in the model" in note for note in notes)


# --- vae3d measure-scale


def script(*arguments: object) -> int:
    return tiny.status("measure-scale", *arguments, "--height=16", "--width=16")


def test_the_script_rewrites_the_newest_export_of_a_run(videos, tmp_path, capsys):
    trainer(videos, tmp_path).fit()
    folder = tmp_path / "exports/step-0000002"
    (folder / "notes.txt").write_text("of the user")
    before = read_checkpoint(folder)
    assert script(tmp_path, videos.parent, "--count=3", "--shift") == 0
    after, info = read_checkpoint(folder), yaml.safe_load((folder / "model.yaml").read_text())
    assert all(torch.equal(after.state[key], tensor) for key, tensor in before.state.items())
    assert (info["stage"], info["step"], info["latents"]["clips"]) == ("finetune", 2, 3)
    assert after.config["scaling_factor"] != before.config["scaling_factor"]
    assert after.config["shift_factor"] != 0
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "model.yaml", "notes.txt"]
    assert f"scaling_factor: 0.13025 -> {after.config['scaling_factor']:.5f}" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [8, 500])  # bytes: not an image; one whose size can be read, and no more
def test_the_script_gives_the_reasons_where_no_clip_can_be_read(kept, tmp_path, capsys):
    vae3d.save(tiny.model("spatial"), tmp_path / "export")
    broken = tmp_path / "broken.png"
    Image.fromarray(tiny.frames(1)[0]).save(broken)
    broken.write_bytes(broken.read_bytes()[:kept])
    assert script(tmp_path / "export", broken) == 2
    assert f"{broken}: " in capsys.readouterr().err


def test_the_script_makes_an_export_of_published_weights(videos, tmp_path, capsys):
    overrides = ["model.channels=[32,32]", "model.groups=32", "model.layers=1"]
    model = vae3d.build("spatial", *overrides)
    write_diffusers(
        Checkpoint(loading.model_config("spatial", *overrides), model.state_dict(), tmp_path, ""), tmp_path / "a"
    )
    assert script(tmp_path / "a", videos) == 2
    assert "is not an export; use --out" in capsys.readouterr().err
    assert script(tmp_path / "a", videos, "--count=2", "--out", tmp_path / "b") == 0
    assert (
        vae3d.load(tmp_path / "b").scaling_factor
        != json.loads((tmp_path / "a/config.json").read_text())["scaling_factor"]
    )
    table = pd.DataFrame({"path": ["/nowhere.png"]})
    table.to_csv(tmp_path / "t.csv", index=False)
    assert script(tmp_path / "b", tmp_path / "t.csv") == 2
    assert script(tmp_path / "a", videos, "--out", tmp_path / "b") == 2
    assert "already exists" in capsys.readouterr().err
    assert script(tmp_path / "a", videos, "--out", tmp_path / "c.pth") == 2
    assert "c.pth is the name of a file" in capsys.readouterr().err


@pytest.mark.parametrize("std", [math.nan, math.inf, 2e6, 5e-7])
def test_a_deviation_that_no_export_can_have_is_refused(tmp_path, std):
    """Such as that by pixels of a channel that the decoder ignores."""
    model, checkpoint = saved("wan", tmp_path)
    measured = LatentStats(1, torch.zeros(4), torch.tensor([1.0, std, 1, 1]))
    with pytest.raises(ScaleError, match="channel 1 "):
        rescaled(checkpoint, model, measured)


def test_by_pixels_a_channel_that_the_decoder_hears_less_gets_a_larger_deviation():
    torch.manual_seed(0)
    model = TAESD(variant="taesd")
    with torch.no_grad():
        model.decoder[1].weight[:, 0] *= 0.1
    clips = [ClipBatch(torch.rand(1, 3, 1, 16, 16) * 2 - 1, torch.tensor([i]), [str(i)]) for i in range(4)]
    plain, by_pixels = measure(model, clips), measure(model, clips, by_pixels=True)
    assert torch.equal(plain.mean, by_pixels.mean)
    assert by_pixels.std[0] > 5 * by_pixels.std[1:].max()
    assert (plain.std / by_pixels.std).square().mean().item() == pytest.approx(1, rel=1e-6)
