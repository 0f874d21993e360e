"""What enters models and metrics is checked, and NaN never becomes black."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import tiny
from vae3d import pixels
from vae3d.metrics import MetricError, build_metrics
from vae3d.pixels import NotFiniteError, PixelError, check_video, no_value_checks, quantize, to_uint8
from vae3d.training.vae_validation import validate
from vae3d.types import ClipBatch

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_value_that_is_not_finite_never_becomes_8_bits(value):
    video = torch.zeros(3, 4, 2, 2)
    video[1, 2, 0, 0] = value
    with pytest.raises(NotFiniteError, match=r"a\.mp4: 1 of 48 values are NaN or infinite, the first in frame 12"):
        to_uint8(video, "a.mp4", start=10)
    for kind in pixels.RANGES:
        with pytest.raises(NotFiniteError):
            quantize(video, kind)
    with pytest.raises(NotFiniteError):
        quantize(torch.tensor([value], dtype=torch.float16).view(1, 1, 1, 1))


def test_8_bits_are_rounded_to_nearest_and_clamped():
    unit = torch.tensor([-0.1, 0, 0.5 / 255 + 1e-6, 1, 1.7]).view(1, 1, 1, 5)
    assert quantize(unit, "unit").flatten().tolist() == [0, 0, 1, 255, 255]
    assert torch.equal(quantize(unit * 2 - 1), quantize(unit, "unit"))


def test_the_error_survives_the_way_out_of_a_process():
    error = NotFiniteError("3 of 9 values", "a.mp4")
    assert str(pickle.loads(pickle.dumps(error))) == "3 of 9 values"
    assert (error.reason, str(error)) == ("3 of 9 values", "a.mp4: 3 of 9 values")


def test_validation_of_a_model_that_overflows_is_an_error_that_names_the_clip():
    def model(video, sample):
        return SimpleNamespace(video=video * INF, z=video)

    clip = ClipBatch(torch.zeros(1, 3, 2, 16, 16, dtype=torch.uint8), torch.tensor([0]), ["room/a.mp4"])
    with pytest.raises(NotFiniteError, match=r"reconstruction of room/a\.mp4: 1536 of 1536 values"):
        validate(model, [clip], build_metrics(["psnr"]), torch.device("cpu"), 1)


# ---- models

MODELS = ["spatial", "temporal_vae", "wan", "taehv"]
GOOD = torch.zeros(1, 3, 5, 16, 16)
WRONG = {
    "uint8": (GOOD.byte(), r"torch\.uint8, .*float\(\) / 127\.5 - 1"),
    "0 to 255": (GOOD + 200, r"lies in \[200, 200\].*/ 127\.5 - 1"),
    "images": (GOOD[:, :, 0], r"\[1, 3, 16, 16\].*images\[:, :, None\]"),
    "one clip": (GOOD[0], r"\[3, 5, 16, 16\].*video\[None\]"),
    "frames first": (GOOD.transpose(1, 2), r"\[1, 5, 3, 16, 16\].*transpose\(1, 2\)"),
    "colours last": (GOOD.movedim(1, -1), r"\[1, 5, 16, 16, 3\].*movedim\(-1, 1\)"),
    "four colours": (torch.zeros(1, 4, 5, 16, 16), r"\[1, 4, 5, 16, 16\]"),
    "NaN": (GOOD.clone().index_fill_(2, torch.tensor([3]), NAN), "768 of 3840 values are NaN.*frame 3"),
    "nothing": (GOOD[:, :, :0], "empty"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return tiny.model(request.param).eval()


@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_says_what_wrong_pixels_look_like(model, wrong):
    video, message = WRONG[wrong]
    for call in (model.encode, model):
        with pytest.raises(PixelError, match=message):
            call(video)


def test_a_model_says_which_latents_it_takes(model):
    z = torch.zeros(1, *model.latent_shape(5, 16, 16))
    for wrong in (z[:, :, 0], torch.cat([z, z], 1), z.long(), z + NAN, z[0]):
        with pytest.raises(PixelError, match=rf"\[1, {z.shape[1]}, t, h, w\]|\[B, {z.shape[1]}, t, h, w\]|NaN"):
            model.decode(wrong)


def test_values_are_not_looked_at_in_a_training_step(monkeypatch):
    """Reading one makes the CPU wait for the GPU."""
    read = []
    whole = pixels.value_range
    monkeypatch.setattr(pixels, "value_range", lambda values: read.append(1) or whole(values))
    model = tiny.model("spatial")
    step = no_value_checks()(lambda: model(GOOD).video)
    assert step().shape == GOOD.shape
    assert not read
    with no_value_checks(), pytest.raises(PixelError):
        check_video(GOOD.byte())
    model(GOOD)
    assert len(read) == 2  # the video and the latents
    check_video(torch.zeros(1, 3, 1, 8, 8, device="meta"))
    with FakeTensorMode():
        check_video(torch.zeros(1, 3, 1, 8, 8))


def test_training_steps_do_not_look_at_values(monkeypatch):
    from vae3d.training.diffusion_trainer import DiffusionTrainer
    from vae3d.training.vae_trainer import VaeTrainer

    for trainer in (VaeTrainer, DiffusionTrainer):
        seen = []
        asks = type(
            "Asks", (), {"__getattr__": lambda _, name, seen=seen: seen.append(pixels._check_values) or name[0]}
        )
        with pytest.raises((TypeError, AttributeError)):  # at its first line, which needs a trainer
            trainer.train_step(asks(), [])
        assert seen[0] is False
        assert pixels._check_values


# ---- metrics

FRAMES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (FRAMES * 2 - 1, r"looks like \[-1, 1\]; set pixel_range=signed"),
        (FRAMES * 255, "looks like 0 to 255; divide by 255"),
        ((FRAMES * 255).byte(), "torch.uint8, which looks like 0 to 255; set pixel_range=uint8"),
        (FRAMES * 1.2, r"lies in \[.*\], which is not clamped"),
        (FRAMES[None], r"\[1, 4, 3, 16, 16\], which looks like a batch"),
        (FRAMES.permute(0, 2, 3, 1), r"looks like \[T, H, W, 3\]"),
        (FRAMES[:2].transpose(0, 1), r"looks like \[3, T, H, W\]"),
        (FRAMES[0], r"looks like one frame"),
        (FRAMES[:, :1], r"is \[4, 1, 16, 16\]"),
        (FRAMES.long(), "torch.int64"),
        (FRAMES[:0], r"is \[0, 3, 16, 16\]"),
    ],
)
@pytest.mark.parametrize("which", ["original", "reconstruction"])
def test_metrics_say_what_wrong_frames_look_like(frames, message, which):
    good = torch.zeros_like(frames, dtype=torch.float32)
    pair = (frames, good) if which == "original" else (FRAMES, frames)
    metrics = build_metrics(["psnr"])
    with pytest.raises(MetricError, match=rf"the {which} .*{message}"):
        metrics.update(*pair)
    metrics.update(FRAMES, FRAMES)  # nothing of the wrong frames was kept
    assert metrics.result().scores["psnr"].value == 100


def test_a_declared_range_gives_the_score_of_0_to_1():
    other = (FRAMES + 0.05).clamp(0, 1)
    eight = [(x * 255).round() for x in (FRAMES, other)]
    scores = {}
    for kind, change in {
        "unit": lambda x: x / 255,
        "signed": lambda x: x / 127.5 - 1,
        "uint8": torch.Tensor.byte,
    }.items():
        metrics = build_metrics(["psnr", "ssim"], pixel_range=kind)
        metrics.subset(["psnr"]).update(*map(change, eight))
        metrics.reset()
        metrics.update(*map(change, eight))
        scores[kind] = [score.value for score in metrics.result().scores.values()]
    assert scores["signed"] == pytest.approx(scores["unit"], abs=1e-4)
    assert scores["uint8"] == pytest.approx(scores["unit"], abs=1e-4)
    with pytest.raises(MetricError, match=r"torch\.float32"):
        build_metrics(["psnr"], pixel_range="uint8").update(FRAMES, FRAMES)
    with pytest.raises(MetricError, match=r"pixel_range is 'half'; use one of uint8, unit, signed"):
        build_metrics(["psnr"], pixel_range="half")


def test_a_result_without_an_update_is_an_error():
    with pytest.raises(MetricError, match=r"call update\(original, reconstruction\)"):
        build_metrics(["psnr", "ssim"]).result()
