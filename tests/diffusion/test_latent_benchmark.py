from __future__ import annotations

import pytest

from tests import tiny


@pytest.fixture
def main():
    return tiny.load_script("bench_latents").main


def test_the_benchmark_tells_speed_and_the_distance_to_the_cpu_in_both_precisions(main, capsys):
    main(["--device=cpu", "--denoiser=transformer", "--latent", "4", "3", "8", "8", "--batch=2", "--steps=1",
          "width=24", "depth=1", "heads=2"])  # fmt: skip
    _, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert [row[-6] for row in rows] == ["fp32", "bf16"]
    assert all(float(row[-5]) > 0 and float(row[-2]) > 0 for row in rows)
    fp32, bf16 = (float(row[-1]) for row in rows)
    assert fp32 == 0
    assert 0 < bf16 < 0.1
