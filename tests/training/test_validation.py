"""Scores and pictures of held-out clips, metrics that come slow_metrics, and the best export."""

from __future__ import annotations

import io
import json
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageSequence

import vae3d
from tests import tiny
from tests.training.quick import trainer
from tests.training.test_trainer import fresh_accelerate, trace, weights  # noqa: F401
from vae3d.checkpoints.state import load_state
from vae3d.commands import train
from vae3d.inference import pictures
from vae3d.inference.pictures import GAP, LINE, TEXT, colour_bar, error_map, latent_colours
from vae3d.metrics import METRICS, build_metrics
from vae3d.metrics.distribution import Rfid
from vae3d.metrics.registry import Entry
from vae3d.pixels import to_uint8
from vae3d.training.failures import SaveError
from vae3d.training.vae_validation import validate
from vae3d.types import ClipBatch

VALIDATES = {"validation.every": 1, "validation.frames": 1, "validation.clips": 2}


def scored(video: torch.Tensor, error: float):
    def model(pixels: torch.Tensor, sample: bool) -> SimpleNamespace:
        return SimpleNamespace(video=pixels + error, z=pixels[..., ::4, ::4], spatial=None)

    clip = ClipBatch(video, torch.tensor([0]), ["a.mp4"])
    (done,) = validate(model, [clip], build_metrics(["psnr"], "cpu"), torch.device("cpu"), 1)
    return done


def test_colours_and_depth_are_scored_and_shown_as_8_bits():
    pixels = torch.randint(0, 200, (1, 3, 2, 8, 16), generator=torch.manual_seed(0), dtype=torch.uint8)
    for video in (pixels, pixels.float() / 127.5 - 1):
        done = scored(video, 10 / 127.5)
        assert done.result.scores["psnr"].value == pytest.approx(20 * math.log10(255 / 10), abs=1e-4)
        shown = pixels[0].permute(1, 2, 3, 0).numpy()
        np.testing.assert_array_equal(done.panels["original"], shown)
        np.testing.assert_array_equal(done.panels["reconstruction"], shown + 10)


def test_psnr_is_of_clamped_pixels_and_a_mean_over_images_not_of_their_pooled_error():
    """A published trainer scores unclamped pixels, and averages PSNRs of batches (defect 13 of the report)."""
    errors = iter([0.02, 0.2])

    def model(pixels: torch.Tensor, sample: bool) -> SimpleNamespace:
        return SimpleNamespace(video=torch.where(pixels > 0, 7.0, pixels + next(errors)), z=pixels)

    video = torch.full((1, 3, 1, 16, 16), -0.5)
    video[..., 8:] = 1.0  # where the model overshoots, which costs nothing
    metrics = build_metrics(["psnr"], "cpu")
    clips = [ClipBatch(video.clone(), torch.tensor([place]), ["a.png"]) for place in (0, 1)]
    done = validate(model, clips, metrics, torch.device("cpu"), 0)
    eight = [round((-0.5 + error + 1) * 127.5) - round(0.5 * 127.5) for error in (0.02, 0.2)]
    expected = [10 * math.log10(255**2 / (value**2 / 2)) for value in eight]  # half of the pixels are without error
    assert metrics.aggregate([clip.result for clip in done])["psnr"] == pytest.approx(sum(expected) / 2, abs=1e-4)


def test_latents_of_three_channels_are_their_own_colours_stretched_and_enlarged():
    z = torch.arange(12, dtype=torch.float32).reshape(3, 1, 2, 2)
    shown = latent_colours(z, (2, 4, 6))
    assert shown.shape == (2, 4, 6, 3)
    blocks = np.array([[0, 85], [170, 255]], np.uint8).repeat(2, 0).repeat(3, 1)
    for colour in range(3):
        np.testing.assert_array_equal(shown[1, ..., colour], blocks)


