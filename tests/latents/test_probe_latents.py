"""`vae3d probe-latents` as a user calls it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.evaluation.test_eval_page import content
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.commands import flags, probe_latents
from vae3d.data.sources.open_source import open_source
from vae3d.errors import UserError
from vae3d.latents import probe_report, probe_run, probes
from vae3d.latents.codec import LatentCodec
from vae3d.latents.probe_run import ProbeError, ProbeSettings
from vae3d.loading import model_config

SIZE = ["--height=32", "--width=32"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return probe_latents


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two 2D VAEs of other strides, a Wan VAE and a TAEHV, with random weights."""
    made = {}
    for name, model, *overrides in (
        ("two", "spatial"),
        ("four", "spatial", "model.channels=[8,8,8]"),
        ("wan", "wan"),
        ("tae", "taehv"),
    ):
        made[name] = tmp_path_factory.mktemp(name)
        config = model_config(model, *tiny.MODEL[model], *overrides)
        state = tiny.model(model, *overrides).state_dict()
        write_export(Checkpoint(config, state, made[name], "export"), made[name])
    return made


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(4):
        Image.fromarray(tiny.frames(1, 48, 40, seed=i)[0]).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_video(tmp_path_factory.mktemp("video") / "a.mp4", tiny.frames(12, 48, 40))


def report_of(folder: Path) -> dict:
    return json.loads((folder / "probes.json").read_text())


def test_images_two_strides_side_by_side(exports, photos, tmp_path, capsys, trunks):
    out = tmp_path / "out"
    options = ["--source", str(photos), *SIZE, "--per_file=2", "--count=6", "--decoded=3", "--batch=2", f"--out={out}"]
    assert tiny.status("probe-latents", f"f2={exports['two']}", str(exports["four"]), *options) == 0
    told = report_of(out)
    names = ["f2", exports["four"].name]
    assert list(told["models"]) == names
    assert told["settings"]["seed"] == 0
    assert told["pixels"]["clips"] == 6
    two, four = (told["models"][name] for name in names)
    assert (two["strides"], two["latent_shape"]) == ([1, 2], [4, 1, 16, 16])
    assert (four["strides"], four["latent_shape"]) == ([1, 4], [4, 1, 8, 8])
    assert set(told["pixels"]["space_at_stride"]) == {"2", "4"}
    for model in (two, four):
        assert model["clips_decoded"] == 3
        assert len(model["kl"]) == 4
        assert model["time"] is model["tiles"] is model["first_against_rest"] is None
        assert set(model["encoder_equivariance"]) == set(probes.TRANSFORMS)
        assert list(model["noise_psnr"]) == ["0.0", *map(str, probes.NOISE)]
        assert model["interpolation"]["lpips"] > 0  # trunks: random AlexNet weights
    printed = capsys.readouterr()
    assert re.search(r"D\(z \+ 0\.3 noise\), dB +\d", printed.out)
    assert any("instead of 0 and 1" in line for line in printed.err.splitlines())
    page, _ = content(out)
    assert [len(chapter["pictures"]) for chapter in page["chapters"]] == [0, 3, 7, 7]  # plots; of two models
    assert page["chapters"][2]["pictures"][0]["html"].startswith('<img src="data:image/png;base64,')
    assert page["facts"]["settings.count"] == "6"
    assert page["commands"].startswith("vae3d probe-latents f2=")


def test_videos_and_tiles(exports, video, tmp_path, capsys):
    options = ["--source", str(video), *SIZE, "--frames=5", "--per_file=2", "--decoded=1", "--tile=16"]
    models = [f"{name}={exports[name]}" for name in ("wan", "tae", "two")]
    assert tiny.status("probe-latents", *models, *options, "--tile_overlap=4", f"--out={tmp_path}") == 0
    told = report_of(tmp_path)
    wan, tae, two = (told["models"][name] for name in ("wan", "tae", "two"))
    assert wan["tiles"]["psnr"] < 100
    assert two["tiles"]["psnr"] < 100
    assert tae["tiles"] is None
    assert tae["kl"] is None  # a deterministic encoder
    assert len(tae["first_against_rest"]["mean_gap"]) == 16
    assert told["notes"][0] == "wan: coded in blended tiles of 16 x 16, overlapping by 4"
    assert re.match("tae: tile=16, tile_overlap=4: tile_overlap must be a multiple of 16", told["notes"][1])
    assert two["time"]["high"] is not None
    assert told["pixels"]["time"]["high"] is not None
    assert "in time" in capsys.readouterr().out


