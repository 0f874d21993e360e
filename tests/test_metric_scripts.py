"""The scripts that measure the speed and the memory of metrics, at tiny sizes."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from tests import tiny
from vae3d.metrics import MetricSet, Score, VideoResult, build_metrics

bench = tiny.load_script("bench_metrics")
memory = tiny.load_script("check_metric_memory")


@pytest.fixture
def own_weights(monkeypatch):
    """The scripts name their own folder of weights; put back what was named before."""
    for name in ("VAE3D_WEIGHTS", "VAE3D_ALLOW_UNVERIFIED"):
        monkeypatch.setenv(name, "")


def test_the_benchmark_prints_a_row_for_every_case(own_weights, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SHORTEST", 0.001)
    bench.main(["--size", "64", "--frames", "3", "--videos", "1", "--repeats", "1"])
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(",")[0] for row in rows] == [
        *("ssim", "psnr", "lpips_alex", "flolpips", "ssim+psnr+lpips_alex", *["correlation"] * 5)
    ]
    rates = [re.findall(r"[\d,]+\.\d", row) for row in rows]
    assert [len(found) for found in rates] == [3, 3, 3, 1, *[3] * 6]  # ours, published, ratio
    assert all(float(number.replace(",", "")) >= 0 for found in rates for number in found)


def test_ways_that_differ_are_not_timed():
    case = bench.Case("x", "frames", 1, lambda: np.zeros(2), lambda: np.array([0.0, 2e-3]), tolerance=1e-3)
    with pytest.raises(AssertionError, match="x"):
        bench.measure(case, 1)


def test_the_correlation_of_the_benchmark_is_the_networks():
    first, second = torch.randn(2, 1, 8, 5, 6)
    torch.testing.assert_close(bench.shifted_products(first, second), bench.correlation(first, second))


def test_a_long_video_and_degenerate_ones_score(capsys):
    assert memory.main(["--frames", "40", "--size", "40", "--bound", "1000"]) == 0
    printed = capsys.readouterr().out
    assert "growth after the first tenth: " in printed
    assert re.findall(r"^(.+): psnr ", printed, re.MULTILINE) == [
        "equal",
        "still",
        "black",
        "black and grey",
        "one frame",
    ]
    assert "flicker_ori -" in printed.splitlines()[-1]


def test_growing_memory_is_reported(capsys):
    assert memory.main(["--frames", "20", "--size", "40", "--bound", "-1000"]) == 1
    assert re.search(r"error: memory grew by -?\d+\.\d MiB", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "column", "value", "frames", "errors"),
    [
        ("ssim", "ssim", 0.5, 1, []),
        ("ssim", "ssim", None, 1, ["v: ssim is missing"]),
        ("ssim", "ssim", math.inf, 2, ["v: ssim is inf"]),
        ("tpsnr", "tpsnr", None, 1, []),
        ("tpsnr", "tpsnr", None, 2, ["v: tpsnr is missing"]),
    ],
)
def test_scores_that_are_missing_or_not_finite_are_reported(name, column, value, frames, errors):
    metrics: MetricSet = build_metrics([name])
    assert memory.wrong_scores(metrics, "v", VideoResult({column: Score(value)}), frames) == errors
