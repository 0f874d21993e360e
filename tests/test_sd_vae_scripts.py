"""What a training step of the SD VAE with its GAN takes: memory on fake tensors, and the benchmark's table."""

from __future__ import annotations

import torch

from tests import tiny
from vae3d.models import compiled

WEIGHTS = 83_653_863  # parameters of f8c4
TINY = [
    *("model.channels=[8,8]", "model.groups=4", "model.layers=1", "adversary=none", "loss=recon_kl", "data.height=32"),
    *("data.width=32", "trainer.precision=fp32"),
]


def test_a_step_of_the_256_pixel_recipe_with_its_gan_takes_at_most_4_gib():
    counting = tiny.load_script("count_sd_vae_memory")
    needs = counting.count()
    stays, parts, copy = needs.stays, needs.parts, 4 * WEIGHTS
    assert [stays[name] for name in ("weights", "gradients", "EMA")] == [copy] * 3
    assert stays["AdamW"] == 2 * copy
    assert stays["discriminator"] >= 4 * 4 * 2_765_633
    assert abs(stays["other"]) < 2**20  # every item is counted, and once
    assert parts["kept for backward"] < 0.1 * 2**30 < parts["backward"]
    assert needs.memory <= 4 * 2**30


def test_checkpointing_keeps_less_and_the_peak_is_of_both_networks_passes():
    counting = tiny.load_script("count_sd_vae_memory")
    kept = {}
    for on in ("true", "false"):
        parts = counting.count([*TINY, f"model.gradient_checkpointing={on}"]).parts
        kept[on] = parts["kept for backward"]
        assert parts["backward"] >= kept[on]
    assert 5 * kept["true"] < kept["false"]


def test_the_benchmark_compares_eager_and_compiled_steps(monkeypatch, capsys):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    tiny.load_script("bench_sd_vae").main(
        ["--device", "cpu", "--steps", "1", *TINY, "data.batch_size=2", "trainer.accumulate=2"]
    )
    torch._dynamo.reset()
    _, eager, compiled_row = capsys.readouterr().out.splitlines()
    assert (eager.split()[0], compiled_row.split()[0]) == ("eager", "compiled")
    assert all(float(cell) > 0 for row in (eager, compiled_row) for cell in row.split()[1:3])