@pytest.mark.parametrize(("kl", "plots"), [(None, 2), ([0.2, 0.3], 3)])
def test_the_plot_of_kl_is_left_out_where_no_encoder_has_one(kl, plots):
    models = {"a": {"statistics": {"std": [1.0, 2.0], "covariance_eigenvalues": [3.0, 1.0]}, "kl": kl}}
    axes = probe_report._channels(models).axes
    assert len(axes) == plots
    assert [len(axis.lines[0].get_xdata()) for axis in axes] == [2] * plots


def test_tiled_codec_without_seams_is_the_models_own():
    model = tiny.model("wan")
    pixels = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = LatentCodec(model)
    codec = probe_run.TiledCodec(whole, 16)
    z = codec.encode(pixels)
    torch.testing.assert_close(z, whole.encode(pixels), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(codec.decode(z, 5), whole.decode(z, 5), atol=1e-5, rtol=1e-4)
    assert model.tiling is None


def probed(model: torch.nn.Module, photos: Path, **changes: int) -> dict:
    settings = ProbeSettings(32, 32, **{"count": 4, "decoded": 3, **changes})
    return probe_run.probe_model(model, lambda: probe_run.clips(open_source(photos).table(), settings), settings)


def test_a_decoder_that_gives_nan_is_an_error(photos):
    model = tiny.model("spatial")
    with torch.no_grad():
        model.last_layers()[0].fill_(math.nan)
    with pytest.raises(ProbeError, match="decoder's pixels are NaN"):
        probed(model, photos, count=2, decoded=1)


def test_probes_depend_on_the_seed_and_not_on_the_batch(photos):
    model = tiny.model("spatial")
    found = probed(model, photos, batch=4)
    assert probed(model, photos, batch=4) == found
    in_twos = probed(model, photos, batch=2)
    for probe in ("noise_psnr", "encoder_equivariance", "interpolation"):
        assert in_twos[probe] == pytest.approx(found[probe], rel=1e-4)
    assert in_twos["kl"] == pytest.approx(found["kl"], rel=1e-4)
    assert probed(model, photos, batch=4, seed=1)["noise_psnr"] != found["noise_psnr"]


def test_white_posterior_noise_is_in_the_spectrum_of_samples(photos):
    found = probed(tiny.model("spatial"), photos)
    noise = np.square(found["statistics"]["posterior_std"]).mean()
    assert noise > 1e-3
    by_ring = np.array(found["space_of_samples"]["power"]) - np.array(found["space"]["power"])
    assert by_ring == pytest.approx(np.full(len(by_ring), noise))


def test_lpips_that_cannot_be_had_is_noted(script, monkeypatch, tmp_path):
    notes = []
    assert script.perceptual(ProbeSettings(16, 32), "cpu", notes) is None
    monkeypatch.setenv("VAE3D_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert script.perceptual(ProbeSettings(32, 32), "cpu", notes) is None
    assert "at least 31 pixels" in notes[0]
    assert "is not on this machine" in notes[1]


def test_clips_are_the_same_every_time_and_apart(photos, video):
    settings = ProbeSettings(32, 32, frames=4, count=6, per_file=6)
    table = open_source(video).table()
    first, again = (list(probe_run.clips(table, settings)) for _ in range(2))
    assert len(first) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({clip.numpy().tobytes() for clip in first}) > 1
    spread = list(probe_run.clips(open_source(photos).table(), ProbeSettings(32, 32, count=2)))
    ends = [tiny.frames(1, 48, 40, seed=i)[0].mean() for i in (0, 3)]  # the first and the last file
    assert [float(clip.float().mean()) for clip in spread] == pytest.approx(ends, abs=12)


def test_a_model_that_normalises_wrongly_is_named():
    told = {"statistics": {"mean": [0.0, 0.05], "std": [1.2, 0.8]}, "collapsed": [], "latent_shape": [4, 1, 8, 8]}
    (warning,) = probe_run.warnings_of("sd", told, None)
    assert "deviations from 0.800 to 1.200, by channel" in warning  # 1.02 over all
    assert "measure-scale" in warning
    (warning,) = probe_run.warnings_of("tiny", told, "normalised already")  # measure-scale refuses it
    assert "normalised already" in warning
    assert "measure-scale" not in warning
    fine = told | {"statistics": {"mean": [0.05, -0.05], "std": [1.05, 0.95]}}
    assert probe_run.warnings_of("sd", fine, None) == []
    assert probe_run.warnings_of("sd", fine | {"collapsed": [2]}, None) == ["sd: 1 of 4 channels have collapsed: 2"]


def test_paths_may_have_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    found = probe_latents.named(["lr=1", "sweep/lr=2", "a=sweep/lr=2"])
    assert found == {"lr=1": Path("lr=1"), "lr=2": Path("sweep/lr=2"), "a": Path("sweep/lr=2")}


@pytest.mark.parametrize(
    ("models", "changes", "said"),
    [
        (["missing"], [], "missing"),
        (["two"], ["--source={empty}"], "holds no video or image"),
        (["two"], ["--source={photos}/none.png"], "no such file"),
        (["two"], ["--height=64"], "is 48x40, smaller than the clips of 64x32; use a smaller height"),
        (["two"], ["--short_side=41"], "smaller than short_side=41"),
        (["two"], ["--frames=2"], "is shorter than the clips: 1 of 2 frames; use fewer"),
        (["two", "four"], ["--width=36"], "width is 36; with four's stride of 4 it must be a multiple of 8"),
        (["four"], ["--height=8"], "at least 16: use 16"),
        (["wan"], ["--frames=4"], "frames is 4, which wan would pad; use"),
        (["two", "two"], [], "two models are called two; give them names"),
        (["wan"], ["--tile=15"], "tile=15: tile must be a multiple"),
        (["two"], ["--device=cuda:9"], "device=cuda:9 is not usable here"),
        (["two"], ["--height=40", "--width=40", "--per_file=2"], "has only one clip of 40x40"),
    ],
)
def test_what_cannot_be_probed_is_said(exports, photos, tmp_path, capsys, models, changes, said):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "square.png")
    (tmp_path / "empty").mkdir()
    named = [f"{name}={exports.get(name, tmp_path / name)}" for name in models]
    changes = [change.format(empty=tmp_path / "empty", photos=photos) for change in changes]
    source = tmp_path / "square.png" if "--per_file=2" in changes else photos
    assert tiny.status("probe-latents", *named, f"--source={source}", *SIZE, *changes, f"--out={tmp_path / 'out'}") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_counts_are_at_least_1_on_the_command_line_and_in_code(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        flags.parse_probe_latents(
            [f"a={tmp_path}", f"--source={tmp_path}", *SIZE, "--count=0", f"--out={tmp_path / 'out'}"]
        )
    assert ended.value.code == 2
    assert "--count: '0'" in capsys.readouterr().err
    with pytest.raises(UserError, match="count is 0"):
        ProbeSettings(32, 32, count=0)


def test_a_report_that_cannot_be_written_is_said_before_the_probes(exports, photos, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").touch()
    monkeypatch.setattr(probe_run, "probe_model", None)
    assert (
        tiny.status("probe-latents", str(exports["two"]), f"--source={photos}", *SIZE, f"--out={tmp_path / 'out'}") == 2
    )
    assert f"--out {tmp_path / 'out'}: File exists; name another folder" in capsys.readouterr().err


def test_a_row_with_a_error_is_named(exports, photos, tmp_path, capsys):
    (tmp_path / "list.csv").write_text(f"path,start,end\n{photos}/0.png,,\n{photos}/1.png,3,2\n")
    table = f"--source={tmp_path / 'list.csv'}"
    assert tiny.status("probe-latents", str(exports["two"]), table, *SIZE, f"--out={tmp_path / 'out'}") == 2
    assert "row 2" in capsys.readouterr().err


def test_undefined_figures_are_null(tmp_path):
    Image.fromarray(np.full((32, 32, 3), 128, np.uint8)).save(tmp_path / "grey.png")
    found = probed(tiny.model("spatial"), tmp_path)
    assert found["interpolation"] is None  # of a single clip
    assert math.isfinite(found["noise_psnr"]["1.0"])
    settings = ProbeSettings(32, 32)
    pixels = probe_run.probe_pixels(lambda: probe_run.clips(open_source(tmp_path).table(), settings), settings, {2})
    assert pixels["space"] == {"frequency": [], "power": [], "slope": None, "high": None}
