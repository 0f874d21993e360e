from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests import tiny
from vae3d.metrics.panorama import roll_consistency


class Painter(nn.Module):
    """Adds `amount` to column 0 of whatever it sees: a seam."""

    spec = SimpleNamespace(space_stride=8)

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, video, *, sample):
        assert not sample
        rec = video.clone()
        rec[..., 0] += self.amount
        return SimpleNamespace(video=rec)


VIDEO = torch.rand(2, 3, 3, 16, 32, generator=torch.Generator().manual_seed(0)) - 0.5


def test_a_model_without_a_seam_is_consistent():
    assert roll_consistency(Painter(0), VIDEO) == 100


@pytest.mark.parametrize("width", [32, 24, 17])
def test_a_seam_is_wrong_in_both_places(width):
    """Two columns are off by 0.4 in [-1, 1], 0.2 in [0, 1]."""
    assert roll_consistency(Painter(0.4), VIDEO[..., :width]) == pytest.approx(
        -10 * math.log10(0.04 * 2 / width), abs=1e-4
    )


def test_what_is_out_of_range_is_cut_off_as_on_a_screen():
    assert roll_consistency(Painter(0.4), torch.ones(1, 3, 1, 16, 32)) == 100


def test_zero_padding_is_seen():
    model = tiny.model("spatial")
    stride = model.spec.space_stride
    video = torch.rand(1, 3, 2, 4 * stride, 8 * stride) * 2 - 1
    assert 5 < roll_consistency(model, video) < 60


def test_a_width_that_cannot_be_rolled_is_refused():
    with pytest.raises(ValueError, match=r"15 columns .*stride 8; use 16"):
        roll_consistency(Painter(0), VIDEO[..., :15])