@pytest.mark.parametrize("channels", [1, 4, 16])
def test_every_latent_channel_shows_and_always_in_the_same_colours(channels):
    z = torch.randn(channels, 2, 3, 3, generator=torch.manual_seed(0))
    shown = latent_colours(z, (5, 6, 6))
    assert (shown.min((0, 1, 2)), shown.max((0, 1, 2))) == (pytest.approx([0] * 3), pytest.approx([255] * 3))
    np.testing.assert_array_equal(shown[0], shown[2])  # the first of two latents stands for frames 0 to 2
    np.testing.assert_array_equal(shown, latent_colours(z, (5, 6, 6)))
    for channel in range(channels):
        other = z.clone()
        other[channel] = other[channel].flip(-1)
        assert (latent_colours(other, (5, 6, 6)) != shown).any()


def test_latents_without_contrast_are_shown_as_one_colour():
    assert (latent_colours(torch.full((4, 1, 2, 2), 3.0), (1, 4, 4)) == 0).all()


def logged(folder) -> dict[str, Image.Image]:
    """The pictures of a run's TensorBoard file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    last = {tag: events.Images(tag)[-1].encoded_image_string for tag in events.Tags()["images"]}
    return {tag: Image.open(io.BytesIO(encoded)) for tag, encoded in last.items()}


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The texts that are written into pictures."""
    texts, write = [], pictures._write
    monkeypatch.setattr(pictures, "_write", lambda *args: (texts.append(args[3]), write(*args)))
    return texts


def panel(picture: np.ndarray, row: int, column: int, columns: int, side: int) -> np.ndarray:
    """A panel of a strip of square panels [T, H, W, 3] in two rows, without its label."""
    total = columns * (side + GAP) - GAP
    line = max(TEXT, round(total * TEXT / 350)) + LINE - TEXT
    captions = (picture.shape[-3] - 2 * (side + line) - GAP - 2 * line) // line  # the last two lines are the scale
    top, left = (captions + row + 1) * line + row * side, column * (side + GAP)
    return picture[..., top : top + side, left : left + side, :]


def test_each_image_is_shown_with_its_latent_reconstruction_and_error_enlarged_labelled_and_scored(
    videos, tmp_path, written
):
    enabled = {"logger.tensorboard.enabled": True, "data.num_val_files": 5}
    t = trainer(videos, tmp_path, **VALIDATES, **enabled)
    t.validate()
    t.log.close()
    shown = logged(tmp_path)
    names = [clip.paths[0].rpartition("/")[2].partition(".")[0] for clip in t.data.held_out]
    assert [*shown] == [f"1_validation_clips/{i}_{name}" for i, name in enumerate(names)]
    for place, (clip, picture) in enumerate(zip(t.data.held_out, shown.values(), strict=True)):
        assert picture.format == "PNG"
        strip = np.asarray(picture)[None]
        original, rec = (panel(strip, 0, column, 2, 224) for column in range(2))
        pixels = clip.video[0].permute(1, 2, 3, 0).numpy()
        np.testing.assert_array_equal(original, pixels.repeat(14, 1).repeat(14, 2))
        np.testing.assert_array_equal(panel(strip, 1, 1, 2, 224)[0], error_map(original[0], rec[0]))
        error = np.square((rec[0] - original[0].astype(float)) / 255).mean()
        mine = [text for text in written if text.startswith(f"{place} {names[place]}")]
        assert mine == [f"{place} {names[place]}, step 0"]
        psnr = f"psnr {-10 * math.log10(error):.4g}"
        assert any(text.startswith(psnr) for text in written), (psnr, written)
    assert [text for text in written if text in ("original", "reconstruction", "latent")] == [
        "original", "reconstruction", "latent",
    ] * len(names)  # fmt: skip


