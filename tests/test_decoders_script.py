"""scripts/benchmarks/decoders.py: costs of decoders, and the front that it draws."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from vae3d.models.taesd import TAESD

decoders = tiny.load_script("decoders")


def test_operations_are_counted_per_pixel_and_a_smaller_decoder_has_fewer():
    large, small = (
        TAESD(variant="taesd", decoder_channels=[width] * 4, decoder_blocks=[0, 0, 0, 1]) for width in (8, 4)
    )
    z = torch.zeros(1, 4, 1, 8, 8)
    with torch.no_grad():
        costs = [decoders.decode_cost(model, z, 1, 1) for model in (large, small)]
    # At full resolution a block of three convolutions, and the last one.
    assert costs[0]["macs_per_pixel"] > 9 * (3 * 8 * 8 + 8 * 3)
    assert costs[1]["macs_per_pixel"] == pytest.approx(costs[0]["macs_per_pixel"] / 4, rel=0.2)
    assert costs[1]["parameters"] == sum(p.numel() for p in small.decoder.parameters())


def test_a_name_may_stand_in_front_of_a_checkpoint():
    assert decoders.named("30 %=runs/a") == ("30 %", "runs/a")
    assert decoders.named("runs/a") == ("a", "runs/a")


def test_the_front_leaves_out_what_is_dearer_and_worse(tmp_path):
    rows = [
        {"name": name, "macs_per_pixel": cost, "macs_share": cost, "psnr": psnr, "lpips_alex": 1 / psnr}
        for name, cost, psnr in (("teacher", 1.0, 30.0), ("good", 0.3, 29.0), ("bad", 0.5, 28.0))
    ]
    assert [row["name"] for row in decoders.front(rows, "psnr", 1)] == ["good", "teacher"]
    assert [row["name"] for row in decoders.front(rows, "lpips_alex", -1)] == ["good", "teacher"]
    decoders.draw(rows, tmp_path / "front.svg")
    assert (tmp_path / "front.svg").read_text().startswith("<svg")
