"""scripts/benchmarks/decoders.py: costs of decoders, and the front that it draws."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from PIL import Image

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


def test_all_rows_of_a_folder_and_of_held_out_files_are_scored(tmp_path):
    images = [tmp_path / "images/a.png", tmp_path / "images/b.png"]
    images[0].parent.mkdir()
    for image in images:
        Image.new("RGB", (20, 12)).save(image)
    (tmp_path / "held_out.csv").write_text("path,split\n" + "".join(f"{image},val\n" for image in images))
    for source in (tmp_path / "images", tmp_path / "held_out.csv"):
        videos = decoders.read_videos(Namespace(source=str(source), frames=1, height=8, width=8, device="cpu"))
        assert [video.shape for video in videos] == [(1, 3, 1, 8, 8)] * 2
        assert all((video == -1).all() for video in videos)  # black, as models take it


def test_the_front_leaves_out_what_is_dearer_and_worse(tmp_path):
    rows = [
        {"name": name, "macs_per_pixel": cost, "macs_share": cost, "psnr": psnr, "lpips_alex": 1 / psnr}
        for name, cost, psnr in (("teacher", 1.0, 30.0), ("good", 0.3, 29.0), ("bad", 0.5, 28.0))
    ]
    assert [row["name"] for row in decoders.front(rows, "psnr", 1)] == ["good", "teacher"]
    assert [row["name"] for row in decoders.front(rows, "lpips_alex", -1)] == ["good", "teacher"]
    decoders.draw(rows, tmp_path / "front.svg")
    assert (tmp_path / "front.svg").read_text().startswith("<svg")