def test_videos_are_shown_under_the_same_names_with_the_2d_vae_alone_and_its_error_and_scores(
    videos, tmp_path, written
):
    overrides = [
        "loss=recon_kl",
        "data.frames.max=5",
        "validation.every=1",
        "validation.frames=5",
        "logger=tensorboard",
    ]
    t = train.build_trainer(tiny.training("temporal_vae", videos, *overrides, "trainer.max_steps=1"), tmp_path)
    t.fit()
    (clip,) = t.data.held_out
    ((tag, picture),) = logged(tmp_path).items()
    name = clip.paths[0].rpartition("/")[2].partition(".")[0]
    assert (tag, picture.format, picture.n_frames) == (f"1_validation_clips/0_{name}", "PNG", 5)
    strip = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)])
    original, alone, rec = (panel(strip, 0, column, 3, 224) for column in range(3))
    np.testing.assert_array_equal(original[:, ::14, ::14], clip.video[0].permute(1, 2, 3, 0).numpy())
    with torch.no_grad(), t.ema.applied():
        expected = to_uint8(t.network.decode_spatial(t.network.encode_spatial(clip.to("cpu").video))[0])
    np.testing.assert_array_equal(alone[:, ::14, ::14], expected)
    for column, video in enumerate((alone, rec), 1):
        for t_, error in enumerate(panel(strip, 1, column, 3, 224)):
            np.testing.assert_array_equal(error, error_map(original[t_], video[t_]))
    mean_psnr = np.mean(
        [-10 * math.log10(np.square((a - b.astype(float)) / 255).mean()) for a, b in zip(alone, original, strict=True)]
    )
    assert any(text.startswith(f"2D VAE alone: psnr {mean_psnr:.4g}") for text in written)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert any(text.startswith(f"psnr {last['val/psnr']:.4g}") for text in written)  # of the only clip
    assert written[0] == f"0 {name}, step 0"


def test_errors_of_trained_and_of_untrained_networks_differ_on_the_scale_which_is_drawn_with_numbers(written):
    def brightness(error: int) -> int:
        frame = np.full((1, 1, 3), error, np.uint8)
        return int(error_map(np.zeros_like(frame), frame).astype(int).sum())

    levels = [brightness(error) for error in (0, 1, 2, 5, 13, 26, 45, 64)]  # of 255
    assert all(b - a > 20 for a, b in zip(levels, levels[1:], strict=False)), levels
    assert brightness(64) == brightness(255)
    bar = colour_bar(350)
    assert written == ["0", "0.01", "0.05", "0.1", ">= 0.25"]
    at = round(math.sqrt(26 / 255 / 0.25) * 349)
    assert abs(int(bar[4, at].astype(int).sum()) - brightness(26)) < 10


