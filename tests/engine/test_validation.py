from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vae3d.engine.validation import validate
from vae3d.metrics import build_metrics
from vae3d.types import Clip


def scored(video: torch.Tensor, error: float):
    def model(pixels: torch.Tensor, sample: bool) -> SimpleNamespace:
        return SimpleNamespace(video=pixels + error)

    clip = Clip(video, torch.tensor([0]), ["a.mp4"])
    (done,) = validate(model, [clip], build_metrics(["psnr"], "cpu"), torch.device("cpu"), 1)
    return done


def test_colours_and_depth_are_scored_and_shown_as_8_bits():
    pixels = torch.randint(0, 200, (1, 3, 2, 8, 16), generator=torch.manual_seed(0), dtype=torch.uint8)
    for video in (pixels, pixels.float() / 127.5 - 1):
        done = scored(video, 10 / 127.5)
        assert done.result.scores["psnr"].value == pytest.approx(20 * math.log10(255 / 10), abs=1e-4)
        shown = pixels[0].permute(1, 2, 3, 0).numpy()
        np.testing.assert_array_equal(done.picture, np.concatenate([shown, shown + 10], axis=1))