@pytest.mark.parametrize(
    ("size", "side"), [((8, 8), 224), ((3, 64), 256), ((3, 300), 300), ((3, 500), 250), ((1, 500), 500)]
)
def test_small_clips_are_enlarged_and_large_ones_that_move_reduced(size, side):
    frames, width = size
    video = np.full((frames, width, width, 3), 200, np.uint8)
    shown = pictures.strip([[("a", video), ("b", video)]])
    assert (shown[0, :, :, 0] == 200).any(0).sum() >= 2 * side
    assert shown.shape[0] == frames
    assert shown.shape[2] == 2 * side + GAP
    assert not shown.shape[1] % 2


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 2), (16, 4)])
def test_samples_stand_in_a_grid_with_captions_that_can_be_read_where_it_is_reduced(count, columns, monkeypatch):
    sizes, write = [], pictures._write
    monkeypatch.setattr(pictures, "_write", lambda *args: (sizes.append(args[4]), write(*args)))
    videos = [np.full((2, 8, 8, 3), i, np.uint8) for i in range(count)]
    shown = pictures.captioned_grid(videos, [str(i) for i in range(count)])
    side = 160 + GAP
    size = max(TEXT, round(TEXT * columns * side / 350))  # TensorBoard shows pictures 350 pixels wide
    assert sizes == [size] * count
    cell = size + LINE - TEXT + side
    assert shown.shape == (2, -(-count // columns) * cell - GAP, columns * side - GAP, 3)
    at = [shown[1, i // columns * cell + cell - 9, i % columns * side + 9, 0] for i in range(count)]
    assert at == list(range(count))


def test_captions_of_hostile_file_names_stay_one_line_of_text(written):
    video = np.zeros((1, 8, 8, 3), np.uint8)
    plain = pictures.strip([[("a", video)]], ["name, step 1"])
    hostile = pictures.strip([[("a", video)]], ["a\nb\x1b[0m\u202e, step 1"])
    assert written[7] == r"a\nb\x1b[0m\u202e, step 1"
    assert hostile.shape == plain.shape
    long = pictures.strip([[("a", video)]], ["x" * 300 + ", step 1"])
    assert long.shape[2] == plain.shape[2]
    assert "..." in "".join(written)


class MeanColours(Rfid):
    """rFID with three features that cost nothing."""

    def __init__(self) -> None:
        self.network, self.stride = lambda frames: frames.mean((2, 3)), 1
        self.reset()


def test_slow_metrics__metrics_come_in_their_turn_and_at_the_end_with_how_many_frames_they_are_of(
    videos, tmp_path, monkeypatch
):
    monkeypatch.setitem(METRICS, "rfid", Entry(MeanColours))
    t = trainer(
        videos, tmp_path, **VALIDATES,
        **{"validation.slow_metrics": ["rfid"], "validation.slow_metrics_every": 3, "trainer.max_steps": 5, "trainer.save_every": 0},
    )  # fmt: skip
    t.data.held_out.append(t.data.held_out[0].to("cpu"))  # two frames at least
    t.fit()
    assert [step for step, _ in trace(tmp_path, "val/psnr")] == [0, 1, 2, 3, 4, 5]
    assert [step for step, _ in trace(tmp_path, "val/rfid")] == [0, 3, 5]
    assert trace(tmp_path, "val/rfid_samples") == [(0, 2.0), (3, 2.0), (5, 2.0)]


def test_slow_metrics__metrics_without_a_turn_come_at_the_end(videos, tmp_path):
    slow_metrics = {"validation.metrics": ["psnr"], "validation.slow_metrics": ["ssim"], "trainer.save_every": 0}
    trainer(videos, tmp_path, **VALIDATES, **slow_metrics).fit()
    assert [step for step, _ in trace(tmp_path, "val/psnr")] == [0, 1, 2]
    assert [step for step, _ in trace(tmp_path, "val/ssim")] == [2]


def facts(folder) -> dict:
    return yaml.safe_load((folder / "exports/best/model.yaml").read_text())


def with_scores(t, name: str, scores: list[float]):
    """The run, whose validation at step n finds scores[n - 1]."""
    t.validate = lambda: {f"val/{name}": scores[t.step - 1]}
    return t


@pytest.mark.parametrize(
    ("name", "scores", "step"), [("ssim", [0.1, 0.5, 0.5, 0.2], 2), ("lpips_alex", [0.4, math.nan, 0.2, 0.3], 3)]
)
def test_the_best_validation_is_kept_as_an_export(videos, trunks, tmp_path, name, scores, step):
    settings = {"trainer.best": name, "trainer.max_steps": 4, "trainer.save_every": 1, "trainer.keep": 1}
    sized = {"data.height": 32, "data.width": 32, "validation.metrics": [name]}
    t = with_scores(trainer(videos, tmp_path, **VALIDATES, **settings, **sized), name, scores)
    kept = {}
    save = t.checkpointer.save
    t.checkpointer.save = lambda *a, **k: (save(*a, **k), kept.update({t.step: vae3d.load(tmp_path).state_dict()}))
    t.fit()
    info = facts(tmp_path)
    assert (info["step"], info["best"]) == (step, {name: scores[step - 1]})
    found = vae3d.load(tmp_path / "exports/best").state_dict()
    assert found.keys() == kept[step].keys()
    assert all(torch.equal(tensor, kept[step][key]) for key, tensor in found.items())
    assert any(not torch.equal(tensor, kept[4][key]) for key, tensor in found.items())
    assert [path.name for path in sorted((tmp_path / "exports").iterdir())] == ["best", "step-0000003", "step-0000004"]
    assert torch.equal(vae3d.load(tmp_path).module.decoder.conv_out.bias, kept[4]["module.decoder.conv_out.bias"])


def test_the_best_survives_a_resume_and_is_forgotten_under_another_score(videos, tmp_path):
    settings = {"trainer.best": "psnr", "trainer.save_every": 1}
    with_scores(trainer(videos, tmp_path, **VALIDATES, **settings), "psnr", [20.0, 10.0]).fit()
    more = {**VALIDATES, **settings, "trainer.max_steps": 4}
    t = with_scores(trainer(videos, tmp_path, **more), "psnr", [20.0, 10.0, 19.0, 18.0])
    assert (t.best.value, t.best.step) == (20.0, 1)
    t.fit()
    assert facts(tmp_path)["step"] == 1
    assert load_state(tmp_path / "checkpoints/step-0000004")["best"]["value"] == 20.0
    other = trainer(videos, tmp_path, **(more | {"trainer.best": "ssim", "trainer.max_steps": 5}))
    assert other.best.value is None
    with_scores(other, "ssim", [0.0] * 4 + [0.1]).fit()
    assert facts(tmp_path)["best"] == {"ssim": 0.1}


def test_a_validation_that_a_stop_left_out_is_made_up_when_the_run_resumes(videos, tmp_path):
    settings = {**VALIDATES, "validation.every": 2, "trainer.best": "psnr", "trainer.max_steps": 4}
    stopped = trainer(videos, tmp_path, **settings)
    take = stopped.train_step
    stopped.train_step = lambda batches, *_: take(batches, signal.SIGTERM if stopped.step == 1 else 0)
    stopped.fit()
    assert (stopped.step, stopped.best.step) == (2, None)
    killed = trainer(videos, tmp_path, **settings)
    killed.train_step = None
    with pytest.raises(TypeError):  # after the validation, before any checkpoint
        killed.fit()
    resumed = trainer(videos, tmp_path, **settings)
    assert resumed.best.step is None
    assert resumed.fit()
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "val/psnr" in line] == [0, 2, 4]
    assert resumed.best.step in (2, 4)
    again = trainer(videos, tmp_path, **settings)
    again.validate = None  # each step is validated once
    assert again.fit()


def test_a_best_of_a_made_up_last_validation_that_cannot_be_written_is_an_error(videos, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    settings = {**VALIDATES, "trainer.best": "psnr", "trainer.max_steps": 1, "trainer.save_every": 1}
    trainer(videos, tmp_path, **(settings | {"validation.every": 0})).fit()
    made_up = trainer(videos, tmp_path, **settings)
    made_up.export = full
    with pytest.raises(SaveError, match=r"exports/best of step 1.*could not be written"):
        made_up.fit()
    assert trainer(videos, tmp_path, **settings).fit()  # which tries again
    assert facts(tmp_path)["step"] == 1


def test_a_best_that_cannot_be_written_is_said_and_training_goes_on_but_ends_with_an_error(
    videos, tmp_path, monkeypatch, caplog
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    t = with_scores(trainer(videos, tmp_path, **VALIDATES, **{"trainer.best": "psnr"}), "psnr", [20.0, 19.0])
    export = t.export
    t.export = lambda *args, **info: (full if t.step == 1 else export)(*args, **info)
    with pytest.raises(SaveError, match=r"exports/best of step 1, whose psnr is 20, could not be written"):
        t.fit()
    assert "is not of step 1, the best so far: rank 0: OSError: [Errno 28] No space left on device" in caplog.text
    assert facts(tmp_path)["best"] == {"psnr": 19.0}  # the next best after the one that was lost
    assert json.loads((tmp_path / "checkpoints/step-0000002/run.json").read_text())["step"] == 2
